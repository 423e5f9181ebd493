"""Read and set what has a name, wherever it stands in a state or a transformation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from torchopt.base import misuse
from torchopt.base.values import same
from torchopt.core.opt_state import OptState


Path = tuple[str, ...]
Filtering = Callable[[Path, Any], bool]


def _children(node: Any) -> list[tuple[str, Any]]:
    """Return what a node holds, by name; nothing for a leaf."""
    if isinstance(node, OptState):
        return [("step", node.step), *node.slots.items(), *node.counters.items()]
    if isinstance(node, Mapping):
        return [(str(key), value) for key, value in node.items()]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node))  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(node, (list, tuple)):
        return [(str(number), value) for number, value in enumerate(node)]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node) if f.init]
    groups = getattr(node, "param_groups", None)
    if isinstance(groups, list):
        owners = {} if not isinstance(node, torch.optim.Optimizer) else node.state
        state = [entry for entry in owners.values() if isinstance(entry, Mapping)]
        hyperparameters = [{k: v for k, v in g.items() if k != "params"} for g in groups]
        return [("param_groups", hyperparameters), ("state", state)]
    return []


def _rebuilt(node: Any, new: dict[str, Any]) -> Any:
    """Return a node with some of what it holds exchanged."""
    if isinstance(node, OptState):
        slots = {name: new.get(name, value) for name, value in node.slots.items()}
        counters = {name: new.get(name, value) for name, value in node.counters.items()}
        return OptState(new.get("step", node.step), slots, counters)
    if isinstance(node, Mapping):
        copied: Any = copy.copy(node)  # also of a dict with a default
        copied.update({key: new[str(key)] for key in node if str(key) in new})
        return copied
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return node._replace(**new)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(node, (list, tuple)):
        return type(node)(new.get(str(number), value) for number, value in enumerate(node))
    return dataclasses.replace(node, **new)


def _is_called(name: str, key: str) -> bool:
    """Whether a name is the key, or ``"label.key"``."""
    return name == key or name.endswith(f".{key}")


def _found(
    node: Any, key: str, filtering: Filtering | None, path: Path
) -> Iterator[tuple[Path, Any]]:
    for name, value in _children(node):
        here = (*path, name)
        if _is_called(name, key) and (filtering is None or filtering(here, value)):
            yield here, value
        yield from _found(value, key, filtering, here)


def tree_get_all_with_path(
    tree: Any, key: str, filtering: Filtering | None = None
) -> list[tuple[Path, Any]]:
    """Return everything of a given name, and where it is; see :func:`tree_get`.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.chain(torchopt.trace(0.5), torchopt.trace(0.9))
        >>> for path, value in torchopt.tree_get_all_with_path(tx, "momentum"):
        ...     print(path, value)
        ('transformations', '0', 'momentum') 0.5
        ('transformations', '1', 'momentum') 0.9
    """
    return list(_found(tree, key, filtering, ()))


def tree_get(tree: Any, key: str, default: Any = None, filtering: Filtering | None = None) -> Any:
    """Return the hyperparameter, slot or counter of a given name, wherever it is.

    Args:
        tree: A state (of any face: an ``OptState``, what ``state_dict()`` gave, an optimizer), a
            transformation, or any tree of those.
        key: The name. ``"momentum"`` is also that of ``"label.momentum"``.
        default: What to return if there is none.
        filtering: A function of the path, a tuple of names, and the value, that says what counts.

    Raises:
        KeyError: If there are several, with different values.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam(lr=0.1))
        >>> torchopt.tree_get(tx, "lr")
        0.1
        >>> state = tx.init([torch.ones(2)])
        >>> torchopt.tree_get(state, "exp_avg"), torchopt.tree_get(state, "none", default=3)
        ([tensor([0., 0.])], 3)
    """
    found = tree_get_all_with_path(tree, key, filtering)
    if not found:
        return default
    if any(not _same(value, found[0][1]) for _, value in found[1:]):
        places = [".".join(path) for path, _ in found]
        raise KeyError(
            f"There are {len(found)} values called {key!r}: {misuse.some(places)}. Say which by "
            "filtering=lambda path, value: ..., or take tree_get_all_with_path."
        )
    return found[0][1]


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or same(a, b)
    except (TypeError, ValueError, RuntimeError):  # no comparison: not known to be the same
        return False


def tree_set(tree: Any, filtering: Filtering | None = None, /, **values: Any) -> Any:
    """Return the same with other hyperparameters, slots or counters, set by name.

    What was given stays as it is. A hyperparameter of a transformation is checked as always; of a
    state, only what :func:`torchopt.inject_hyperparams` keeps there can be set.

    Args:
        tree: As for :func:`tree_get`, but for an optimizer: its ``param_groups`` are set directly.
        filtering: As there; by position.
        **values: What to set; all of that name become it.

    Raises:
        KeyError: If there is nothing of a name.
        TypeError: If ``tree`` is an optimizer.

    Example:
        >>> import torchopt
        >>> tx = torchopt.chain(torchopt.trace(0.5), torchopt.scale(-0.1))
        >>> torchopt.tree_set(tx, momentum=0.9)
        chain(Trace(momentum=0.9, dampening=0.0, nesterov=False), Scale(step_size=-0.1))
    """
    if isinstance(getattr(tree, "param_groups", None), list):
        name = next(iter(values), "lr")
        raise TypeError(
            f"tree_set returns a new state, and an optimizer is no state: write "
            f"optimizer.param_groups[0][{name!r}] = ..., or set it in optimizer.state_dict()."
        )
    for key, value in values.items():
        new, number = _set(tree, key, value, filtering, ())
        if not number:
            raise KeyError(f"There is nothing called {key!r} in {misuse.clipped(repr(tree))}.")
        tree = new
    return tree


def _set(
    node: Any, key: str, value: Any, filtering: Filtering | None, path: Path
) -> tuple[Any, int]:
    changed: dict[str, Any] = {}
    total = 0
    for name, old in _children(node):
        here = (*path, name)
        if _is_called(name, key) and (filtering is None or filtering(here, old)):
            changed[name], number = value, 1
        else:
            new, number = _set(old, key, value, filtering, here)
            if number:
                changed[name] = new
        total += number
    return (_rebuilt(node, changed), total) if changed else (node, 0)
