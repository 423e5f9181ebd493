"""Which parameters may share a node of the graph: those that a backward pass cannot tell apart.

By the rules each parameter has nodes of its own, and a backward pass visits what lies behind those
that the loss depends on: only that is computed, and only that is freed. A node that several
parameters share leads to what lies behind any of them. That makes no difference

* where nothing lies behind them that can be freed (first-order steps from leaves); or
* where behind each of them lies a node that all of them lead to, and that fails when it is visited
  for the second time: then backward passes through one of them after the other fail by the rules
  too. So it is in a network whose parameters all have a part in one loss.

The parameters are divided accordingly. The usual answer, that all may share a node, is found at the
node of the step before, or at the derivative of the loss, a few nodes away.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from torchopt.base.torch_internals import top_saved_tensors_hooks


class Part(NamedTuple):
    """Parameters that may share a node.

    Attributes:
        rows: Which ones.
        bare: Whether nothing that can be freed lies behind them.
    """

    rows: list[int]
    bare: bool


#: How many nodes are looked at, and how many more for each parameter. What has not been found out
#: by then is kept apart, which is always right.
NODES, NODES_EACH = 4000, 100

_OPAQUE, _FREED, _CLEAR, _LEAF = "opaque", "freed", "clear", "leaf"
_STEP, _BARE_STEP = "step", "bare step"
_kinds: dict[type, str] = {}
_hooks_of = attrgetter("_backward_hooks")


def named(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Give new tensors nodes of their own behind the one that they have, and return them.

    The conjugate of a real number, in place, is nothing to compute, neither forward nor backward. A
    copy would take a pass over memory, and an alias would be a view, which can be neither detached
    nor changed in place.
    """
    return list(map(Tensor.conj_physical_, tensors))


_NAME = type(torch.ones(1, requires_grad=True).clone().conj_physical_().grad_fn)


def is_name(node: Any) -> bool:
    """Whether a node is one that :func:`named` gave."""
    return type(node) is _NAME


def divide(columns: Sequence[Sequence[Tensor]], flat: Sequence[Tensor], count: int) -> list[Part]:
    """Divide parameters by what lies behind them in the graph.

    Args:
        columns: Lists of one tensor for each parameter.
        flat: Tensors of all parameters.
        count: How many parameters there are.
    """
    together = Part(list(range(count)), False)
    hooks = [any(map(_hooks_of, column)) for column in columns]
    if not any(hooks) and any(_is_step(x.grad_fn) for x in flat):
        return [together]
    if not any(hooks) and _known_ways(columns, count):
        return [together]
    everyone = (1 << count) - 1
    behind: dict[Any, int] = {x.grad_fn: everyone for x in flat if x.grad_fn is not None}
    for column in columns:
        for k, node in enumerate([x.grad_fn for x in column]):
            if node is not None:
                behind[node] = behind.get(node, 0) | 1 << k
    hooked: dict[Any, int] = {}
    for column in (column for column, there in zip(columns, hooks) if there):
        for k, x in enumerate(column):
            if x._backward_hooks and x.requires_grad:
                node: Any = get_gradient_edge(x).node
                hooked[node] = behind[node] = behind.get(node, 0) | 1 << k
    if not behind:
        return _apart_for_hooks([Part(together.rows, True)])
    if hooked:
        return _apart_for_hooks(_Search(behind, hooked, everyone, count).parts())
    if _same_step(behind, everyone):
        return [together]
    search = _Search(behind, hooked, everyone, count)
    parts = search.parts()
    if search.common is not None:
        _remember_ways(columns, count, search.common)
    return _apart_for_hooks(parts)


def _apart_for_hooks(parts: list[Part]) -> list[Part]:
    """Divide further where hooks want to see what is saved: that of a bare part is kept by hand."""
    if top_saved_tensors_hooks is None or top_saved_tensors_hooks(False) is None:
        return parts
    return [
        Part(own, bare) for rows, bare in parts for own in ([[k] for k in rows] if bare else [rows])
    ]


def _is_step(node: Any) -> bool:
    """Whether a node is that of an earlier step, and can be freed or leads to what can."""
    return isinstance(node, BackwardCFunction) and getattr(node, "bare", None) is False


def _same_step(behind: dict[Any, int], everyone: int) -> bool:
    """Whether one earlier step lies behind everyone."""
    found: dict[Any, int] = {}
    for node, rows in behind.items():
        source: Any = node.next_functions[0][0] if is_name(node) else node  # pyright: ignore[reportOptionalMemberAccess]
        if isinstance(source, BackwardCFunction):
            found[source] = found.get(source, 0) | rows
    return any(rows == everyone and _is_step(source) for source, rows in found.items())


# The way to a common node, to be followed again ---------------------------------------------------

#: A row's tensor as (column, row), the inputs to follow from its node, and the position among all
#: nodes of such ways, in order, of the node where it must end; -1 for the first way.
_Way = tuple[int, int, tuple[int, ...], int]
_ways: dict[Any, list[_Way]] = {}
WAYS = 64


def _key_of_ways(columns: Sequence[Sequence[Tensor]], count: int) -> Any:
    return count, len(columns), *(type(column[0].grad_fn) for column in columns)


def _known_ways(columns: Sequence[Sequence[Tensor]], count: int) -> bool:
    """Whether the ways of a graph like this one lead to a common node that can be freed."""
    nodes: list[Any] = []
    for column, row, inputs, end in _ways.get(_key_of_ways(columns, count), ()):
        node: Any = columns[column][row].grad_fn
        for k in inputs:
            if node is None:
                return False
            nodes.append(node)
            following = node.next_functions
            node = following[k][0] if k < len(following) else None
        if end >= 0:
            if node is not nodes[end]:
                return False
            continue
        if node is None or _kinds.get(type(node)) != _FREED:
            return False
        nodes.append(node)
    return bool(nodes)


def _remember_ways(columns: Sequence[Sequence[Tensor]], count: int, common: Any) -> None:
    """Note how each parameter leads to the common node."""
    ways: list[_Way] = []
    position: dict[Any, int] = {}
    total = 0
    for row in range(count):
        ends = position or {common: -1}
        found = ((k, _way(tensors[row].grad_fn, ends)) for k, tensors in enumerate(columns))
        column, way = next(((k, way) for k, way in found if way is not None), (0, None))
        if way is None:
            return
        nodes, inputs, last = way
        ways.append((column, row, tuple(inputs), position.get(last, -1)))
        for node in nodes:
            position.setdefault(node, total)
            total += 1
        if not position or last not in position:
            position[last] = total
            total += 1
    if len(_ways) >= WAYS:
        _ways.clear()
    _ways[_key_of_ways(columns, count)] = ways


def _way(start: Any, ends: dict[Any, int]) -> tuple[list[Any], list[int], Any] | None:
    """Return the nodes from one to another before its end, the inputs to follow, and the end."""
    came: dict[Any, tuple[Any, int] | None] = {start: None}
    queue = [] if start is None else [start]
    for node in queue:  # grows while it is read
        if node in ends:
            nodes, inputs, last = [], [], node
            while (before := came[node]) is not None:
                node, k = before
                nodes.append(node)
                inputs.append(k)
            return nodes[::-1], inputs[::-1], last
        if getattr(node, "bare", None) is None:
            for k, (following, _) in enumerate(node.next_functions):
                if following is not None and following not in came:
                    came[following] = node, k
                    queue.append(following)
    return None


class _Search:
    """A walk from the youngest node to the oldest; nodes know the parameters that lead to them."""

    def __init__(
        self, behind: dict[Any, int], hooked: dict[Any, int], everyone: int, count: int
    ) -> None:
        self.behind, self.hooked, self.everyone, self.count = behind, hooked, everyone, count
        self.freed: dict[Any, int] = {}
        self.opaque: dict[Any, int] = {}
        self.common: Any = None  # what lies behind everyone and can be freed, but for a step

    def parts(self) -> list[Part]:
        """Return how the parameters are divided."""
        finished = self._walk()
        if finished is None:
            return [Part(list(range(self.count)), False)]
        rest = self.everyone
        parts: list[Part] = []
        if finished:
            bare = rest
            for rows in (*self.freed.values(), *self.opaque.values()):
                bare &= ~rows
            if bare:
                parts.append(Part(_rows(bare), True))
            rest &= ~bare
        for shared in sorted(set(self.freed.values()), key=int.bit_count, reverse=True):
            if shared & rest:
                parts += [Part(rows, False) for rows in self._alike(_rows(shared & rest))]
                rest &= ~shared
        return [*parts, *(Part([k], False) for k in _rows(rest))]

    def _alike(self, rows: list[int]) -> list[list[int]]:
        """Divide parameters by the opaque nodes that they lead to."""
        kinds: dict[tuple[bool, ...], list[int]] = {}
        for k in rows:
            leads = tuple(bool(others >> k & 1) for others in self.opaque.values())
            kinds.setdefault(leads, []).append(k)
        return list(kinds.values())

    def _walk(self) -> bool | None:
        """Return whether everything has been seen; ``None`` if all may share a node."""
        left = NODES + NODES_EACH * self.count
        heap = [(-node._sequence_nr(), k, node) for k, node in enumerate(self.behind)]
        heapify(heap)
        order = len(heap)  # tells nodes of one age apart
        behind, done = self.behind, {}
        while heap:
            node = heappop(heap)[2]
            rows = behind[node]
            if done.get(node) == rows:
                continue
            done[node] = rows
            left -= 1
            if left < 0:
                return False
            kind = _kinds.get(type(node)) or _kind(node)
            if kind == _LEAF:
                kind = _OPAQUE if node.variable._backward_hooks else _CLEAR  # they would get None
            if kind == _OPAQUE or node in self.hooked:
                self.opaque[node] = rows
            elif kind in (_FREED, _STEP):
                self.freed[node] = rows
                if rows == self.everyone and not self.hooked:
                    self.common = node if kind == _FREED else None
                    return None
            if kind in (_STEP, _BARE_STEP):
                continue  # it knows what lies behind it
            for following, _ in node.next_functions:
                known = behind.get(following, 0)
                if following is not None and known | rows != known:
                    behind[following] = known | rows
                    order += 1
                    heappush(heap, (-following._sequence_nr(), order, following))
        return True


def _kind(node: Any) -> str:
    """Return what a backward pass does to a node: frees what it has saved, nothing, or unknown."""
    operation = type(node)
    if isinstance(node, BackwardCFunction):
        bare = getattr(node, "bare", None)
        return _OPAQUE if bare is None else _BARE_STEP if bare else _STEP
    if operation.__name__ == "CppFunction":  # torch does not tell what it is
        kind = _OPAQUE
    elif operation.__name__ == "AccumulateGrad":
        kind = _LEAF
    else:
        freed = any(name.startswith("_raw_saved") for name in dir(operation))
        kind = _FREED if freed else _CLEAR
    _kinds[operation] = kind  # as many as torch has operations
    return kind


def _rows(bits: int) -> list[int]:
    return [k for k in range(bits.bit_length()) if bits >> k & 1]
