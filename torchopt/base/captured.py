"""The tensors that a function uses without being given them, and the function with others instead.

A derivative of its own (an ``autograd.Function``) has to be told of every tensor that it depends
on; what a function closes over is invisible to it, and its derivative would be missing without a
word. So tensors are looked for wherever Python keeps what a function uses: cells, defaults,
globals that its code names, ``partial``, the object of a bound method, modules, and plain
containers. Functions are rebuilt around other values, nothing is changed in place. What the methods
of a class use besides their object is not seen, nor is a graph that exists already:
:func:`leaves_of` helps to find what was missed.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn


#: What holds no tensor.
_PLAIN = (int, float, complex, str, bytes, type(None), type, types.ModuleType)
#: Code of these packages uses only what it is given.
_FOREIGN = frozenset({"torch", "optree", "numpy", "scipy", "builtins", "functools", "math"})


class Captured:
    """The tensors that a function, or all functions of a container, use without being given them.

    Attributes:
        values: Each once, in the order they are met.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.values: list[Tensor] = []
        self._places: dict[int, int] = {}
        self._alive: dict[int, Any] = {}  # so that no id is given twice
        parents: dict[int, list[int]] = {}
        waiting: list[Any] = [function]
        while waiting:
            thing = waiting.pop()
            if id(thing) in self._alive:
                continue
            self._alive[id(thing)] = thing
            if isinstance(thing, Tensor):
                self._places[id(thing)] = len(self.values)
                self.values.append(thing)
                continue
            for child in _children(thing):
                if type(child) in weakref.ProxyTypes or isinstance(child, _PLAIN):
                    continue
                parents.setdefault(id(child), []).append(id(thing))
                waiting.append(child)
        self._rebuilt = set(self._places)  # what leads to a tensor
        waiting = list(self._places)
        while waiting:
            new = set(parents.get(waiting.pop(), ())) - self._rebuilt
            self._rebuilt |= new
            waiting.extend(new)

    @property
    def things(self) -> list[Any]:
        """All that was looked at."""
        return list(self._alive.values())

    def with_values(self, values: Sequence[Tensor]) -> Any:
        """Return the function around other tensors, given in the order of ``values``."""
        return _Rebuilding(self, values).of(self.function)


def _children(thing: Any) -> Iterator[Any]:
    """Yield what a function, an object or a container uses."""
    if isinstance(thing, types.FunctionType):
        yield from _cells(thing).values()  # torch.func.grad(f) has f in one
        if not _is_foreign(thing):
            yield from _globals_of(thing).values()
            yield from thing.__defaults__ or ()
            yield from (thing.__kwdefaults__ or {}).values()
    elif isinstance(thing, types.MethodType):
        yield thing.__self__
        yield thing.__func__
    elif isinstance(thing, functools.partial):
        yield thing.func
        yield from thing.args
        yield from thing.keywords.values()
    elif isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, (list, tuple)):
        yield from thing
    elif _is_plain_object(thing):
        yield from vars(thing).values()


def _is_foreign(thing: Any) -> bool:
    if isinstance(thing, types.FunctionType):
        # where its code stands: functools.wraps sets __module__, and exec may leave none
        home = thing.__globals__.get("__name__") or ""
    else:
        home = getattr(thing, "__module__", None) or "builtins"
    return home.partition(".")[0] in _FOREIGN


def _is_plain_object(thing: Any) -> bool:
    """Whether something is an object whose attributes may be tensors."""
    if isinstance(thing, nn.Module):
        return True
    kinds = (type, types.ModuleType)
    return (
        hasattr(thing, "__dict__") and not isinstance(thing, kinds) and not _is_foreign(type(thing))
    )


def _cells(function: types.FunctionType) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    return found


def _names(code: types.CodeType) -> set[str]:
    """Return the names that code and the functions in it look up."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*inner)


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    scope = function.__globals__
    return {name: scope[name] for name in sorted(_names(function.__code__)) if name in scope}


class _Rebuilding:
    """Rebuilds things around other tensors, each once, so that what was shared stays shared."""

    def __init__(self, captured: Captured, values: Sequence[Tensor]) -> None:
        self.captured, self.values = captured, values
        self.made: dict[int, Any] = {}

    def of(self, thing: Any) -> Any:
        """Return a rebuilt thing, or itself where it leads to no tensor."""
        captured, key = self.captured, id(thing)
        if key in captured._places:
            return self.values[captured._places[key]]
        if key not in captured._rebuilt:
            return thing
        if key not in self.made:
            self.made[key] = thing  # what stands in a circle that no rule below breaks
            self.made[key] = self._build(thing)
        return self.made[key]

    def _build(self, thing: Any) -> Any:
        if isinstance(thing, types.FunctionType):
            return self._function(thing)
        if isinstance(thing, types.MethodType):
            return types.MethodType(self.of(thing.__func__), self.of(thing.__self__))
        if isinstance(thing, functools.partial):
            keywords = {key: self.of(value) for key, value in thing.keywords.items()}
            return functools.partial(self.of(thing.func), *map(self.of, thing.args), **keywords)
        if isinstance(thing, dict):
            new = copy.copy(thing)
            for key, value in thing.items():
                new[key] = self.of(value)
            return new
        if isinstance(thing, list):
            new = copy.copy(thing)
            new[:] = map(self.of, thing)
            return new
        if isinstance(thing, tuple):
            items = map(self.of, thing)
            return type(thing)(*items) if hasattr(thing, "_fields") else type(thing)(items)
        return self._object(thing)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        code = function.__code__
        cells = tuple(types.CellType() for _ in code.co_freevars)
        used = {} if _is_foreign(function) else _globals_of(function)
        changed = any(id(value) in self.captured._rebuilt for value in used.values())
        scope = dict(function.__globals__) if changed else function.__globals__
        new = types.FunctionType(code, scope, function.__name__, None, cells)
        self.made[id(function)] = new  # a function may call itself
        contents = _cells(function)
        for name, cell in zip(code.co_freevars, cells):
            if name in contents:
                cell.cell_contents = self.of(contents[name])
        if changed:
            scope.update({name: self.of(value) for name, value in used.items()})
        new.__defaults__ = function.__defaults__ and tuple(map(self.of, function.__defaults__))
        keywords = function.__kwdefaults__
        new.__kwdefaults__ = keywords and {key: self.of(x) for key, x in keywords.items()}
        new.__dict__.update(function.__dict__)
        return new

    def _object(self, thing: Any) -> Any:
        new = object.__new__(type(thing))
        self.made[id(thing)] = new
        vars(new).update({name: self.of(value) for name, value in vars(thing).items()})
        return new


def leaves_of(result: Tensor, known: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves of a result's graph that are none of those known."""
    seen: set[Any] = {id(x) for x in known}
    if result.grad_fn is None:
        return [result] if result.requires_grad and id(result) not in seen else []
    found: list[Tensor] = []
    waiting: list[Any] = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in seen:
            found.append(leaf)
        waiting.extend(following for following, _ in node.next_functions)
    return found


def stray_leaf(result: Tensor, known: Sequence[Tensor]) -> Tensor | None:
    """Return a leaf of a result's graph that is none of those known, or ``None``."""
    return next(iter(leaves_of(result, known)), None)
