"""A function as it is now, though the variables that it reads get other values later."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any


def frozen(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that reads the present values of its variables.

    ``lambda: loss(net(x), y)`` reads ``x`` and ``y`` when it is called: in a loop over batches, and
    called again after it, those of the last batch. This holds the variables of the functions around
    it, and the global ones that it names itself. What these values *contain* is not copied.
    """
    if isinstance(function, functools.partial):
        return functools.partial(frozen(function.func), *function.args, **function.keywords)
    if not isinstance(function, types.FunctionType):
        return function
    cells = function.__closure__
    closure = None if cells is None else tuple(map(_copied, cells))
    known = function.__globals__
    held = {name: known[name] for name in names_of(function.__code__) if name in known}
    scope = {**known, **held} if held else known
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def names_of(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code, and functions made in it, may read as global ones."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_of(constant)


def _copied(cell: Any) -> Any:
    try:
        return types.CellType(cell.cell_contents)
    except ValueError:  # a variable that has no value yet
        return cell
