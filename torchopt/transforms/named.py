"""A chain whose parts have names, which their hyperparameters and slots bear."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.core import hyper
from torchopt.core.chaining import chain
from torchopt.core.engine import Leaves, run
from torchopt.core.evaluation import converted, evaluates
from torchopt.core.gather import part_slots
from torchopt.core.pair import as_transformation
from torchopt.core.slots import Counter, Slot
from torchopt.core.transform import GradientTransformation, check_transformation, transformation
from torchopt.typing import Step


class Delegating(GradientTransformation):
    """A transformation that is another one, its field ``inner``, under other names."""

    inner: GradientTransformation

    def __post_init__(self) -> None:
        misuse.check_decorated(self)

    def public(self, name: str) -> str:
        """Return the name here of what is ``name`` inside."""
        return name

    def _public(self, own: Any) -> dict[str, Any]:
        return {self.public(name): value for name, value in own.items()}

    def _rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the hyperparameters by the inside's names; one object stays one object."""
        names = [*self.inner.hyper_specs(), *self.inner.plan.counters]
        found: dict[int, dict[str, Any]] = {}
        for row in rows:
            if id(row) not in found:
                found[id(row)] = {name: row[self.public(name)] for name in names}
        return [found[id(row)] for row in rows]

    def _inside(self, leaves: Leaves) -> Leaves:
        rows = self._rows(leaves.hyper)
        return Leaves(
            *(leaves.g, leaves.p, leaves.t, leaves.slots, rows, leaves.index, leaves.call),
            common=leaves.common,
        )

    def _columns(self, leaves: Leaves) -> dict[str, list[Any]]:
        names = self.inner.plan.slot_names
        return {name: [row[k] for row in leaves.slots] for k, name in enumerate(names)}

    @property
    def uses_step(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner transformation reads the step count."""
        return self.inner.plan.uses_step

    @property
    def slots(self) -> tuple[Slot, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The slots of the inner transformation."""
        slots = self._public(self.inner.plan.slot_of)
        return tuple(dataclasses.replace(slot, name=name) for name, slot in slots.items())

    @property
    def counters(self) -> tuple[Counter, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The counters of the inner transformation."""
        counters = self._public(self.inner.plan.counters)
        return tuple(dataclasses.replace(c, name=name) for name, c in counters.items())

    def count(self, t: Step, *args: Any, **values: Any) -> dict[str, Any]:
        """Return the counters of the inner transformation for an update."""
        plan, (row,) = self.inner.plan, self._rows([values])
        return self._public(plan.kept(plan.count(row, t, row)))

    def hyper_specs(self) -> dict[str, hyper.HyperSpec]:
        """Return the hyperparameters of the inner transformation."""
        return self._public(self.inner.hyper_specs())

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters of the inner transformation."""
        return self._public(self.inner.hyperparameters())

    def whole_slots(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Return those of the inner transformation."""
        return self._public(self.inner.plan.whole)

    def renewed(self) -> GradientTransformation:
        """Return the same with such slots of its own."""
        return dataclasses.replace(self, inner=self.inner.renewed())

    def with_accelerated_op(self, use_accelerated_op: bool | None) -> GradientTransformation:
        """Return the same with another setting of the fused kernels inside."""
        inner = self.inner.with_accelerated_op(use_accelerated_op)
        return dataclasses.replace(self, inner=inner)

    def _exchanged(self, values: Mapping[str, Any]) -> GradientTransformation:
        names = {name: self.public(name) for name in self.inner.hyper_specs()}
        own = {name: values[public] for name, public in names.items() if public in values}
        return dataclasses.replace(self, inner=self.inner.with_hyperparameters(own))

    def _with_dtypes(self, dtypes: Mapping[str, torch.dtype | None]) -> GradientTransformation:
        names = {name: self.public(name) for name in self.inner.plan.slot_names}
        own = {name: dtypes[public] for name, public in names.items() if public in dtypes}
        return dataclasses.replace(self, inner=self.inner.with_slot_dtypes(own))

    def takes_sparse(self, **hyperparameters: Any) -> bool:
        """Whether all rules inside are right for sparse gradients."""
        plan, (row,) = self.inner.plan, self._rows([hyperparameters])
        rows = [plan.rows_of(k, [row])[0] for k in range(len(plan.parts))]
        return all(part.takes_sparse(**own) for part, own in zip(plan.parts, rows))

    @property
    def accepts_complex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all rules inside are right for complex numbers."""
        return all(part.accepts_complex for part in self.inner.parts)

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
        inside, columns = self._inside(leaves), self._columns(leaves)
        return converted(self.inner.plan, inside, columns, to_eval)

    def init_all_slots(self, leaves: Leaves) -> list[tuple[Any, ...]]:
        """Return the first slots of the inner transformation."""
        plan, inside = self.inner.plan, self._inside(leaves)
        rows: list[list[Any]] = [[] for _ in leaves.p]
        for position, part in enumerate(plan.parts):
            own = dataclasses.replace(inside, hyper=plan.rows_of(position, inside.hyper))
            for row, values in zip(rows, part_slots(part, own)):
                row.extend(values)
        return [tuple(row) for row in rows]

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """Run the inner transformation."""
        columns = self._columns(leaves)
        updates, _ = run(self.inner.plan, self._inside(leaves), columns)
        return updates, list(zip(*columns.values())) if columns else leaves.slots


@transformation
class Named(Delegating):
    """Call what is of ``inner`` by ``"name.of"``; see :func:`named_chain`."""

    name: str
    inner: GradientTransformation

    def public(self, name: str) -> str:
        """Return the name here of what is ``name`` inside."""
        return f"{self.name}.{name}"


def named_chain(*transformations: tuple[str, GradientTransformation]) -> GradientTransformation:
    """Apply transformations one after the other, each with a name.

    Like :func:`torchopt.chain`, except that the names of hyperparameters, slots and counters
    include that of their part, ``"adam.exp_avg"``, as in :func:`torchopt.partition`. A scheduler of
    ``torch.optim``, which only knows ``"lr"``, does not reach them.

    Args:
        *transformations: Pairs of a name and a transformation; the names differ.

    Raises:
        TypeError: If an argument is no such pair.
        ValueError: If two names are the same.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.named_chain(("fast", torchopt.trace(0.5)), ("slow", torchopt.trace(0.9)))
        >>> tx.hyperparameters()["slow.momentum"]
        0.9
        >>> state = tx.init([torch.ones(1)])
        >>> list(state.slots)
        ['fast.momentum_buffer', 'slow.momentum_buffer']
    """
    parts = []
    for given in transformations:
        pair = isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str)
        if not pair:
            raise TypeError(
                "named_chain expects pairs of a name and a transformation, such as "
                f'("adam", torchopt.scale_by_adam()), got {misuse.short(given)}.'
            )
        inner = as_transformation(given[1])
        check_transformation(inner, f"named_chain, for {given[0]!r},")
        parts.append(Named(given[0], inner.renewed()))
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise ValueError(f"The names of a named_chain must differ, got {names}.")
    return chain(*parts)
