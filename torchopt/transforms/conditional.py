"""Run a transformation at some calls, or with gradients that are finite."""

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
    Calls,
    Wrapper,
    all_finite,
    count_of,
    delayed,
    of_number,
    prepared,
)


class _Sometimes(Wrapper):
    """Run the inside for some parameters; the others keep its slots."""

    def takes_sparse(self, **hyperparameters: Any) -> bool:
        """Whether all rules inside are right for sparse gradients."""
        plan = self.inner.plan
        row = {**hyperparameters, **{name: c.start for name, c in plan.counters.items()}}
        rows = [plan.rows_of(k, [row])[0] for k in range(len(plan.parts))]
        return all(part.takes_sparse(**own) for part, own in zip(plan.parts, rows))

    def some(
        self, leaves: Leaves, chosen: list[int], t: list[int], passes: bool
    ) -> tuple[list[Tensor], list[list[Any]]]:
        """Run the inside for the chosen; the gradients of the others pass, or become zero."""
        slots = [list(row) for row in leaves.slots]
        updates = [g if passes else torch.zeros_like(g) for g in leaves.g]
        if chosen:
            own = len(self.own_slots)
            found, inside = self.run_inner(leaves, [leaves.g[k] for k in chosen], t, chosen)
            for k, u, row in zip(chosen, found, inside):
                updates[k] = u
                slots[k][own:] = row
        return updates, slots


@transformation
class Conditionally(_Sometimes):
    """Run ``inner`` at some calls; see :func:`conditionally_transform`."""

    inner: GradientTransformation
    calls: Calls
    passes: bool = True

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters of the inner transformation; schedules count its steps."""
        values = super().hyperparameters()
        return {name: delayed(value, self.calls) for name, value in values.items()}

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """Run the inside for the parameters whose turn it is."""
        n = [count_of(t) for t in leaves.t]
        done = [self.calls.done(count - 1) for count in n]
        chosen = [k for k, count in enumerate(n) if self.calls.done(count) > done[k]]
        updates, slots = self.some(leaves, chosen, [done[k] + 1 for k in chosen], self.passes)
        return updates, [tuple(row) for row in slots]


@transformation
class ConditionallyOnValues(_Sometimes):
    """The same where the function is given the extra values of a call as well."""

    inner: GradientTransformation
    function: Callable[..., Any]
    passes: bool = True

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whatever the function takes."""
        return ("*",)

    @property
    def own_slots(self) -> tuple[Slot, ...]:
        """How many steps the inside has taken."""
        return (Slot("inner_step", shape=of_number, dtype=torch.int64),)

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """Run the inside if the function says so."""
        extra = leaves.call.extra
        answers = {n: bool(self.function(n, **extra)) for n in {count_of(t) - 1 for t in leaves.t}}
        chosen = [k for k, t in enumerate(leaves.t) if answers[count_of(t) - 1]]
        t = [int(leaves.slots[k][0]) + 1 for k in chosen]
        updates, slots = self.some(leaves, chosen, t, self.passes)
        for k in chosen:
            slots[k][0] = slots[k][0] + 1
        return updates, [tuple(row) for row in slots]


def _conditionally(inner: Any, function: Any, forwards: bool, passes: bool, owner: str) -> Any:
    if not callable(function):
        raise TypeError(
            f"{owner} expects a function of the number of calls so far, got "
            f"{misuse.short(function)}."
        )
    inner = prepared(inner, owner)
    if forwards:
        return ConditionallyOnValues(inner, function, passes)
    return Conditionally(inner, Calls(function), passes)


def conditionally_transform(
    inner: GradientTransformation,
    should_transform_fn: Callable[..., Any],
    forward_extra_args: bool = False,
) -> GradientTransformation:
    """Run a transformation on the calls that a function selects; the others pass gradients on.

    On the others its slots and step count stay. Its schedules count its own steps.

    Args:
        inner: The transformation.
        should_transform_fn: A function of the number of calls so far, 0 at the first.
        forward_extra_args: Give it the extra values of ``update`` by keyword too. It is asked at
            every call then; and schedules of ``inner`` count all of them.

    Slots: those of ``inner``, and its counters.

    Raises:
        TypeError: If ``inner`` is no transformation or the function cannot be called.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.conditionally_transform(torchopt.scale(-1.0), lambda step: step >= 1)
        >>> g = [torch.ones(1)]
        >>> state = tx.init(g)
        >>> for _ in range(2):
        ...     updates, state = tx.update(g, state)
        ...     print(updates)
        [tensor([1.])]
        [tensor([-1.])]
    """
    name = "conditionally_transform"
    return _conditionally(inner, should_transform_fn, forward_extra_args, True, name)


def conditionally_mask(
    inner: GradientTransformation,
    should_transform_fn: Callable[..., Any],
    forward_extra_args: bool = False,
) -> GradientTransformation:
    """Run a transformation on the calls that a function selects; on the others nothing moves.

    Like :func:`conditionally_transform`, except that the updates of the others are zero.

    Args:
        inner: The transformation.
        should_transform_fn: A function of the number of calls so far, 0 at the first.
        forward_extra_args: As there.

    Raises:
        TypeError: If ``inner`` is no transformation or the function cannot be called.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.conditionally_mask(torchopt.scale(-1.0), lambda step: step >= 1)
        >>> g = [torch.ones(1)]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([0.])]
    """
    return _conditionally(
        inner, should_transform_fn, forward_extra_args, False, "conditionally_mask"
    )


@transformation
class ApplyIfFinite(_Sometimes):
    """Run ``inner`` with finite gradients; see :func:`apply_if_finite`."""

    inner: GradientTransformation
    max_consecutive_errors: int

    @property
    def own_slots(self) -> tuple[Slot, ...]:
        """What has been counted, the same for all parameters that have had every gradient."""
        names = ("notfinite_count", "total_notfinite", "inner_step")
        return tuple(Slot(name, shape=of_number, dtype=torch.int64) for name in names)

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """Run the inside, unless a gradient is not finite and that has not happened too often."""
        if all_finite(leaves.g):
            counts = [(0 * bad, total) for bad, total, *_ in leaves.slots]
        else:
            counts = [(bad + 1, total + 1) for bad, total, *_ in leaves.slots]
        chosen = [k for k, (n, _) in enumerate(counts) if not 0 < n <= self.max_consecutive_errors]
        t = [int(leaves.slots[k][2]) + 1 for k in chosen]
        updates, slots = self.some(leaves, chosen, t, False)
        for row, count in zip(slots, counts):
            row[:2] = count
        for k in chosen:
            slots[k][2] = slots[k][2] + 1
        return updates, [tuple(row) for row in slots]


def apply_if_finite(
    inner: GradientTransformation, max_consecutive_errors: int
) -> GradientTransformation:
    """Skip updates in which a gradient is ``nan`` or infinite.

    The update is then zero, and the slots, counters and step count of ``inner`` stay. After more
    such calls in a row than are allowed, the gradients are used as they are. A schedule of
    ``inner`` counts all calls.

    The gradients are read at every call, which waits for the device.

    Args:
        inner: The transformation.
        max_consecutive_errors: How many calls in a row may count for nothing, >= 0.

    Slots: those of ``inner`` and its counters; ``notfinite_count``, such calls since the last
    finite one; ``total_notfinite``, all of them; ``inner_step``.

    Raises:
        TypeError: If ``inner`` is no transformation.
        ValueError: If ``max_consecutive_errors`` is not an integer >= 0.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.apply_if_finite(torchopt.sgd(1.0), max_consecutive_errors=5)
        >>> p = [torch.ones(2)]
        >>> tx.update([torch.tensor([1.0, float("nan")])], tx.init(p), p)[0]
        [tensor([0., 0.])]
    """
    n = max_consecutive_errors
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"max_consecutive_errors must be an integer >= 0, got {misuse.short(n)}.")
    return ApplyIfFinite(prepared(inner, "apply_if_finite"), n)
