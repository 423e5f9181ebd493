"""Adafactor: second moments of matrices kept as one row and one column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import is_zero, moving_average, power, root
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.hyper import hyper
from torchopt.core.rules import TensorTransformation
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import flip_sign
from torchopt.typing import Hyperparameter, Step


def _rows(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[:-1], 1)


def _columns(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[:-2], 1, shape[-1])


def _is_factored(shape: torch.Size, **_: Any) -> bool:
    return len(shape) > 1


def _is_vector(shape: torch.Size, **_: Any) -> bool:
    return len(shape) < 2


@transformation
class StepByAdafactor(TensorTransformation):
    """The whole step of Adafactor; see :func:`adafactor`."""

    lr: Hyperparameter = hyper(1e-2, ge=0)
    beta2_decay: Hyperparameter = hyper(-0.8, le=0, scalar=True)
    eps: tuple[Hyperparameter | None, Hyperparameter] = hyper(
        (None, 1e-3), ge=0, length=2, optional=(0,), scalar=True
    )
    d: Hyperparameter = hyper(1.0, ge=1, scalar=True)
    weight_decay: Hyperparameter = hyper(0.0, ge=0)

    slots = (
        Slot("row_var", shape=_rows, when=_is_factored),
        Slot("col_var", shape=_columns, when=_is_factored),
        Slot("variance", when=_is_vector),
    )
    uses_step = True
    accepts_complex = False
    batches = True

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        lr: Any,
        beta2_decay: Any,
        eps: tuple[Any, Any],
        d: Any,
        weight_decay: Any,
    ) -> tuple[Tensor, tuple]:
        """Return the update, clipped by its root mean square and scaled by the parameter's."""
        p = misuse.given_params("Adafactor", p)
        eps1 = torch.finfo(g.dtype).eps if eps[0] is None else eps[0]
        b2 = 1 - power(t, beta2_decay)
        v, slots = _second_moment(g, slots, b2, eps1)
        u = g * _at_least(v, eps1 * eps1).rsqrt()
        rate = _at_most(lr, 1 / power(t, 0.5)) * _at_least(_rms(p), eps[1])
        u = u * (-rate / _at_least(_rms(u) / d, 1.0))
        return (u if is_zero(weight_decay) else u - lr * weight_decay * p), slots


def _second_moment(g: Tensor, slots: tuple, b2: Any, eps1: Any) -> tuple[Tensor, tuple]:
    """Return the second moment of a gradient, for a matrix from its rows and columns."""
    r, c, v = slots
    squares = g.square()
    if g.dim() < 2:
        v = moving_average(v, squares, b2)
        return v, (r, c, v)
    r = moving_average(r, squares.mean(dim=-1, keepdim=True), b2)
    c = moving_average(c, squares.mean(dim=-2, keepdim=True), b2)
    total = _at_least(r.mean(dim=-2, keepdim=True), eps1)
    return (r / total) @ c, (r, c, v)


def _rms(x: Tensor) -> Tensor:
    """Return the root mean square of all entries, with derivative zero where all are zero."""
    return root(x.square().mean())


def _at_least(x: Tensor, bound: Any) -> Tensor:
    return torch.maximum(x, bound.to(x.dtype)) if isinstance(bound, Tensor) else x.clamp(min=bound)


def _at_most(x: Any, bound: Any) -> Any:
    if isinstance(x, Tensor) or isinstance(bound, Tensor):
        like = x if isinstance(x, Tensor) else bound
        x, bound = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (x, bound))
        return torch.minimum(x, bound)
    return min(x, bound)


def adafactor(
    lr: Hyperparameter = 1e-2,
    beta2_decay: Hyperparameter = -0.8,
    eps: tuple[Hyperparameter | None, Hyperparameter] = (None, 1e-3),
    d: Hyperparameter = 1.0,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Adafactor: the second moment of a matrix kept as one row and one column.

    With :math:`\hat\beta_t = 1 - t^{\tau}` and :math:`\mathrm{RMS}(x)` the root of the mean of
    :math:`x^2`:

    .. math::
        R_t = \hat\beta_t R_{t-1} + (1 - \hat\beta_t)\, \mathrm{mean}_j\, g_t^2, \qquad
        C_t = \hat\beta_t C_{t-1} + (1 - \hat\beta_t)\, \mathrm{mean}_i\, g_t^2, \\
        V_t = \frac{R_t C_t}{\max(\mathrm{mean}_i R_t,\, \epsilon_1)}, \qquad
        u_t = \frac{g_t}{\max(\sqrt{V_t},\, \epsilon_1)}, \\
        p_t = (1 - \eta \lambda)\, p_{t-1}
            - \min(\eta, t^{-1/2})\, \max(\epsilon_2, \mathrm{RMS}(p_{t-1}))
              \frac{u_t}{\max(1, \mathrm{RMS}(u_t) / d)}

    The last two dimensions are factored; vectors and numbers keep a whole :math:`V_t`.

    Args:
        lr: :math:`\eta \ge 0`: the greatest relative step, and the rate of weight decay.
        beta2_decay: :math:`\tau \le 0`.
        eps: :math:`(\epsilon_1, \epsilon_2)`, each >= 0. ``None`` for the first is the precision of
            the dtype of computation.
        d: Where updates are clipped, >= 1.
        weight_decay: :math:`\lambda \ge 0`.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. The rule of a whole matrix has none.

    Optax's ``adafactor`` calls ``beta2_decay`` ``-decay_rate``, ``d`` ``clipping_threshold``,
    ``weight_decay`` ``weight_decay_rate`` (there not times the learning rate), adds its ``eps``
    to :math:`g^2`, factors only dimensions of ``min_dim_size_to_factor`` (128) or more, and takes
    ``learning_rate`` as it is, without the bound :math:`t^{-1/2}`.

    Slots: ``row_var`` and ``col_var`` of the shape of a row and a column, or ``variance``.
    Differentiable in gradients, parameters, slots and every number; the derivative is that of the
    branch taken at each maximum, and zero through a root mean square that is zero.

    Raises:
        ValueError: If a number is out of bounds, or ``update`` is called without ``params``.
        TypeError: If a gradient is complex or sparse.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.adafactor(lr=0.1)
        >>> params = {"w": torch.tensor([[1.0, -1.0], [1.0, -1.0]])}
        >>> updates, state = tx.update({"w": torch.ones(2, 2)}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([[ 0.9000, -1.1000],
                [ 0.9000, -1.1000]])}
        >>> state.row_var["w"].shape, state.col_var["w"].shape
        (torch.Size([2, 1]), torch.Size([1, 2]))

    Reference:
        Shazeer and Stern, Adafactor: adaptive learning rates with sublinear memory cost, ICML 2018,
        https://arxiv.org/abs/1804.04235; ``torch.optim.Adafactor``.
    """
    tx = chain(flip_sign(maximize), StepByAdafactor(lr, beta2_decay, eps, d, weight_decay))
    return accelerated(tx, use_accelerated_op)


class Adafactor(Optimizer):
    """:func:`torchopt.adafactor` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.Adafactor``.
    """

    @from_recipe(adafactor)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.adafactor`."""


class MetaAdafactor(MetaOptimizer):
    """:func:`torchopt.adafactor` as a differentiable optimizer of a network."""

    @meta_from_recipe(adafactor)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.adafactor`."""
