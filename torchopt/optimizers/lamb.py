"""LAMB: AdamW whose updates have norms in proportion to the parameters'."""

from __future__ import annotations

from typing import Any

from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.transform import GradientTransformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.optimizers.adam import scale_by_adam
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.transforms.trust_ratio import ScaleByNormRatio
from torchopt.transforms.wrap import masked
from torchopt.typing import Hyperparameter


def lamb(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    amsgrad: bool = False,
    *,
    eps_root: Hyperparameter = 0.0,
    mask: Any = None,
    trust_ratio_mask: Any = None,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""LAMB: Adam for large batches, with a trust ratio for each parameter.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \\
        w_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t) + \epsilon_r} + \epsilon}
            + \lambda p_{t-1}, \qquad
        p_t = p_{t-1} - \eta\, \frac{\lVert p_{t-1} \rVert}{\lVert w_t \rVert}\, w_t

    Both moments are corrected for their bias, as in the paper. The ratio is 1 where one of the
    norms is 0. Norms are those of whole parameters; :math:`\lVert w_t \rVert` includes the weight
    decay. With ``amsgrad`` the running maximum of :math:`v` replaces :math:`v_t`.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)` of the two moments, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, added to the root.
        weight_decay: :math:`\lambda \ge 0`. The paper has 0.01.
        amsgrad: Use the running maximum of the second moment.
        eps_root: :math:`\epsilon_r \ge 0`, added inside the root.
        mask: Which parameters decay; see :func:`torchopt.masked`. ``None`` means all.
        trust_ratio_mask: Which parameters have a ratio other than 1; ``None`` means all.
            Implementations for transformers leave out biases and normalizations.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. The norm of a whole parameter has none.

    It is ``optax.lamb``. Implementations without bias corrections, with only one of them, or with
    norms clipped at 10 (as in the paper's code for BERT) take other steps.

    Slots: ``exp_avg``, ``exp_avg_sq``, with ``amsgrad`` ``max_exp_avg_sq``. ``update`` needs
    ``params``. Differentiable in gradients, parameters, slots and every number; where a norm is
    zero the ratio counts as a constant, see :func:`torchopt.scale_by_trust_ratio`.

    Raises:
        ValueError: If a number is out of bounds, or ``update`` is called without ``params``.
        RuntimeError: If ``use_accelerated_op=True``.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.lamb(lr=0.1)
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> updates, state = tx.update({"w": torch.tensor([1.0, -7.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([2.6464, 4.3536])}

    Reference:
        You et al., Large batch optimization for deep learning: training BERT in 76 minutes,
        ICLR 2020, algorithm 2, https://arxiv.org/abs/1904.00962; ``optax.lamb``.
    """
    ratio = ScaleByNormRatio()
    tx = chain(
        flip_sign(maximize),
        scale_by_adam(betas, eps, eps_root, amsgrad),
        add_decayed_weights(weight_decay, mask),
        ratio if trust_ratio_mask is None else masked(ratio, trust_ratio_mask),
        scale_by_learning_rate(lr),
    )
    return accelerated(tx, use_accelerated_op)


class LAMB(Optimizer):
    """:func:`torchopt.lamb` as a ``torch.optim.Optimizer``."""

    @from_recipe(lamb)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.lamb`."""


class MetaLAMB(MetaOptimizer):
    """:func:`torchopt.lamb` as a differentiable optimizer of a network."""

    @meta_from_recipe(lamb)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.lamb`."""
