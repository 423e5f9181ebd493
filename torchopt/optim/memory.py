"""Refuse tensors whose memory has been given back, which PyTorch reads without looking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.core.engine import Call
from torchopt.core.sparse_entries import ChangedSlot


#: Tensors that have an address; others (DTensor, FakeTensor) may have none, and are no error.
_ADDRESSED = {Tensor, torch.nn.Parameter, torch.nn.Buffer}


def refuse_released(call: Call) -> None:
    """Refuse a call in which a tensor has entries but no memory for them.

    ``x.untyped_storage().resize_(0)`` gives memory back, as sharding libraries do between uses; the
    tensor keeps its shape, and arithmetic with it crashes the process.

    Raises:
        RuntimeError: Naming the parameter.
    """
    columns = {"Parameter": call.p, "The gradient of": call.g}
    columns.update({f"The slot {name!r} of": column for name, column in call.slots.items()})
    for what, column in columns.items():
        for k in _released(column):
            name = tree.quoted(call.names()[k])
            raise RuntimeError(
                f"{what} {name} of shape {tuple(column[k].shape)} has no memory: its storage was "
                "resized to 0 bytes (untyped_storage().resize_). Give it its memory back before "
                "the step."
            )


def _released(column: Iterable[Any]) -> Iterable[int]:
    for k, x in enumerate(column):
        # the address first: it alone is asked of what has memory
        unaddressed = type(x) in _ADDRESSED and x.layout == torch.strided and not x.data_ptr()
        if unaddressed and x.numel() and not (x.is_meta or x._is_zerotensor()):
            yield k


def slots_to_keep(slots: Mapping[str, Any], index: int, lent: set[int]) -> dict[str, Any]:
    """Return the slots of a parameter; one with new entries is overwritten, unless it is lent."""
    kept = {name: column[index] for name, column in slots.items() if column[index] is not None}
    for name, slot in kept.items():
        if isinstance(slot, ChangedSlot):
            kept[name] = slot.made() if id(slot.old) in lent else slot.written()
    return kept


def apart(column: list[Any], params: list[Tensor], grads: list[Any]) -> list[Any]:
    """Return new slots with a copy where a rule keeps the parameter, or gradient, itself.

    It is about to be overwritten.
    """
    return [
        x.clone() if x is not None and (x is p or x is g) else x
        for x, p, g in zip(column, params, grads)
    ]


def slots_of(state: Mapping[Any, Any], params: Iterable[Tensor]) -> set[int]:
    """Return the identities of the tensors in an optimizer's state of parameters."""
    entries = [state.get(p, {}) for p in params]
    return {id(x) for entry in entries for x in entry.values() if isinstance(x, Tensor)}
