"""Sparse gradients by the rule of one entry: what the gradient has no entry of stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.typing import Step


class ChangedSlot:
    """A slot some entries of which are new, for an API that may overwrite the old one.

    A new tensor would cost a copy of all, where a gradient may have one row in a thousand.
    """

    def __init__(self, old: Tensor, place: tuple[Tensor, ...], entries: Tensor) -> None:
        self.old, self.place, self.entries = old, place, entries

    def made(self) -> Tensor:
        """Return a new tensor; differentiable."""
        return self.old.index_put(self.place, self.entries)

    def written(self) -> Tensor:
        """Overwrite the old one, and return it; once more changes nothing."""
        if any(step == 0 for step in self.old.stride()):
            return self.made()  # expanded: several entries are one
        return self.old.index_put_(self.place, self.entries)


def of_entries(
    rule: Callable[..., Any],
    g: Tensor,
    p: Tensor | None,
    t: Step,
    slots: tuple[Tensor | None, ...],
    hyperparameters: dict[str, Any],
    overwrites: bool,
) -> tuple[Tensor, tuple[Any, ...]]:
    """Apply a pointwise rule to the entries that a sparse gradient has.

    Args:
        rule: The rule, for dense tensors.
        g: The gradient; entries that it has several times are summed.
        p: The parameter.
        t: The step count.
        slots: The slots, dense.
        hyperparameters: Numbers and tensors; those with a value for each entry are taken apart.
        overwrites: Whether new slots are returned as :class:`ChangedSlot`.

    Returns:
        A sparse update, and the slots.
    """
    g = g.coalesce()
    indices = g.indices()
    place = tuple(indices.unbind(0))
    own = {name: _entries_of(value, g, place) for name, value in hyperparameters.items()}
    few = tuple(None if s is None else s[place] for s in slots)
    u, new = rule(g.values(), None if p is None else p[place], t, few, **own)
    changed = [
        x if s is None or x is None else ChangedSlot(s, place, x.to(s.dtype))
        for s, x in zip(slots, new)
    ]
    if not overwrites:
        changed = [x.made() if isinstance(x, ChangedSlot) else x for x in changed]
    # as the indices of the gradient are
    options: Any = {"is_coalesced": True, "check_invariants": False}
    return torch.sparse_coo_tensor(indices, u, g.shape, **options), tuple(changed)


def _entries_of(value: Any, g: Tensor, place: tuple[Tensor, ...]) -> Any:
    if isinstance(value, tuple):
        return tuple(_entries_of(x, g, place) for x in value)
    return value.expand(g.shape)[place] if isinstance(value, Tensor) and value.dim() else value
