"""Fused updates inside of ``torch.compile`` and other tracers, as operators.

With ``use_accelerated_op=True`` the parts that require kernels are computed by the operators of
``operators.py``; everything else is compiled as it stands. This file is loaded when a tracer first
asks for it: importing the compiler takes a second.

The compiler's frontend reads :func:`take_whole` and :func:`take_segment`, which hand over to
:func:`_operate`. That is not read, but run, on fake tensors and numbers that stand for any number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.base.numerics import HALF
from torchopt.base.torch_compiler import (
    FakeTensor,
    FunctionalTensor,
    allow_in_graph,
    nonstrict_trace,
)
from torchopt.core.engine import Call, Leaves, run_by_rules
from torchopt.core.plan import Plan
from torchopt.kernels import fused
from torchopt.kernels.assignment import PLAIN, assign
from torchopt.kernels.backends import cpu as native
from torchopt.kernels.differentiable import Group
from torchopt.kernels.generate.written import write
from torchopt.kernels.library import operators as operators  # registers them
from torchopt.kernels.matching import Segment, segments_from


#: What tracers substitute for plain tensors.
TRACED = PLAIN | {FakeTensor, FunctionalTensor}

_SYMBOLIC = (torch.SymInt, torch.SymFloat)


# What the compiler reads --------------------------------------------------------------------------


def take_whole(
    plan: Plan, leaves: Leaves, columns: dict[str, Any], apply: bool
) -> list[Tensor] | None:
    """Compute a plan all of whose parts require kernels; ``None`` if that cannot be."""
    for part in plan.parts:
        if not part.use_accelerated_op:
            return None
    for x in leaves.g:
        if x.dtype not in native.DTYPES:
            return None
    return _take(plan, 0, len(plan.parts), leaves, columns, apply)


def take_segment(
    plan: Plan, first: int, leaves: Leaves, columns: dict[str, Any], apply: bool
) -> fused.Result | None:
    """Compute the parts from ``first`` that require kernels; ``None`` if the first does not."""
    last = first
    while last < len(plan.parts) and plan.parts[last].use_accelerated_op:
        last += 1
    if last == first:
        return None
    applies = apply and last == len(plan.parts)
    return fused.Result(last, _take(plan, first, last, leaves, columns, applies), applies)


def _take(
    plan: Plan, first: int, last: int, leaves: Leaves, columns: dict[str, Any], apply: bool
) -> list[Tensor]:
    if tree.compiler_is_old():
        _refuse_old(leaves.g[0], _TOO_OLD)
    every_name = leaves.call.names()
    names = [every_name[i] for i in leaves.index]
    rows: list[dict[str, Any]] = []
    row_of_each = []
    previous, each = None, tree.compiler_is_old()
    for k, row in enumerate(leaves.hyper):
        if each or row is not previous:
            rows.append(_checked_row(plan, first, last, row, leaves.name(k)))
            previous = row
        row_of_each.append(len(rows) - 1)
    for k, t in enumerate(leaves.t):
        if isinstance(t, Tensor):
            part = plan.parts[first]
            reason = (
                "the step count is a tensor (the state has been taken apart, and "
                "OptState(int(state.step), state.slots) makes it a number again)"
            )
            raise RuntimeError(fused.refusal(part, leaves.name(k), reason))
    given = {"p": leaves.p}
    for slots in plan.slots[first:last]:
        for name in slots:
            given[f"slot {name}"] = columns[name]
    tensors = {"g": list(leaves.g)}
    places = {}
    for name, column in given.items():
        tensors[name] = [x for x in column if x is not None]
        places[name] = [k for k, x in enumerate(column) if x is not None]
    results, new, refusals = _operate(
        plan, (first, last, apply), names, tensors, places, list(leaves.t), rows, row_of_each
    )
    for refusal in refusals:
        raise RuntimeError(refusal)
    for name, changed in new.items():
        column = list(columns[name])
        for k, x in changed:
            column[k] = x
        columns[name] = column
    return results


def _checked_row(
    plan: Plan, first: int, last: int, row: dict[str, Any], name: str
) -> dict[str, Any]:
    """Return the hyperparameters of some parts, which must be numbers."""
    own = {}
    for part, fields in zip(plan.parts[first:last], plan.fields[first:last]):
        for public in fields.values():
            own[public] = value = row[public]
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, Tensor):
                    reason = f"the hyperparameter {public} is a tensor"
                    advice = misuse.without_number(public)
                    raise RuntimeError(fused.refusal(part, name, reason, advice))
    return own


_TOO_OLD = (
    "use_accelerated_op=True requires a fused kernel, which torch.compile can take from torch 2.13 "
    f"on; this is torch {torch.__version__}. Pass None to compile the rules."
)


@allow_in_graph
def _refuse_old(_: Tensor, message: str) -> None:
    """Raise; what the compiler's frontend of these versions raises itself loses its message."""
    raise RuntimeError(message)


# What it runs -------------------------------------------------------------------------------------


class _RefusedError(Exception):
    """Parts that require kernels cannot have them; the message is the user's."""


def _run_operators(
    *given: Any,
) -> tuple[list[Tensor], dict[str, list[tuple[int, Tensor]]], dict[str, list[Any]]]:
    """Return what :func:`_computed` does and, as a key, why nothing was computed.

    An exception would lose its message in the compiler.
    """
    try:
        results, new = _computed(*given)
    except _RefusedError as error:
        return [], {}, {str(error): []}
    return results, new, {}


def _computed(
    plan: Plan,
    extent: tuple[int, int, bool],
    names: list[str],
    tensors: dict[str, list[Tensor]],
    places: dict[str, list[int]],
    steps: list[Any],
    rows: list[dict[str, Any]],
    row_of_each: list[int],
) -> tuple[list[Tensor], dict[str, list[tuple[int, Tensor]]]]:
    """Compute parts of a plan by operators.

    Args:
        plan: The transformation.
        extent: The first part, the end of the parts, and whether to add to the parameters.
        names: The names of the parameters.
        tensors: ``"g"``, ``"p"`` and ``"slot ..."``: those tensors that there are.
        places: The parameters that they belong to.
        steps: The step counts.
        rows: Different rows of hyperparameters.
        row_of_each: Which of them each parameter has.

    Returns:
        The updates or new parameters, and the new slots with the position of their parameter.
    """
    first, last, apply = extent
    count = len(names)
    columns: dict[str, list[Any]] = {}
    for name, there in places.items():
        column: list[Any] = [None] * count
        for k, x in zip(there, tensors[name]):
            column[k] = x
        columns[name.removeprefix("slot ")] = column
    params = columns.pop("p")
    known = [_known(row) for row in rows]
    call = Call([], [], [], {}, [], lambda: names, None)
    leaves = Leaves(
        tensors["g"],
        params,
        [_hint(t) for t in steps],
        [],
        [known[row] for row in row_of_each],
        list(range(count)),
        call,
    )
    before = {name: list(column) for name, column in columns.items()}
    exact = [rows[row] for row in row_of_each], steps
    while first < last:
        ends = apply and last == len(plan.parts)
        first, g = _run_longest(plan, first, last, leaves, exact, columns, ends)
        leaves = dataclasses.replace(leaves, g=g)
    return leaves.g, {
        name: [(k, x) for k, x in enumerate(column) if x is not before[name][k]]
        for name, column in columns.items()
    }


# other tracers call it as it is, and compilers that are too old have been refused
_operate: Any = _run_operators if nonstrict_trace is None else nonstrict_trace(_run_operators)


def _run_longest(
    plan: Plan,
    first: int,
    last: int,
    leaves: Leaves,
    exact: tuple[list[dict[str, Any]], list[Any]],
    columns: dict[str, Any],
    apply: bool,
) -> tuple[int, list[Tensor]]:
    """Compute the longest segment that has kernels; return where it ends, and the updates."""
    reason = fused.unsupported_reason(by_tracers=False)
    unfit = dict.fromkeys(range(len(leaves.g)), reason or "it is not elementwise")
    for segment in [] if reason else segments_from(plan, first):
        if segment.last > last:
            continue
        applies = apply and segment.last == len(plan.parts)
        groups, unfit = assign(segment, leaves, columns, applies, TRACED)
        if not groups:
            continue
        halves = [k for k, x in enumerate(leaves.g) if x.dtype in HALF]
        if not unfit and segment.last < last and halves:
            reason = "its parts have no kernel together, which half precision needs"
            unfit = dict.fromkeys(halves, reason)
        if not unfit:
            groups = [(there, _exact(segment, group, there, *exact)) for there, group in groups]
            return segment.last, fused.compute(
                segment, leaves, columns, groups, {}, applies, _call_operator
            )
        break
    try:
        fused.answer_for(Segment(plan, first, first + 1), leaves, unfit)
    except RuntimeError as error:
        raise _RefusedError(str(error)) from error
    # somebody asks why; nothing is refused then
    return first + 1, run_by_rules(plan, first, first + 1, leaves, columns)


def _exact(
    segment: Segment,
    group: Group,
    positions: Sequence[int],
    rows: Sequence[Any],
    steps: Sequence[Any],
) -> Group:
    """Return a group with the numbers it has been called with, instead of examples of them.

    The compiler remembers the comparisons made here: what it compiles holds while they come out
    the same.
    """
    firsts: dict[int, int] = {}
    for position, index in zip(positions, group.indices or [0] * len(positions)):
        first = firsts.setdefault(index, position)
        if not bool(steps[first] == steps[position]):
            raise AssertionError("the examples were equal")
    values = [(_values(segment, rows[k]), steps[k]) for k in firsts.values()]
    for row, step in values:
        compare, outcome = group.program.conditions
        if tuple(map(bool, compare(row, step))) != outcome:
            raise AssertionError("the guards hold for the examples")
    return dataclasses.replace(group, values=values)


def _values(segment: Segment, row: dict[str, Any]) -> list[Any]:
    """Return the numbers of a row in the order of :meth:`Segment.read`."""
    values: list[Any] = []
    for name in segment.public:
        value = row[name]
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, bool):
                values.append(number if isinstance(number, _SYMBOLIC) else float(number))
    return values


def _call_operator(group: Group, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Compute a group by the operator."""
    values = [number for row, _ in group.values for number in row]
    live = None
    if any(isinstance(number, _SYMBOLIC) for number in values):
        # a number that is not known reaches an operator in a tensor only; times 1 it is itself
        one = torch.ones((), dtype=torch.float64)
        values, live = [], torch.stack([one * number for number in values])
    steps = [step for _, step in group.values]
    text = write(group.kernel)
    return torch.ops.torchopt.update(list(tensors), text, values, live, steps, group.indices)


def _known(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(map(_hint, value)) if isinstance(value, tuple) else _hint(value)
        for name, value in row.items()
    }


def _hint(number: Any) -> Any:
    """Return an example of a number that is not known while tracing."""
    if not isinstance(number, _SYMBOLIC):
        return number
    hint = number.node.hint
    if hint is None:
        raise _RefusedError(
            "use_accelerated_op=True requires a fused kernel, but a hyperparameter or the step "
            "count depends on the contents of a tensor. Pass None to use kernels where they are "
            "available."
        )
    return hint
