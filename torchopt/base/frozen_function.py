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
    it, those of the functions that these hold, and the global ones that it names itself. What these
    values *contain* is not copied.
    """
    return _copy(function, {}, outermost=True)


def _copy(function: Any, made: dict[int, Any], outermost: bool = False) -> Any:
    if isinstance(function, functools.partial):
        held = _copy(function.func, made, outermost)
        return functools.partial(held, *function.args, **function.keywords)
    if not isinstance(function, types.FunctionType) or hasattr(function, _COMPILED):
        return function
    cells = function.__closure__
    if cells is None and not outermost:
        return function
    if id(function) in made:
        return made[id(function)]
    known = function.__globals__
    names = names_of(function.__code__) if outermost else ()
    held = {name: known[name] for name in names if name in known}
    scope = {**known, **held} if held else known
    closure = None if cells is None else tuple(types.CellType() for _ in cells)
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, closure
    )
    made[id(function)] = copy  # a function may call itself
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    for new, old in zip(closure or (), cells or ()):
        try:
            new.cell_contents = _copy(old.cell_contents, made)
        except ValueError:  # a variable that has no value yet
            continue
    return copy


#: What torch.compile marks its functions with, which know their code by where it is.
_COMPILED = "_torchdynamo_orig_callable"


def names_of(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code, and functions made in it, may read as global ones."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_of(constant)
