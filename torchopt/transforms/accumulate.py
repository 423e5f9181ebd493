"""Accumulate gradients, and step at every so many calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.core.engine import Leaves
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.transforms.inside import (
    Every,
    Wrapper,
    all_finite,
    count_of,
    delayed,
    of_number,
    prepared,
)


@transformation
class Accumulate(Wrapper):
    """Run ``inner`` with means or sums of gradients; see :func:`MultiSteps`."""

    inner: GradientTransformation
    every: Every
    use_grad_mean: bool = True
    should_skip_update_fn: Callable[..., Any] | None = None

    @property
    def own_slots(self) -> tuple[Slot, ...]:
        """What has been accumulated, and how many calls have been skipped, if they may be."""
        skipped = (Slot("skipped", shape=of_number, dtype=torch.int64),)
        return (Slot("acc_grads"), *(skipped if self.should_skip_update_fn is not None else ()))

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters of the inner transformation; schedules count its steps."""
        values = super().hyperparameters()
        return {name: delayed(value, self.every) for name, value in values.items()}

    def takes_sparse(self, **hyperparameters: Any) -> bool:
        """No: what is accumulated is dense."""
        return False

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """Accumulate, and run the inside for the parameters whose turn it is."""
        calls = [count_of(t) - 1 for t in leaves.t]
        if self.should_skip_update_fn is not None:
            calls = [n - int(row[1]) for n, row in zip(calls, leaves.slots)]
            if _answer(self.should_skip_update_fn(leaves.g, self.every.done(calls[0]), leaves.p)):
                rows = [(a, skipped + 1, *rest) for a, skipped, *rest in leaves.slots]
                return [torch.zeros_like(g) for g in leaves.g], rows
        done = [self.every.done(n) for n in calls]
        due = [k for k, n in enumerate(calls) if self.every.done(n + 1) > done[k]]
        slots = [list(row) for row in leaves.slots]
        for row, g, n, d in zip(slots, leaves.g, calls, done):
            if self.use_grad_mean:
                row[0] = torch.lerp(row[0], g, 1 / (n - self.every.begin(d) + 1))
            else:
                row[0] = row[0] + g
        turn = set(due)
        updates = [None if k in turn else torch.zeros_like(g) for k, g in enumerate(leaves.g)]
        if due:
            t, own = [done[k] + 1 for k in due], len(self.own_slots)
            found, inside = self.run_inner(leaves, [slots[k][0] for k in due], t, due)
            for k, u, row in zip(due, found, inside):
                updates[k] = u
                slots[k][0] = torch.zeros_like(slots[k][0])
                slots[k][own:] = row
        return updates, [tuple(row) for row in slots]  # pyright: ignore[reportReturnType]


def _answer(value: Any) -> bool:
    return bool(value[0] if isinstance(value, tuple) else value)


def MultiSteps(  # noqa: N802 - Optax's name
    opt: GradientTransformation,
    every_k_schedule: int | Callable[[int], int],
    use_grad_mean: bool = True,
    should_skip_update_fn: Callable[..., Any] | None = None,
) -> GradientTransformation:
    r"""Accumulate gradients over :math:`k` calls, and step with their mean at the last of them.

    .. math::
        a_n = a_{n-1} + (g_n - a_{n-1}) / n, \qquad
        u = 0 \text{ for } n < k, \quad u = \operatorname{opt}(a_k) \text{ for } n = k

    The transformation runs only on the last call: its step count, its counters and its schedules
    count its own steps, and :math:`k` calls cost one of its steps. A meta-gradient reaches every
    one of the gradients.

    Args:
        opt: The transformation.
        every_k_schedule: :math:`k \ge 1`, or a function of the steps taken so far that returns it.
        use_grad_mean: Take the mean; else the sum.
        should_skip_update_fn: A function ``(updates, gradient_step, params)`` of lists of tensors,
            such as :func:`skip_not_finite`, that says whether a call counts for nothing: its
            gradient is not accumulated. It is asked at every call, and its answer is read, which
            waits for the device. Schedules count the calls that were skipped.

    Slots: ``acc_grads``, those of the transformation, and its counters.

    Raises:
        TypeError: If ``opt`` is no transformation, or a number or function is neither.
        ValueError: If ``every_k_schedule`` is or returns a number < 1.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.MultiSteps(torchopt.sgd(1.0), every_k_schedule=2)
        >>> params = [torch.zeros(1)]
        >>> state = tx.init(params)
        >>> for g in (1.0, 3.0):
        ...     updates, state = tx.update([torch.tensor([g])], state, params)
        ...     print(updates)
        [tensor([0.])]
        [tensor([-2.])]
    """
    k = every_k_schedule
    if isinstance(k, bool) or not (isinstance(k, int) or callable(k)):
        raise TypeError(
            "every_k_schedule must be an integer, or a function of the steps so far that returns "
            f"one, got {misuse.short(k)}."
        )
    if isinstance(k, int) and k < 1:
        raise ValueError(f"every_k_schedule must be >= 1, got {k}.")
    if should_skip_update_fn is not None and not callable(should_skip_update_fn):
        raise TypeError(
            "should_skip_update_fn must be a function (updates, gradient_step, params), got "
            f"{misuse.short(should_skip_update_fn)}."
        )
    inner = prepared(opt, "MultiSteps")
    return Accumulate(inner, Every(k), use_grad_mean, should_skip_update_fn)


def skip_not_finite(updates: list[Tensor], gradient_step: int, params: list[Any]) -> bool:
    """Return whether a gradient has an entry that is ``nan`` or infinite, for :func:`MultiSteps`.

    Example:
        >>> import torch, torchopt
        >>> torchopt.skip_not_finite([torch.tensor([1.0, float("inf")])], 0, [None])
        True
    """
    return not all_finite(updates)
