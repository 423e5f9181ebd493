"""What wrappers share that run a transformation at some calls only.

The step count of the inside differs from that of the call, and so do its counters, which are
therefore kept as slots of the wrapper: 0-d tensors, one for each parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.base.distributed import whole
from torchopt.core import hyper
from torchopt.core.engine import Leaves, run
from torchopt.core.evaluation import converted, evaluates
from torchopt.core.gather import part_slots
from torchopt.core.pair import as_transformation
from torchopt.core.slots import Slot
from torchopt.core.sparse_entries import ChangedSlot
from torchopt.core.step_count import read_number
from torchopt.core.transform import GradientTransformation, check_transformation
from torchopt.schedules.base import Comparable
from torchopt.typing import Step


def of_number(size: torch.Size) -> tuple[int, ...]:
    """Return the shape of a slot that is one number for a parameter."""
    return ()


def prepared(inner: Any, owner: str) -> Any:
    """Return a transformation to be wrapped, with states for all parameters of its own."""
    inner = as_transformation(inner)
    check_transformation(inner, owner)
    return inner.renewed()


class Wrapper(GradientTransformation):
    """A transformation around another one, its field ``inner``, which decides when to run it."""

    inner: GradientTransformation
    uses_step = True

    @property
    def own_slots(self) -> tuple[Slot, ...]:
        """The slots of the wrapper itself."""
        return ()

    def __post_init__(self) -> None:
        misuse.check_decorated(self)
        for name, spec in self.declared.items():  # the inside has checked its own
            if name in self.inner.hyper_specs():
                raise ValueError(
                    f"{type(self).__name__} has a hyperparameter {name!r}, and so has "
                    f"{misuse.clipped(repr(self.inner))} inside it: they would be one."
                )
            hyper.check(name, hyper.plain(getattr(self, name)), spec)

    # The inside's hyperparameters are the wrapper's --------------------------------------------

    def hyper_specs(self) -> dict[str, hyper.HyperSpec]:
        """Return the hyperparameters of the inner transformation."""
        return {**self.declared, **self.inner.hyper_specs()}

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters of the inner transformation."""
        own = {name: getattr(self, name) for name in self.declared}
        return {**own, **self.inner.hyperparameters()}

    def with_accelerated_op(self, use_accelerated_op: bool | None) -> GradientTransformation:
        """Return the same with another setting of the fused kernels inside."""
        inner = self.inner.with_accelerated_op(use_accelerated_op)
        return dataclasses.replace(self, inner=inner)

    def _exchanged(self, values: Mapping[str, Any]) -> GradientTransformation:
        own = {name: x for name, x in values.items() if name in self.declared}
        inside = {name: x for name, x in values.items() if name not in self.declared}
        return dataclasses.replace(self, inner=self.inner.with_hyperparameters(inside), **own)

    def _with_dtypes(self, dtypes: Mapping[str, torch.dtype | None]) -> GradientTransformation:
        names = {self._names[name]: name for name in self.inner.plan.slot_names}
        inside = {names[public]: dtype for public, dtype in dtypes.items() if public in names}
        own = {name: dtype for name, dtype in dtypes.items() if name not in names}
        found = dataclasses.replace(self, inner=self.inner.with_slot_dtypes(inside))
        return super(Wrapper, found)._with_dtypes(own)

    def whole_slots(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Return those of the inner transformation."""
        return {self._names[name]: value for name, value in self.inner.plan.whole.items()}

    def renewed(self) -> GradientTransformation:
        """Return the same with such slots of its own."""
        return dataclasses.replace(self, inner=self.inner.renewed())

    @property
    def accepts_complex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all rules inside are right for complex numbers, and no slot is one number."""
        numbers = self.inner.plan.counters or any(slot.shape for slot in self.own_slots)
        return not numbers and all(part.accepts_complex for part in self.inner.parts)

    # Slots --------------------------------------------------------------------------------------

    @property
    def slots(self) -> tuple[Slot, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapper's own slots, those of the inside, and the counters of the inside."""
        plan, names = self.inner.plan, self._names
        renamed = [
            dataclasses.replace(slot, name=names[name]) for name, slot in plan.slot_of.items()
        ]
        counters = [
            Slot(names[name], start=counter.start, shape=of_number)
            for name, counter in plan.counters.items()
        ]
        return (*self.own_slots, *renamed, *counters)

    @property
    def _names(self) -> dict[str, str]:
        """The names here of the slots and counters inside."""
        taken = {slot.name for slot in self.own_slots}
        names = {}
        for name in (*self.inner.plan.slot_names, *self.inner.plan.counters):
            free = name
            while free in taken:
                free = f"inner_{free}"
            taken.add(free)
            names[name] = free
        return names

    def init_all_slots(self, leaves: Leaves) -> list[tuple[Any, ...]]:
        """Return the first slots of the wrapper and of the inside."""
        plan = self.inner.plan
        starts = {name: counter.start for name, counter in plan.counters.items()}
        rows: list[list[Any]] = [
            [slot.first(p, h) for slot in self.kept(self.own_slots)]
            for p, h in zip(leaves.p, leaves.hyper)
        ]
        inside = _with_rows(leaves, [{**row, **starts} for row in leaves.hyper])
        for position, part in enumerate(plan.parts):
            own = _with_rows(inside, plan.rows_of(position, inside.hyper))
            for row, values in zip(rows, part_slots(part, own)):
                row.extend(values)
        numbers = [Slot(name, start=start, shape=of_number) for name, start in starts.items()]
        for row, p in zip(rows, leaves.p):
            row.extend(slot.first(p, {}) for slot in numbers)
        return [tuple(row) for row in rows]

    # Running ------------------------------------------------------------------------------------

    def run_inner(
        self, leaves: Leaves, g: Sequence[Tensor], t: Sequence[Step], chosen: Sequence[int]
    ) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """Run the inside for the parameters at some positions.

        Args:
            leaves: All parameters, with the slots of the wrapper.
            g: The gradients for the inside, of the chosen ones.
            t: The step counts of the inside, of the chosen ones.
            chosen: The positions.

        Returns:
            The updates and the new slots of the inside, of the chosen ones.
        """
        plan, count = self.inner.plan, len(self.own_slots)
        selected = leaves.subset(chosen)
        number = len(plan.slot_names)
        inside = [row[count:] for row in selected.slots]
        columns = {name: [row[k] for row in inside] for k, name in enumerate(plan.slot_names)}
        kept = {name: [row[number + k] for row in inside] for k, name in enumerate(plan.counters)}
        rows = selected.hyper
        if kept:
            old = {name: [read_number(x) for x in column] for name, column in kept.items()}
            rows = plan.counted_rows(rows, t, old)
        own = Leaves(list(g), selected.p, list(t), [], rows, selected.index, selected.call)
        updates, _ = run(plan, own, columns)
        slots = [
            (
                *(_whole(columns[name][k]) for name in plan.slot_names),
                *(_as_slot(x, kept[name][k]) for name, x in plan.kept(rows[k]).items()),
            )
            for k in range(len(chosen))
        ]
        return updates, slots

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The extra values that are read inside."""
        return tuple(self.inner.plan.reads)

    @property
    def evaluates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner transformation evaluates with other weights."""
        return evaluates(self.inner)

    def converted(self, leaves: Leaves, to_eval: bool) -> list[Tensor]:
        """Return the parameters as the inner transformation evaluates them."""
        plan, count = self.inner.plan, len(self.own_slots)
        inside = [row[count:] for row in leaves.slots]
        columns = {name: [row[k] for row in inside] for k, name in enumerate(plan.slot_names)}
        number = len(plan.slot_names)
        rows = [
            {**row, **{n: read_number(s[number + k]) for k, n in enumerate(plan.counters)}}
            for row, s in zip(leaves.hyper, inside)
        ]
        return converted(plan, _with_rows(leaves, rows), columns, to_eval)


def _with_rows(leaves: Leaves, rows: list[dict[str, Any]]) -> Leaves:
    return Leaves(
        leaves.g, leaves.p, leaves.t, leaves.slots, rows, leaves.index, leaves.call, leaves.common
    )


def _whole(slot: Any) -> Any:
    return slot.made() if isinstance(slot, ChangedSlot) else slot


def _as_slot(value: Any, old: Tensor) -> Tensor:
    """Return a counter as it is kept."""
    return value.to(old.dtype) if isinstance(value, Tensor) else torch.full_like(old, value)


# When -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Calls(Comparable):
    """At which calls the inside steps, by their number from 0; counted once and remembered."""

    steps_at: Callable[[int], Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_done", [0])

    def done(self, calls: int) -> int:
        """Return how many steps have been taken after so many calls."""
        done: list[int] = self.__dict__["_done"]
        while len(done) <= calls:
            done.append(done[-1] + bool(self.steps_at(len(done) - 1)))
        return done[calls]

    def __getstate__(self) -> dict[str, Any]:
        return {"steps_at": self.steps_at}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "steps_at", state["steps_at"])
        object.__setattr__(self, "_done", [0])


@dataclasses.dataclass(frozen=True, eq=False)
class Every(Comparable):
    """A step at every so many calls: a number, or a function of the steps taken so far."""

    k: int | Callable[[int], int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", [0])

    def done(self, calls: int) -> int:
        """Return how many steps have been taken after so many calls."""
        if isinstance(self.k, int):
            return calls // self.k
        ends = self._ends_after(calls)
        return max(n for n, end in enumerate(ends) if end <= calls)

    def begin(self, steps: int) -> int:
        """Return how many calls so many steps have taken."""
        return steps * self.k if isinstance(self.k, int) else self.__dict__["_ends"][steps]

    def _ends_after(self, calls: int) -> list[int]:
        ends: list[int] = self.__dict__["_ends"]
        while ends[-1] <= calls:
            number = self.k(len(ends) - 1)  # pyright: ignore[reportCallIssue]
            if isinstance(number, Tensor):
                number = number.item()
            if int(number) != number or number < 1:
                raise ValueError(
                    f"every_k_schedule must return integers >= 1, but for step {len(ends) - 1} it "
                    f"returned {number!r}."
                )
            ends.append(ends[-1] + int(number))
        return ends

    def __getstate__(self) -> dict[str, Any]:
        return {"k": self.k}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "k", state["k"])
        object.__setattr__(self, "_ends", [0])


@dataclasses.dataclass(frozen=True, eq=False)
class Delayed(Comparable):
    """A schedule of the inside as one of the calls."""

    schedule: Callable[[Any], Any]
    calls: Calls | Every

    def __call__(self, count: Any) -> Any:
        """Return the value for the step that the inside takes next."""
        if isinstance(count, Tensor):
            count = int(count)
        return self.schedule(self.calls.done(count))


def delayed(value: Any, calls: Any) -> Any:
    """Return a hyperparameter whose schedules count the steps of the inside."""
    if isinstance(value, Tensor) or not hyper.has_schedule(value):
        return value
    return tree.tree_map(
        lambda x: Delayed(x, calls) if callable(x) and not isinstance(x, Tensor) else x,
        hyper.plain(value),
    )


def count_of(t: Any) -> int:
    """Return a step count as an ``int``."""
    return t if type(t) is int else int(t)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all entries of tensors are finite; read once, which waits for the device."""
    values = [g._values() if g.layout == torch.sparse_coo else g for g in tensors]
    flags = [whole(x.isfinite().all()) for x in values]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())
