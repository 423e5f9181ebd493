"""The same transformation with other hyperparameters, or with slots in other dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from torchopt.base import misuse
from torchopt.base.values import same
from torchopt.core.slots import Slot, as_slot


if TYPE_CHECKING:
    from typing_extensions import Self

    from torchopt.core.hyper import HyperSpec


class Exchanging:
    """What of this every transformation can; wrappers do it for their inside."""

    if TYPE_CHECKING:  # what the transformation has
        declared: ClassVar[dict[str, HyperSpec]]
        slots: ClassVar[tuple[Slot, ...]]
        slot_dtypes: tuple[tuple[str, torch.dtype], ...]
        plan: Any
        hyper_specs: Any
        hyperparameters: Any

    def with_hyperparameters(self, values: Mapping[str, Any]) -> Self:
        """Return this transformation with other hyperparameters, by the names they have here.

        Args:
            values: Those to change, by the names of :meth:`hyperparameters`.

        Raises:
            TypeError: If there is none of a name, or a value is of the wrong kind.
            ValueError: If a value is out of bounds.

        Example:
            >>> import torchopt
            >>> tx = torchopt.chain(torchopt.trace(0.5), torchopt.trace(0.9))
            >>> tx.with_hyperparameters({"momentum_2": 0.8}).hyperparameters()["momentum_2"]
            0.8
        """
        for name in values:
            if name not in self.hyper_specs():
                raise TypeError(misuse.unknown_hyperparameter(name, self, list(self.hyper_specs())))
        if not values:
            return self
        found = self._exchanged(values)
        before, after = self.hyperparameters(), found.hyperparameters()
        for name, value in values.items():
            if after[name] is before[name] and not same(after[name], value):
                raise TypeError(
                    f"{name!r} of {type(self).__name__} cannot be exchanged: it is that of a "
                    "transformation inside, which a class of one's own exchanges in _exchanged."
                )
        return found

    def _exchanged(self, values: Mapping[str, Any]) -> Any:
        """Return the same with those of the values that are its hyperparameters."""
        own = {name: values[name] for name in self.declared if name in values}
        return dataclasses.replace(self, **own) if own else self  # pyright: ignore[reportArgumentType]

    def with_slot_dtypes(self, dtypes: Mapping[str, torch.dtype | None]) -> Self:
        """Return this transformation with slots that are kept in other dtypes, by their names here.

        The rule computes as ever, in the dtype of the parameters (float32 for half precision); what
        it returns for a slot is rounded when it is kept, and the next update begins from there. So
        bfloat16 halves the memory of a momentum. Derivatives are those of the rounding as torch
        has them: what flows back through a slot is rounded as well.

        Args:
            dtypes: Floating dtypes by the names of slots; ``None`` for that of the parameters.
                Complex parameters have no such slots.

        Raises:
            TypeError: If there is no slot of a name, it is a count, or a dtype is none.

        Example:
            >>> import torch, torchopt
            >>> tx = torchopt.nadam(lr=0.1).with_slot_dtypes({"exp_avg": torch.bfloat16})
            >>> state = tx.init([torch.ones(2)])
            >>> state.exp_avg[0].dtype, state.exp_avg_sq[0].dtype
            (torch.bfloat16, torch.float32)
        """
        if not dtypes:
            return self
        for name, dtype in dtypes.items():
            slot: Slot | None = self.plan.slot_of.get(name)
            if slot is None:
                raise TypeError(
                    f"{name!r} is no slot of {misuse.clipped(repr(self))}; those are "
                    f"{list(self.plan.slot_of)}."
                )
            if dtype is not None and not (
                isinstance(dtype, torch.dtype) and dtype.is_floating_point
            ):
                raise TypeError(
                    f"The dtype of the slot {name!r} must be a floating one such as "
                    f"torch.bfloat16, or None, got {misuse.short(dtype)}."
                )
        whole = self.plan.whole.keys() & dtypes.keys()
        found = self if whole else self._with_dtypes(dtypes)
        for name, dtype in dtypes.items():
            if found.plan.slot_of[name].dtype != dtype or name in whole:
                raise TypeError(f"The slot {name!r} cannot be kept in another dtype.")
        return found

    def _with_dtypes(self, dtypes: Mapping[str, torch.dtype | None]) -> Any:
        """Return the same with other dtypes of those slots that are its own."""
        own = {as_slot(slot).name for slot in self.slots}
        new = {**dict(self.slot_dtypes), **{n: d for n, d in dtypes.items() if n in own}}
        kept = tuple((name, dtype) for name, dtype in new.items() if dtype is not None)
        return dataclasses.replace(self, slot_dtypes=kept)  # pyright: ignore[reportArgumentType]

    def kept(self, slots: Sequence[Slot | str]) -> tuple[Slot, ...]:
        """Return slots as they are kept: in the dtypes of ``slot_dtypes``."""
        if not self.slot_dtypes:
            return tuple(map(as_slot, slots))
        dtypes = dict(self.slot_dtypes)
        return tuple(
            slot
            if slot.name not in dtypes or (slot.dtype is not None and not slot.is_narrow)
            else dataclasses.replace(slot, dtype=dtypes[slot.name])
            for slot in map(as_slot, slots)
        )
