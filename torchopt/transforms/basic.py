"""Scaling, freezing, weight decay, sign, repair and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import add_scaled, is_zero
from torchopt.core.chaining import Chain
from torchopt.core.hyper import check_number, flag, hyper
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.transforms.wrap import masked
from torchopt.typing import Hyperparameter, Schedule, Step


def identity() -> GradientTransformation:
    """Return the transformation that leaves gradients as they are: the empty chain.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.identity()
        >>> tx.update([torch.ones(2)], tx.init([torch.ones(2)]))[0]
        [tensor([1., 1.])]
    """
    return Chain(())


@transformation
class Scale(ElementwiseTransformation):
    """Multiply by a factor; see :func:`scale`."""

    step_size: Hyperparameter = hyper()
    accepts_sparse = True

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, step_size: Any
    ) -> tuple[Tensor, tuple]:
        """Return ``step_size * g``; zeros for the number 0, for which ``0 * nan`` is ``nan``."""
        if is_zero(step_size):
            return torch.zeros_like(g), slots
        return g * step_size, slots


def scale(step_size: Hyperparameter) -> GradientTransformation:
    r"""Multiply by a factor: :math:`u = s\, g`.

    If the factor is the Python number 0, the update is zero for any gradient (even ``nan``) and
    does not depend on it, as with :func:`set_to_zero`.

    Args:
        step_size: The factor; a number, a tensor, a schedule or a tree with one entry per
            parameter.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale(-0.5)
        >>> tx.update([torch.ones(2)], tx.init([torch.ones(2)]))[0]
        [tensor([-0.5000, -0.5000])]
    """
    return Scale(step_size)


def scale_by_schedule(step_size_fn: Schedule) -> GradientTransformation:
    r"""Multiply by a factor that depends on the step count: :math:`u_t = s(t-1)\, g_t`.

    Args:
        step_size_fn: ``count -> factor``; the count is 0 at the first update.

    Raises:
        TypeError: If ``step_size_fn`` is not callable.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_schedule(torchopt.schedules.linear(1.0, 0.0, transition_steps=2))
        >>> g = [torch.ones(1)]
        >>> state = tx.init(g)
        >>> for _ in range(3):
        ...     updates, state = tx.update(g, state)
        ...     print(updates[0].item())
        1.0
        0.5
        0.0
    """
    if isinstance(step_size_fn, Tensor) or not callable(step_size_fn):
        raise TypeError(
            f"scale_by_schedule expects a function count -> value, got {step_size_fn!r}."
        )
    return ScaleBySchedule(step_size_fn)


@transformation
class ScaleBySchedule(Scale):
    """Multiply by a scheduled factor; see :func:`scale_by_schedule`."""

    uses_step = True


@transformation
class SetToZero(ElementwiseTransformation):
    """Let nothing through; see :func:`set_to_zero`."""

    accepts_sparse = True

    def rule(self, g: Tensor, p: Any, t: Step, slots: tuple) -> tuple[Tensor, tuple]:
        """Return zeros."""
        return torch.zeros_like(g), slots

    def with_accelerated_op(self, use_accelerated_op: bool | None) -> GradientTransformation:
        """Return itself: nothing is computed here that a kernel could be required for."""
        return self


def set_to_zero() -> GradientTransformation:
    r"""Return zeros, whatever the gradient is: :math:`u = 0`.

    A gradient that is ``nan`` or infinite gives zero as well, which ``scale`` by a tensor does not
    promise. The update does not depend on the gradient, so that all its derivatives are zero.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.set_to_zero()
        >>> tx.update([torch.tensor([float("nan"), 1.0])], tx.init([torch.ones(2)]))[0]
        [tensor([0., 0.])]
    """
    return SetToZero()


def freeze(mask: Any) -> GradientTransformation:
    """Keep the parameters at which ``mask`` is true as they are, and let the others pass.

    It belongs at the end of a chain: what comes after it, such as weight decay, may move them
    again. At the end, no ``nan`` in a gradient and no weight decay reaches a frozen parameter. Its
    moments and the norm of a :func:`clip_grad_norm` can still see the gradient; to prevent that,
    put another ``freeze`` at the beginning. For parameters that will never be trained,
    ``requires_grad_(False)`` is enough.

    Args:
        mask: Which parameters are frozen; see :func:`torchopt.masked`.

    Raises:
        ValueError: If the mask does not match the parameters (at the first ``init``).
        TypeError: If an entry of the mask is not a bool.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.chain(torchopt.adamw(0.1), torchopt.freeze({"body": True, "head": False}))
        >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
        >>> grads = {"body": torch.tensor([float("nan")]), "head": torch.ones(1)}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> torchopt.apply_updates(params, updates)
        {'body': tensor([1.]), 'head': tensor([0.8990])}
    """
    return masked(set_to_zero(), mask)


@transformation
class ScaleByLearningRate(ElementwiseTransformation):
    """Multiply by minus the learning rate; see :func:`scale_by_learning_rate`."""

    lr: Hyperparameter = hyper(1e-3, ge=0)
    accepts_sparse = True

    def rule(self, g: Tensor, p: Any, t: Step, slots: tuple, *, lr: Any) -> tuple[Tensor, tuple]:
        """Return ``-lr * g``."""
        return g * -lr, slots


def scale_by_learning_rate(lr: Hyperparameter) -> GradientTransformation:
    r"""Multiply by minus the learning rate, so that the update descends: :math:`u = -\eta g`.

    Args:
        lr: :math:`\eta \ge 0`; a number, a tensor (a learned learning rate), a schedule, or a tree
            with one entry per parameter.

    Raises:
        ValueError: If ``lr`` is a negative number.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.scale_by_learning_rate(0.5)
        >>> tx.update([torch.ones(2)], tx.init([torch.ones(2)]))[0]
        [tensor([-0.5000, -0.5000])]
    """
    return ScaleByLearningRate(lr)


@transformation
class FlipSign(ElementwiseTransformation):
    """Turn descent into ascent; see :func:`flip_sign`."""

    maximize: bool = flag(False)
    accepts_sparse = True

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, maximize: bool
    ) -> tuple[Tensor, tuple]:
        """Return ``-g`` if ``maximize`` else ``g``."""
        return (-g if maximize else g), slots


def flip_sign(maximize: bool = True) -> GradientTransformation:
    r"""Negate the gradient if ``maximize``: :math:`u = -g`.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.flip_sign()
        >>> tx.update([torch.ones(2)], tx.init([torch.ones(2)]))[0]
        [tensor([-1., -1.])]
    """
    return FlipSign(maximize)


@transformation
class AddDecayedWeights(ElementwiseTransformation):
    """Add decayed parameters; see :func:`add_decayed_weights`."""

    weight_decay: Hyperparameter = hyper(0.0, ge=0)

    def rule(
        self, g: Tensor, p: Any, t: Step, slots: tuple, *, weight_decay: Any
    ) -> tuple[Tensor, tuple]:
        """Return ``g + weight_decay * p``."""
        return _decayed(g, p, weight_decay), slots

    def takes_sparse(self, *, weight_decay: Any, **_: Any) -> bool:
        """Only if nothing is added."""
        return is_zero(weight_decay)


def _decayed(g: Tensor, p: Any, weight_decay: Any) -> Tensor:
    """Return a gradient or update with decayed weights; the number 0 leaves it as it is."""
    if is_zero(weight_decay):
        return g
    return add_scaled(g, misuse.given_params("Weight decay", p), weight_decay)


@transformation
class CoupledDecay(ElementwiseTransformation):
    """Add decayed parameters to the gradient, unless the decay is decoupled from it."""

    weight_decay: Hyperparameter = hyper(0.0, ge=0)
    decoupled_weight_decay: bool = flag(False)

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        weight_decay: Any,
        decoupled_weight_decay: bool,
    ) -> tuple[Tensor, tuple]:
        """Return ``g + weight_decay * p``, or ``g``."""
        return g if decoupled_weight_decay else _decayed(g, p, weight_decay), slots


@transformation
class DecoupledDecay(ElementwiseTransformation):
    """Add decayed parameters to the update, if the decay is decoupled from the gradient."""

    weight_decay: Hyperparameter = hyper(0.0, ge=0, shared=True)
    decoupled_weight_decay: bool = flag(False, shared=True)

    def rule(
        self,
        g: Tensor,
        p: Any,
        t: Step,
        slots: tuple,
        *,
        weight_decay: Any,
        decoupled_weight_decay: bool,
    ) -> tuple[Tensor, tuple]:
        """Return ``g + weight_decay * p``, or ``g``."""
        return _decayed(g, p, weight_decay) if decoupled_weight_decay else g, slots


def add_decayed_weights(
    weight_decay: Hyperparameter = 0.0, mask: Any = None
) -> GradientTransformation:
    r"""Add the parameters times a factor: :math:`u = g + \lambda p`.

    Before a scaling rule this is L2 regularisation, after it decoupled weight decay (Loshchilov
    and Hutter, 2019, https://arxiv.org/abs/1711.05101).

    Args:
        weight_decay: :math:`\lambda \ge 0`. The Python number 0 costs nothing.
        mask: Which parameters decay; see :func:`torchopt.masked`. ``None`` means all.

    Raises:
        ValueError: If ``weight_decay`` is a negative number, or ``update`` is called without
            ``params``.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.add_decayed_weights(0.1)
        >>> params = [torch.tensor([10.0])]
        >>> tx.update([torch.tensor([1.0])], tx.init(params), params)[0]
        [tensor([2.])]
    """
    decay = AddDecayedWeights(weight_decay)
    return decay if mask is None else masked(decay, mask)


@transformation
class NanToNum(ElementwiseTransformation):
    """Replace values that are not finite; see :func:`nan_to_num`."""

    nan: float = 0.0
    posinf: float | None = None
    neginf: float | None = None

    def __post_init__(self) -> None:
        check_number("nan", self.nan)
        for name in ("posinf", "neginf"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))

    def rule(self, g: Tensor, p: Any, t: Step, slots: tuple) -> tuple[Tensor, tuple]:
        """Return ``g`` with ``nan`` and infinities replaced."""
        return torch.nan_to_num(g, self.nan, self.posinf, self.neginf), slots


def nan_to_num(
    nan: float = 0.0, posinf: float | None = None, neginf: float | None = None
) -> GradientTransformation:
    """Replace ``nan`` and infinite entries, as :func:`torch.nan_to_num` does.

    Args:
        nan: Replacement of ``nan``.
        posinf: Replacement of plus infinity; ``None`` for the largest finite number.
        neginf: Replacement of minus infinity; ``None`` for the smallest finite number.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.nan_to_num(0.0)
        >>> tx.update([torch.tensor([float("nan"), 1.0])], tx.init([torch.ones(2)]))[0]
        [tensor([0., 1.])]
    """
    return NanToNum(nan, posinf, neginf)


@transformation
class RegisterHook(ElementwiseTransformation):
    """Register a backward hook; see :func:`register_hook`."""

    hook: Callable[[Tensor], Tensor | None]

    def rule(self, g: Tensor, p: Any, t: Step, slots: tuple) -> tuple[Tensor, tuple]:
        """Return an alias of ``g`` whose gradient passes through the hook."""
        if not g.requires_grad:
            return g, slots
        g = g.view_as(g)  # the hook is put on an alias: the caller's tensor keeps its own hooks
        g.register_hook(self.hook)
        return g, slots


def register_hook(hook: Callable[[Tensor], Tensor | None]) -> GradientTransformation:
    """Pass what flows back through the updates (a meta-gradient) through a hook.

    Args:
        hook: Called in the backward pass with the gradient with respect to each update; may return
            its replacement. See :meth:`torch.Tensor.register_hook`.

    Raises:
        TypeError: If ``hook`` is not callable.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.register_hook(lambda grad: 2 * grad)
        >>> g = torch.ones(1, requires_grad=True)
        >>> (u,), _ = tx.update([g], tx.init([g]), inplace=False)
        >>> torch.autograd.grad(u.sum(), g)
        (tensor([2.]),)
    """
    if not callable(hook):
        raise TypeError(f"register_hook expects a function of a gradient, got {hook!r}.")
    return RegisterHook(hook)
