"""What a step reads without being given it: tensors of closures, found by watching one step."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchopt.base.torch_internals import (
    AccumulateGrad,
    disabled_torch_function,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
)
from torchopt.diff.replay.writes import Writes, bare, written


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors among arguments of a call."""
    found: list[Tensor] = []
    _gather(value, found)
    return found


def _gather(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _gather(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _gather(item, found)


def depth() -> int:
    """Return how many levels of torch.func are open."""
    return len(get_interpreter_stack() or ())


def may_have_derivative(value: Tensor) -> bool:
    """Whether anything may be differentiating by a tensor: a graph, or a level of torch.func."""
    while is_functorch_wrapped_tensor(value):
        if is_gradtrackingtensor(value):
            return True
        value = get_unwrapped(value)
    return value.requires_grad


def has_rules(tensor: Tensor) -> bool:
    """Whether a tensor answers operations itself: a symbol, whose values nobody can ask for."""
    rule: Any = type(tensor).__torch_function__
    return rule is not disabled_torch_function and getattr(rule, "__func__", None) is not _PLAIN


_PLAIN: Any = Tensor.__torch_function__.__func__  # pyright: ignore[reportFunctionMemberAccess]


def newest_node() -> int:
    """Return the number of a node that is made now, of this thread."""
    with torch.enable_grad():
        node: Any = torch.zeros((), requires_grad=True).view(()).grad_fn
    return node._sequence_nr()


def is_older(tensor: Tensor, number: int) -> bool:
    """Whether a tensor is no result, or one of a node that is older than another."""
    node: Any = tensor.grad_fn
    return node is None or node._sequence_nr() < number


def uncompiled() -> Any:
    """Return the context in which what has been compiled runs as it was written.

    The compiler would compile in what watches, which torch 2.13 reads wrongly and 2.6 fails at; or
    it would not trace such a function, and never try again: the step would be a plain one ever
    after, without a word.
    """
    # to import the compiler takes a second, and where it is absent nothing has been compiled
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


class Seeing(TorchFunctionMode):
    """A mode that sees all operations of a step, those of a compiled one too."""

    def __enter__(self) -> Any:
        self._uncompiled = uncompiled()
        self._uncompiled.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._uncompiled.__exit__(*error)


class Watch(Seeing):
    """Notes which tensors the operations of a step read that none of them has made.

    Only what a hand-written ``autograd.Function`` is given directly stays unseen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()
        self.read: dict[int, Tensor] = {}
        self.versions: dict[int, int] = {}
        self.writes = Writes()
        self.calls = 0  # of autograd, at the level of the step itself
        self.depth = depth()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note what one call reads and makes."""
        if getattr(func, "__name__", "") == "__get__":  # shape and the like read no numbers
            result = func(*args)
            if not isinstance(result, Tensor):
                return result
        valued = _valued(func, args)
        for tensor in tensors_in((args, kwargs or {})):
            if id(tensor) in self.made or has_rules(tensor):
                continue
            self.read.setdefault(id(tensor), tensor)
            read = valued is None or id(tensor) in valued
            if read and id(tensor) not in self.versions:
                self.versions[id(tensor)] = _version(tensor)
        if targets := written(func, args, kwargs or {}):
            self.writes.before(tensors_in(targets), self.read.values())
        if func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            self.calls += depth() == self.depth
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if id(tensor) not in self.read:
                self.made.add(id(tensor))
        return result

    def changed(self) -> list[Tensor]:
        """Return the tensors that were read first and have been changed in place since."""
        silently = set(map(id, self.writes.changed()))
        return [
            t
            for key, t in self.read.items()
            if key in silently or _version(t) != self.versions.get(key, _version(t))
        ]


#: Methods and functions that read no values of their arguments ...
_NO_VALUES = frozenset(
    {
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "__len__"),
        *("is_floating_point", "is_complex", "is_contiguous", "element_size", "get_device"),
        *("new_zeros", "new_ones", "new_empty", "zeros_like", "ones_like", "empty_like"),
        *("rand_like", "randn_like", "is_same_size", "__repr__", "is_neg", "is_conj"),
    }
)
#: ... and those that read values of the first one only.
_FIRST_VALUES = frozenset({"view_as", "expand_as", "reshape_as", "type_as", "to"})


def _valued(func: Any, args: tuple[Any, ...]) -> set[int] | None:
    """Return the arguments of a call whose values it may read; ``None`` for all."""
    name = getattr(func, "__name__", "")
    if name in _NO_VALUES:
        return set()
    return {id(t) for t in tensors_in(args[:1])} if name in _FIRST_VALUES else None


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Substituted(Seeing):
    """Lets the operations of a step read other tensors instead of some.

    ``refuse`` is called with any other, that is not ``known`` from the first step, of which
    ``differs`` says that it has a derivative.
    """

    def __init__(
        self,
        old: Iterable[Tensor],
        new: Iterable[Tensor],
        known: Iterable[Tensor] = (),
        refuse: Callable[[Tensor], None] | None = None,
        differs: Callable[[Tensor], bool] = may_have_derivative,
    ) -> None:
        super().__init__()
        self.new = {id(tensor): other for tensor, other in zip(old, new)}
        self.known: dict[int, Tensor] = {}
        self.refuse, self.differs = refuse, differs
        if refuse is not None:
            self.known = {id(t): t for t in known}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operation with the other tensors."""
        reads = True
        if getattr(func, "__name__", "") == "__get__":  # shape and the like read no numbers
            reads = isinstance(func(*args), Tensor)
        if self.refuse is None or not reads:
            return func(*self._swap(args), **self._swap(kwargs or {}))
        for tensor in tensors_in((args, kwargs or {})):
            known = id(tensor) in self.new or id(tensor) in self.known
            if not known and self.differs(tensor):
                self.refuse(tensor)
        result = func(*self._swap(args), **self._swap(kwargs or {}))
        self.known.update({id(t): t for t in tensors_in(result) if self.differs(t)})
        return result

    def _swap(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.new.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(self._swap(item) for item in value)
        if type(value) is dict:
            return {key: self._swap(item) for key, item in value.items()}
        return value


def requires_grad(tensor: Tensor) -> bool:
    """Whether a tensor that belongs to no level of torch.func requires grad."""
    return not is_functorch_wrapped_tensor(tensor) and tensor.requires_grad


# The graph of one step ---------------------------------------------------------------------------


def reached(
    outputs: Iterable[Tensor],
    given: Iterable[Tensor],
    outside: Iterable[Tensor],
    start: int = 0,
) -> tuple[list[Tensor], bool]:
    """Return the tensors from outside that a graph goes back to.

    The walk ends at tensors of ``given`` and ``outside``, and at leaves. The second result is
    whether it went by a node that is older than ``start``, or to a leaf that is not known: by way
    of a tensor from outside that is not known.
    """
    ends = {_edge(t): t for t in (*outside, *given) if t.grad_fn is not None}
    inside = {id(t) for t in given}
    known = {*inside, *map(id, outside)}
    found: dict[int, Tensor] = {id(t): t for t in outputs if t.grad_fn is None and t.requires_grad}
    edges: list[tuple[Any, int]] = [_edge(t) for t in outputs if t.grad_fn is not None]
    seen: set[Any] = set()
    alone = False
    while edges:
        edge = edges.pop()
        node = edge[0]
        if node is None:
            continue
        if edge in ends:
            tensor = ends[edge]
            found[id(tensor)] = tensor
        elif node not in seen:
            seen.add(node)
            if type(node) is AccumulateGrad:
                found[id(node.variable)] = node.variable
                alone |= id(node.variable) not in known
            else:
                alone |= start > 0 and node._sequence_nr() < start
                edges += node.next_functions
    return [tensor for key, tensor in found.items() if key not in inside], alone


def _edge(tensor: Tensor) -> tuple[Any, int]:
    return tensor.grad_fn, tensor.output_nr


def saved_behind(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors that the graph behind some tensors has saved."""
    nodes = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        names = [name for name in dir(node) if name.startswith("_saved_")]
        saved = [getattr(node, name) for name in names]
        for tensor in tensors_in([*saved, getattr(node, "saved_tensors", ())]):
            yield bare(tensor)
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                nodes.append(after)


#: How far the graph behind tensors from outside is looked at.
FARTHEST = 20_000


def depends(tensors: list[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return two of these tensors of which the first was computed from the second.

    Where the graph behind them is too large to tell, it may have been.
    """
    return None if len(tensors) < 2 else computed_from(tensors, tensors, FARTHEST)


def computed_from(
    tensors: Iterable[Tensor],
    sources: Sequence[Tensor],
    farthest: int | None = None,
    before: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Return one of these tensors that was computed from a source, and that source.

    After ``farthest`` nodes a tensor counts as computed from any other. ``before`` is the number
    of a node: what newer ones have computed from a source itself does not count.
    """
    ends = {_edge(t): t for t in sources if t.grad_fn is not None}
    leaves = {id(t) for t in sources if t.grad_fn is None}
    # what is older than all sources was not computed from them
    oldest = 0 if leaves or not ends else min(node._sequence_nr() for node, _ in ends)
    seen: set[Any] = set()
    for tensor in tensors:
        nodes: list[Any] = [] if tensor.grad_fn is None else [tensor.grad_fn]
        while nodes:
            node = nodes.pop()
            counts = before is None or node._sequence_nr() < before
            for after, index in node.next_functions:
                if after is None:
                    continue
                if (after, index) in ends:
                    if counts:
                        return tensor, ends[after, index]
                    continue
                if id(getattr(after, "variable", None)) in leaves and counts:
                    return tensor, after.variable
                if after not in seen and after._sequence_nr() >= oldest:
                    seen.add(after)
                    nodes.append(after)
            if farthest is not None and len(seen) > farthest:
                return tensor, next(t for t in sources if t is not tensor)
    return None
