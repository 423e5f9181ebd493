"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any

import torch

from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.recipe import ignoring_moment_requires_grad
from torchopt.core.transform import GradientTransformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.optimizers.adam import scale_by_adam
from torchopt.transforms.basic import add_decayed_weights, flip_sign, scale_by_learning_rate
from torchopt.typing import Hyperparameter


@ignoring_moment_requires_grad
def adamw(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
    amsgrad: bool = False,
    *,
    eps_root: Hyperparameter = 0.0,
    mask: Any = None,
    maximize: bool = False,
    exp_avg_dtype: torch.dtype | None = None,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""Adam with weight decay that does not pass through the moments.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \\
        p_t = p_{t-1} - \eta \left( \frac{m_t / (1 - \beta_1^t)}
            {\sqrt{v_t / (1 - \beta_2^t) + \epsilon_r} + \epsilon} + \lambda p_{t-1} \right)

    With ``amsgrad`` the running maximum of :math:`v` replaces :math:`v_t`. The quotient is
    :func:`torchopt.scale_by_adam`.

    Args:
        lr: Learning rate :math:`\eta \ge 0`.
        betas: Decay rates :math:`(\beta_1, \beta_2)` of the two moments, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, added to the root.
        weight_decay: :math:`\lambda \ge 0`; needs ``params`` in ``update``.
        amsgrad: Use the running maximum of the second moment.
        eps_root: :math:`\epsilon_r \ge 0`, added inside the root.
        mask: Which parameters decay; see :func:`torchopt.masked`. ``None`` means all.
        maximize: Ascend instead of descend.
        exp_avg_dtype: The dtype that the first moment is kept in, such as ``torch.bfloat16``; see
            :meth:`torchopt.GradientTransformation.with_slot_dtypes`.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never.

    Slots: ``exp_avg``, ``exp_avg_sq``, with ``amsgrad`` ``max_exp_avg_sq``. Differentiable in
    gradients, parameters, slots and every number.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.adamw(lr=0.1, weight_decay=0.5)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([0.8500])}

    Reference:
        Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019,
        https://arxiv.org/abs/1711.05101; ``torch.optim.AdamW``.
    """
    tx = chain(
        flip_sign(maximize),
        scale_by_adam(betas, eps, eps_root, amsgrad),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(lr),
    )
    if exp_avg_dtype is not None:
        tx = tx.with_slot_dtypes({"exp_avg": exp_avg_dtype})
    return accelerated(tx, use_accelerated_op)


class AdamW(Optimizer):
    """:func:`torchopt.adamw` as a ``torch.optim.Optimizer``.

    Its ``state_dict`` interchanges with that of ``torch.optim.AdamW``.
    """

    optional_hyperparameters = frozenset({"eps_root"})
    former_defaults = {"amsgrad": False, "maximize": False}
    fixed_options = {"decoupled_weight_decay": True}

    @from_recipe(adamw)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.adamw`."""


class MetaAdamW(MetaOptimizer):
    """:func:`torchopt.adamw` as a differentiable optimizer of a network."""

    @meta_from_recipe(adamw)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.adamw`."""
