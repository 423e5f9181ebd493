"""Names of tensors, in every form in which users hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torchopt.base import tree
from torchopt.core.opt_state import OptState
from torchopt.nn.parameters import named_places
from torchopt.nn.snapshot import HoldsState, ModuleState


_FORMS = (
    "a module, a meta-optimizer, what extract_state_dict returned, a dict of names and tensors, "
    "pairs (name, tensor) such as net.named_parameters(), or a list of these"
)


def named_tensors(params: Any) -> list[tuple[str, Tensor]]:
    """Return the names of tensors in the order given; a tensor may have several.

    Args:
        params: ``None``; a module; a meta-optimizer (its state and those of its hyperparameters
            that are tensors); what :func:`torchopt.extract_state_dict` returned (with
            ``enable_visual=True`` the names carry ``visual_prefix``); a dict of names and tensors,
            nested as you like, or of tensors and names; pairs ``(name, tensor)``, from a generator
            too; or an iterable of all these.

    Raises:
        TypeError: If something else is found, naming it.
    """
    found: list[tuple[str, Tensor]] = []
    if params is not None:
        _collect(params, "", found)
    return found


def _collect(given: Any, prefix: str, found: list[tuple[str, Tensor]]) -> None:
    visual = getattr(given, "visual_contents", None)
    if visual is not None:
        _collect(visual, prefix, found)
    elif isinstance(given, nn.Module):
        for kind in ("_parameters", "_buffers"):
            found += [(prefix + name, t) for name, _, _, t in named_places(given, kind)]
    elif isinstance(given, ModuleState):
        for tensors in (given.params, given.buffers or {}):
            found += [(prefix + name, t) for name, t in tensors.items()]
    elif isinstance(given, OptState):
        _collect(given.slots, prefix, found)
    elif isinstance(given, HoldsState):
        _collect_optimizer(given, prefix, found)
    elif isinstance(given, Mapping):
        for key, value in given.items():
            _collect_entry(key, value, prefix, found)
    elif isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str):
        _collect_entry(given[0], given[1], prefix, found)
    elif isinstance(given, Iterable) and not isinstance(given, (str, Tensor)):
        for item in given:
            if isinstance(item, Tensor):
                raise TypeError(
                    f"params has a tensor of shape {tuple(item.shape)} without a name. Give "
                    f"{_FORMS}."
                )
            _collect(item, prefix, found)
    else:
        raise TypeError(f"params must be {_FORMS}; it has {_shown(given)}.")


def _collect_entry(key: Any, value: Any, prefix: str, found: list[tuple[str, Tensor]]) -> None:
    if isinstance(key, Tensor) and isinstance(value, str):  # names by tensor
        found.append((prefix + value, key))
    elif isinstance(value, Tensor):
        found.append((f"{prefix}{key}", value))
    elif isinstance(value, (Mapping, nn.Module, OptState, HoldsState, ModuleState)):
        _collect(value, f"{prefix}{key}.", found)
    elif isinstance(value, (list, tuple)):
        for name, leaf in zip(tree.leaf_names(value), tree.flatten(value)[0]):
            if isinstance(leaf, Tensor):
                found.append((f"{prefix}{key}.{name}", leaf))
    elif value is not None:
        raise TypeError(
            f"params must be {_FORMS}; under {key!r} it has {_shown(value)} instead of a tensor."
        )


def _collect_optimizer(optimizer: HoldsState, prefix: str, found: list[tuple[str, Tensor]]) -> None:
    groups = getattr(optimizer, "param_groups", [])
    for position, state in enumerate(optimizer.extract_state()):
        own = prefix if len(groups) < 2 else f"{prefix}{position}."
        _collect(state, own, found)
        for name, value in groups[position].items() if position < len(groups) else ():
            if isinstance(value, Tensor):
                found.append((own + name, value))
            elif isinstance(value, Mapping):
                tensors = {key: x for key, x in value.items() if isinstance(x, Tensor)}
                _collect(tensors, f"{own}{name}.", found)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} of type {type(value).__name__}"
