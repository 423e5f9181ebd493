"""Apply a transformation to some of the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Union

import torch
from torch import Tensor
from torch.nn import Module

from torchopt.base import misuse, tree
from torchopt.core import hyper, resolving
from torchopt.core.engine import Call, Leaves, run
from torchopt.core.evaluation import converted, evaluates
from torchopt.core.gather import part_slots
from torchopt.core.pair import as_transformation
from torchopt.core.slots import Counter, Slot
from torchopt.core.transform import GradientTransformation, check_transformation, transformation
from torchopt.typing import PyTree, Step


@transformation
class Masked(GradientTransformation):
    """Apply ``inner`` where ``mask`` is true; see :func:`masked`."""

    inner: GradientTransformation
    mask: Union[PyTree, Callable[[PyTree], PyTree]]

    @property
    def uses_step(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner transformation reads the step count."""
        return self.inner.plan.uses_step

    @property
    def slots(self) -> tuple[Slot, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The slots of the inner transformation, all optional: the mask may select no parameter."""
        return self.inner.plan.renamed_slots(optional=True)

    @property
    def counters(self) -> tuple[Counter, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The counters of the inner transformation."""
        return self.inner.plan.renamed_counters()

    def count(self, t: Step, *args: Any, **values: Any) -> dict[str, Any]:
        """Return the counters of the inner transformation for an update."""
        plan = self.inner.plan
        return plan.kept(plan.count(values, t, values))

    def hyper_specs(self) -> dict[str, hyper.HyperSpec]:
        """Return the hyperparameters of the inner transformation."""
        return self.inner.hyper_specs()

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters of the inner transformation."""
        return self.inner.hyperparameters()

    def whole_slots(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Return those of the inner transformation, under this mask as well."""
        return {
            name: (pair, (self._mask_leaves, *masks))
            for name, (pair, masks) in self.inner.plan.whole.items()
        }

    def renewed(self) -> GradientTransformation:
        """Return the same with such slots of its own."""
        return dataclasses.replace(self, inner=self.inner.renewed())

    def _mask_leaves(self, call: Call) -> list[bool]:
        return mask_leaves(self.mask, call)

    def __post_init__(self) -> None:
        check_transformation(self.inner, "masked")

    def with_accelerated_op(self, use_accelerated_op: bool | None) -> GradientTransformation:
        """Return the same with another setting of the fused kernels inside."""
        inner = self.inner.with_accelerated_op(use_accelerated_op)
        return dataclasses.replace(self, inner=inner)

    def _exchanged(self, values: Mapping[str, Any]) -> GradientTransformation:
        return dataclasses.replace(self, inner=self.inner.with_hyperparameters(values))

    def _with_dtypes(self, dtypes: Mapping[str, torch.dtype | None]) -> GradientTransformation:
        return dataclasses.replace(self, inner=self.inner.with_slot_dtypes(dtypes))

    def takes_sparse(self, **hyperparameters: Any) -> bool:
        """Whether all rules inside are right for sparse gradients."""
        plan = self.inner.plan
        rows = [plan.rows_of(k, [hyperparameters])[0] for k in range(len(plan.parts))]
        return all(part.takes_sparse(**row) for part, row in zip(plan.parts, rows))

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
        """Return the selected parameters as the inner transformation evaluates them."""
        selected, chosen = self._select(leaves)
        params = list(leaves.p)
        names = self.slot_names()
        columns = {name: [row[k] for row in selected.slots] for k, name in enumerate(names)}
        found = converted(self.inner.plan, selected, columns, to_eval) if chosen else []
        for position, p in zip(chosen, found):
            params[position] = p
        return params

    def init_all_slots(self, leaves: Leaves) -> list[tuple[Any, ...]]:
        """Return the inner transformation's slots where the mask is true, else ``None``."""
        selected, chosen = self._select(leaves)
        result: list[tuple[Any, ...]] = [(None,) * len(self.slot_names()) for _ in leaves.index]
        rows: list[list[Any]] = [[] for _ in chosen]
        for position, part in enumerate(self.inner.plan.parts):
            own = dataclasses.replace(
                selected, hyper=self.inner.plan.rows_of(position, selected.hyper)
            )
            for row, values in zip(rows, part_slots(part, own)):
                row.extend(values)
        for position, row in zip(chosen, rows):
            result[position] = tuple(row)
        return result

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """Run the inner transformation on the selected parameters; others pass unchanged."""
        selected, chosen = self._select(leaves)
        updates, slots = list(leaves.g), list(leaves.slots)
        if not chosen:
            return updates, slots
        names = self.slot_names()
        columns = {name: [row[k] for row in selected.slots] for k, name in enumerate(names)}
        results, _ = run(self.inner.plan, selected, columns)
        for k, position in enumerate(chosen):
            updates[position] = results[k]
            slots[position] = tuple(columns[name][k] for name in names)
        return updates, slots

    def _select(self, leaves: Leaves) -> tuple[Leaves, list[int]]:
        mask = mask_leaves(self.mask, leaves.call)
        chosen = [k for k, i in enumerate(leaves.index) if mask[i]]
        return leaves.subset(chosen), chosen


def mask_leaves(mask: Any, call: Call) -> list[bool]:
    """Return the mask as one bool per parameter.

    Raises:
        TypeError: If an entry is not a bool.
        ValueError: If the mask does not match the parameters.
    """
    if callable(mask) and not isinstance(mask, Module):
        mask = mask(call.reference)
    values = (
        [mask] * len(call.g)
        if isinstance(mask, bool)
        else resolving.match_by_name("mask", mask, call.names(), call.known)
    )
    for name, value in zip(call.names(), values):
        if not isinstance(value, bool):
            raise TypeError(
                f"The mask of {tree.quoted(name)} must be True or False, got "
                f"{misuse.short(value)}. A mask is True or False, a dict of them by name, or a "
                "function of the parameters."
            )
    return values


def masked(
    inner: GradientTransformation, mask: Union[PyTree, Callable[[PyTree], PyTree]]
) -> GradientTransformation:
    """Apply a transformation to some parameters; gradients of the others pass unchanged.

    Args:
        inner: The transformation.
        mask: A tree of bools with the structure of the parameters, or with one bool for a whole
            sub-tree (``{"body": True, "head": False}``), or a function from the parameters to such
            a tree. In the other two APIs the parameters are a list (``torchopt.Optimizer``) or a
            dict keyed by parameter name (``torchopt.MetaOptimizer``).

    Raises:
        ValueError: If the mask does not match the parameters (at the first ``init``).
        TypeError: If ``inner`` is no transformation or an entry of the mask is not a bool.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.masked(torchopt.scale(0.5), {"w": False, "b": True})
        >>> g = {"w": torch.ones(1), "b": torch.ones(1)}
        >>> tx.update(g, tx.init(g))[0]
        {'w': tensor([1.]), 'b': tensor([0.5000])}
    """
    inner = as_transformation(inner)
    return Masked(inner.renewed() if isinstance(inner, GradientTransformation) else inner, mask)
