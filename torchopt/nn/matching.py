"""Whether a state that is to be put back has the structure of what it is put into."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from torchopt.base import tree
from torchopt.core.opt_state import OptState


def check_places(path: tuple[Any, ...], target: Any, state: Any) -> None:
    """Refuse what leaves do not tell: empty places of optimizer states, and empty containers."""
    old, new = _places(target), _places(state)
    if old is None or new is None:
        if old is not new:
            _refuse_kind(tree.dotted(path), target, state)
        return
    if old.keys() != new.keys():
        paths, expected = ([(*path, key) for key in places] for places in (new, old))
        difference = tree.first_difference(paths, expected)
        raise ValueError(f"The state does not match: {difference}.")
    for key in old:
        check_places((*path, key), old[key], new[key])


def _places(value: Any) -> dict[Any, Any] | None:
    """Return what stands in a container that is written to; ``None`` of anything else."""
    if isinstance(value, OptState):
        return {**value.slots, **value.counters}
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else None


def _refuse_kind(name: str, old: Any, new: Any) -> NoReturn:
    kinds = f"{type(new).__name__} instead of {type(old).__name__}"
    raise ValueError(f"The state does not match at {tree.quoted(name)}: {kinds}.")


def check_shape(name: str, old: Any, new: Any) -> None:
    """Refuse a leaf of another shape, or something else than a tensor instead of one."""
    if isinstance(old, Tensor) != isinstance(new, Tensor):
        _refuse_kind(name, old, new)
    if isinstance(old, Tensor) and old.shape != new.shape:
        raise ValueError(
            f"The state does not match at {tree.quoted(name)}: shape {tuple(new.shape)} "
            f"instead of {tuple(old.shape)}."
        )
