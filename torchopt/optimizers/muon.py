"""Muon: momentum of matrices, orthogonalized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.distributed import spread_as, whole
from torchopt.base.numerics import moving_average
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import choice, flag, hyper
from torchopt.core.rules import TensorTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import add_decayed_weights, scale_by_learning_rate
from torchopt.typing import Hyperparameter, Step


#: Coefficients of the quintic that grows small singular values fastest (Jordan, 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@transformation
class ScaleByMuon(TensorTransformation):
    """Orthogonalize the momentum of matrices; see :func:`scale_by_muon`."""

    momentum: Hyperparameter = hyper(0.95, ge=0)
    nesterov: bool = flag(True)
    ns_coefficients: tuple[Hyperparameter, ...] = hyper(COEFFICIENTS, length=3, scalar=True)
    eps: Hyperparameter = hyper(1e-7, gt=0, scalar=True)
    ns_steps: int = hyper(5, ge=0, lt=100, integer=True)
    adjust_lr_fn: str | None = choice(None, among=(None, "original", "match_rms_adamw"))
    ns_dtype: torch.dtype = choice(torch.bfloat16, among=DTYPES)

    slots = (Slot("momentum_buffer"),)
    accepts_complex = False

    def refuses(self, param: Tensor) -> str:
        """Return what to do with a parameter that is no matrix."""
        if param.dim() == 2:
            return ""
        return (
            f"has the shape {tuple(param.shape)}, and Muon takes matrices only. Give the others to "
            'another optimizer: torchopt.partition({"matrix": torchopt.muon(...), "rest": '
            "torchopt.adamw(...)}, torchopt.matrices_and_rest)."
        )

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        momentum: Any,
        nesterov: bool,
        ns_coefficients: tuple[Any, ...],
        eps: Any,
        ns_steps: int,
        adjust_lr_fn: str | None,
        ns_dtype: torch.dtype,
    ) -> tuple[Tensor, tuple]:
        """Return the orthogonalized momentum, scaled by the shape, and the momentum."""
        if g.dim() != 2:
            raise ValueError(f"A gradient {self.refuses(g)}")
        b = moving_average(slots[0], g, momentum)
        ahead = moving_average(g, b, 1 - momentum) if nesterov else b
        # whole, if it is spread over processes: they would add up what has been rounded
        o = orthogonalized(whole(ahead).to(ns_dtype), ns_coefficients, ns_steps, eps).to(g.dtype)
        return spread_as(o * _scale_of(g.shape, adjust_lr_fn), g), (b,)


def orthogonalized(x: Tensor, coefficients: tuple[Any, ...], steps: int, eps: Any) -> Tensor:
    """Return a matrix with its singular values brought near 1, by Newton and Schulz's iteration."""
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    # a matrix of zeros stays one, and passes no derivative: its slope would be a^steps / eps
    zero = (wide == 0).all()
    norm = torch.where(zero, 1.0, wide).norm()
    norm = torch.maximum(norm, eps) if isinstance(eps, Tensor) else norm.clamp(min=eps)
    wide = torch.where(zero, 0.0, wide / norm)
    for _ in range(steps):
        wide = _quintic(wide, *coefficients)
    return wide if x.shape[0] <= x.shape[1] else wide.mT


def _quintic(x: Tensor, a: Any, b: Any, c: Any) -> Tensor:
    """Return a x + b x x' x + c (x x')^2 x."""
    gram = x @ x.mT
    if any(isinstance(k, Tensor) for k in (a, b, c)):
        return a * x + (b * gram + c * gram @ gram) @ x
    # sums before they are rounded, as torch.optim takes them: in bfloat16 it makes a difference
    return torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)


def _scale_of(shape: torch.Size, adjust_lr_fn: str | None) -> float:
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5


def scale_by_muon(
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[Hyperparameter, ...] = COEFFICIENTS,
    eps: Hyperparameter = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    ns_dtype: torch.dtype = torch.bfloat16,
) -> GradientTransformation:
    r"""Orthogonalize the momentum of matrices.

    .. math::
        b_t = \mu b_{t-1} + (1 - \mu) g_t, \qquad
        X_0 = \frac{(1 - \mu) g_t + \mu b_t}{\max(\lVert \cdot \rVert_F, \epsilon)}, \qquad
        X_{k+1} = a X_k + \left(b A_k + c A_k^2\right) X_k, \quad A_k = X_k X_k^\top

    and :math:`u_t = s X_K`, for an :math:`m \times n` matrix with :math:`s = \sqrt{\max(1, m / n)}`
    or :math:`s = 0.2 \sqrt{\max(m, n)}`.

    Args:
        momentum: :math:`\mu \ge 0`.
        nesterov: Orthogonalize the momentum looked ahead to; ``False``: :math:`b_t` itself.
        ns_coefficients: :math:`(a, b, c)`.
        eps: :math:`\epsilon > 0`.
        ns_steps: :math:`K`, how many iterations, less than 100.
        adjust_lr_fn: ``"original"`` (also ``None``) or ``"match_rms_adamw"``, the second
            :math:`s`.
        ns_dtype: The dtype of the iteration. ``torch.optim.Muon`` has bfloat16, which carries two
            to three digits; so does a derivative taken through it. For meta-gradients take
            ``torch.float32`` or ``torch.float64``.

    Optax takes matrices as inputs by outputs, so there :math:`m` and :math:`n` change places, adds
    :math:`\epsilon` to the norm, leaves the scale :math:`s` to its ``muon``, and corrects the bias
    of the momentum, which is of effect with ``nesterov`` only. It iterates in the dtype of the
    gradient.

    Slots: ``momentum_buffer``. Differentiable in gradients, slots, ``momentum``,
    ``ns_coefficients`` and ``eps``; a gradient that is zero everywhere passes no derivative.

    Raises:
        ValueError: If a number is out of bounds, or a parameter is no matrix.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_muon(ns_dtype=torch.float32)
        >>> g = [torch.tensor([[3.0, 0.0], [0.0, 0.5]])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([[0.7136, 0.0000],
                [0.0000, 1.0420]])]

    Reference:
        Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024,
        https://kellerjordan.github.io/posts/muon/; ``torch.optim.Muon``.
    """
    return ScaleByMuon(momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn, ns_dtype)


def muon(
    lr: Hyperparameter = 1e-3,
    weight_decay: Hyperparameter = 0.1,
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[Hyperparameter, ...] = COEFFICIENTS,
    eps: Hyperparameter = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    *,
    ns_dtype: torch.dtype = torch.bfloat16,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Muon: momentum of matrices, orthogonalized, with decoupled weight decay.

    For an :math:`m \times n` matrix and :math:`K` iterations:

    .. math::
        b_t = \mu b_{t-1} + (1 - \mu) g_t, \qquad
        X_0 = \frac{(1 - \mu) g_t + \mu b_t}{\max(\lVert \cdot \rVert_F, \epsilon)}, \\
        X_{k+1} = a X_k + \left(b A_k + c A_k^2\right) X_k, \quad A_k = X_k X_k^\top, \\
        p_t = p_{t-1} - \eta\, (s X_K + \lambda p_{t-1})

    with :math:`s = \sqrt{\max(1, m / n)}` or :math:`s = 0.2 \sqrt{\max(m, n)}`. Without
    ``nesterov`` the numerator of :math:`X_0` is :math:`b_t`. The term :math:`s X_K` is
    :func:`torchopt.scale_by_muon`. Muon takes matrices only; a whole network is optimized with
    :func:`torchopt.partition`, see the example.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        momentum: Decay rate :math:`\mu \ge 0` of the momentum.
        nesterov: Look ahead.
        ns_coefficients: Coefficients :math:`(a, b, c)` of the iteration.
        eps: :math:`\epsilon > 0`, the least norm that is divided by.
        ns_steps: :math:`K`, how many iterations, less than 100.
        adjust_lr_fn: How the step depends on the shape: ``"original"`` (also ``None``), or
            ``"match_rms_adamw"``, the second :math:`s`.
        ns_dtype: The dtype of the iteration; for meta-gradients ``torch.float32`` or more.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. The rule of a whole matrix has none.

    Optax's ``muon`` decays weights by 0 unless told otherwise, gives what is no matrix to AdamW
    itself, has ``consistent_rms=0.2`` for ``"match_rms_adamw"``, and differs as
    :func:`torchopt.scale_by_muon` says.

    Slots: ``momentum_buffer``. Differentiable in gradients, parameters, slots and every number.

    Raises:
        ValueError: If a number is out of bounds, or a parameter is no matrix.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> tx = torchopt.partition(
        ...     {"matrix": torchopt.muon(lr=0.02), "rest": torchopt.adamw(lr=1e-3)},
        ...     torchopt.matrices_and_rest,
        ... )
        >>> optimizer = torchopt.Optimizer(net.named_parameters(), tx)
        >>> [(group["label"], group["lr"]) for group in optimizer.param_groups]
        [('matrix', 0.02), ('rest', 0.001)]

    Reference:
        Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/; Liu et al., Muon is
        scalable for LLM training, 2025, https://arxiv.org/abs/2502.16982; ``torch.optim.Muon``.
    """
    tx = chain(
        scale_by_muon(momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn, ns_dtype),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


def matrices_and_rest(params: Any) -> Any:
    """Return the labels ``"matrix"`` and ``"rest"``, for :func:`torchopt.partition`.

    Args:
        params: A tree of parameters. Those with two dimensions are matrices, but for names that
            hold ``embed``: the rows of an embedding are vectors.

    Example:
        >>> import torch, torchopt
        >>> params = {"weight": torch.ones(2, 3), "bias": torch.ones(2), "embed": torch.ones(5, 2)}
        >>> torchopt.matrices_and_rest(params)
        {'weight': 'matrix', 'bias': 'rest', 'embed': 'rest'}
    """
    leaves, spec = tree.flatten(params)
    names = tree.leaf_names(params)
    labels = [
        "matrix" if x is not None and x.dim() == 2 and "embed" not in name.lower() else "rest"
        for name, x in zip(names, leaves)
    ]
    return tree.unflatten(spec, labels)


class Muon(Optimizer):
    """:func:`torchopt.muon` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.Muon``.
    """

    optional_hyperparameters = frozenset({"ns_dtype"})

    @from_recipe(muon)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.muon`."""


class MetaMuon(MetaOptimizer):
    """:func:`torchopt.muon` as a differentiable optimizer of a network."""

    @meta_from_recipe(muon)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.muon`."""
