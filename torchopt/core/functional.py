"""The functional API's side of the engine: trees become the flat lists of one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.base.numerics import exact
from torchopt.base.recording import refuse_recorded
from torchopt.core import hyper, step_count, whole
from torchopt.core.engine import Call, advance
from torchopt.core.evaluation import converted_call
from torchopt.core.gather import Members, gather
from torchopt.core.opt_state import OptState
from torchopt.core.protocols import TransformationLike
from torchopt.core.slots import PARAM
from torchopt.core.state_parts import EmptyState, joined
from torchopt.typing import PyTree, Step, TensorTree


def gather_tree(
    tx: TransformationLike,
    reference: PyTree,
    grads: list[Any] | None,
    params: list[Any] | None,
    steps: list[Step],
    slots: dict[str, list[Any]],
    counters: Mapping[str, Sequence[Any]] | None = None,
    extra: dict[str, Any] | None = None,
    mask_tree: PyTree = None,
    uniform: bool = False,
) -> Call:
    """Gather the update of a tree.

    ``reference`` has the order of the lists; ``mask_tree`` is what a mask given as a function sees;
    ``counters`` are those before this update, or those of a start, and ``uniform`` says whether
    they and the steps are the same for all parameters.
    """
    names = lambda: tree.leaf_names(reference)  # noqa: E731
    absent = [None] * len(steps)
    like = reference if mask_tree is None else mask_tree
    g, p = grads or absent, params or absent
    call = Call(g, p, steps, slots, [], names, like, extra or {})
    if counters is None:
        counters = {name: [c.start] * len(steps) for name, c in tx.plan.counters.items()}
    leaves = params if params is not None else grads
    plan, count = tx.plan, 0  # at which a schedule is evaluated: 0 at the first update
    if steps:
        count = steps[0] - 1 if isinstance(steps[0], Tensor) else max(steps) - 1
    members = Members(plan.values, leaves or [], names, count, row=plan.row)
    return gather(tx, [members], call, counters, uniform=uniform)


def state_slots(
    tx: TransformationLike, state: object, grads: PyTree, spec: Any
) -> dict[str, list[Any]]:
    """Return the slots of a state as lists aligned with the gradients.

    Raises:
        TypeError: If ``state`` is no optimizer state.
        ValueError: If it is that of another transformation or of other parameters.
    """
    if not isinstance(state, OptState):
        raise TypeError(misuse.no_state(state))
    plan = tx.plan
    plan.check_slots([*state.slots, *state.counters], tx)
    absent = [name for name in plan.whole if name not in state.slots]
    if absent:
        raise ValueError(f"The state belongs to another optimizer: it lacks {absent} of {tx}.")
    return {
        name: tree.flatten_like(
            state.slots[name], grads, spec, f"The slot {name!r} of the state", "grads"
        )
        if name in state.slots and name not in plan.whole
        else [None] * spec.num_leaves
        for name in plan.slot_names
    }


class _Counts(NamedTuple):
    """Step counts: one for all parameters, or a list aligned with the gradients."""

    before: Any
    now: list[Any]  # always of each
    after: Any


def _counts(
    state: OptState, grads: PyTree, spec: Any, g: Sequence[Any], p: Sequence[Any] | None
) -> _Counts:
    """Return the step counts before this update, at it, and to remember.

    What is remembered is one number while all parameters agree.
    """
    old: Any = state.step
    if isinstance(old, Tensor):
        old = step_count.read(old)
        if isinstance(old, Tensor):
            return _Counts(old, [exact(old) + 1] * len(g), old + 1)
    if isinstance(old, int):
        previous, now = [old] * len(g), [old + 1] * len(g)
    else:
        counts = tree.flatten_like(old, grads, spec, "The steps of the state", "grads")
        old = previous = [step_count.read(count) for count in counts]
        now = [step + 1 for step in previous]
    after = [before if x is None else step for before, step, x in zip(previous, now, g)]
    # a place in the tree that has no parameter has no count to disagree with
    own = after if p is None else [n for n, x in zip(after, p) if x is not None] or after
    if not own:
        return _Counts(old, now, old + 1 if isinstance(old, int) else old)
    known = not any(isinstance(n, Tensor) for n in own)  # of a batch nothing can be known
    return _Counts(old, now, own[0] if known and all(n == own[0] for n in own) else after)


def _counters(state: OptState, grads: PyTree, spec: Any) -> dict[str, list[Any]]:
    """Return the other counters so far, aligned with the gradients."""
    columns: dict[str, list[Any]] = {}
    for name, value in state.counters.items():
        if torch.compiler.is_compiling():  # a number that a graph returns is a constant of it
            value = step_count.as_tensor(value)
        if isinstance(value, (int, float, Tensor)):
            columns[name] = [step_count.read_number(value)] * spec.num_leaves
        else:
            given = tree.flatten_like(value, grads, spec, f"The {name} of the state", "grads")
            columns[name] = [step_count.read_number(x) for x in given]
    return columns


def _next_counters(
    call: Call, old: dict[str, list[Any]], kept_at: Mapping[str, str], uniform: bool
) -> dict[str, Any]:
    """Return the counters to remember: one number while all parameters agree."""
    found: dict[str, Any] = {}
    compiling = torch.compiler.is_compiling()
    if compiling and old:  # what has been counted once is the same: numbers are not to be compared
        uniform = uniform and not tree.compiler_is_old()
        uniform = uniform and all(row is call.hyper[0] for row in call.hyper)
        uniform = uniform and all(g is not None or p is None for g, p in zip(call.g, call.p))
    for name, column in old.items():
        at = kept_at[name]
        new = [x if g is None else row[at] for x, g, row in zip(column, call.g, call.hyper)]
        own = [x for x, p, g in zip(new, call.p, call.g) if p is not None or g is not None] or new
        first = own[0] if own else 0.0
        if compiling:
            one = uniform
        else:
            numbers = all(type(x) is float for x in own)
            one = all(x is first or (numbers and x == first) for x in own)
        found[name] = first if one else new
        if compiling:  # a number that does not come from the old one: it would be a constant
            found[name] = step_count.as_tensor(found[name])
    return found


def as_state(tx: TransformationLike, state: Any) -> Any:
    """Return what stands for a state as one: ``None`` if none is kept, or the parts of one.

    Raises:
        TypeError: If ``state`` is ``None`` and the transformation keeps something.
    """
    if isinstance(state, EmptyState):
        state = None
    if isinstance(state, (tuple, list)):
        found = joined(state)
        return state if found is None else OptState(*found)
    if state is not None:
        return state
    values = tx.hyperparameters().values()
    if tx.slot_names() or any(map(hyper.has_schedule, values)) or tx.plan.uses_step:
        raise TypeError(
            "update expects the state that init returned, got None. Write state = tx.init(params) "
            "first."
        )
    return OptState(0, {})


def hyper_values(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the hyperparameters that an update uses, with pairs taken apart."""
    values: list[Any] = []
    each = tree.compiler_is_old()
    for row, previous in zip(rows, [None, *rows]):
        if each or row is not previous:
            for value in row.values():
                values.extend(value if isinstance(value, tuple) else (value,))
    return values


def slot_trees(
    tx: TransformationLike,
    like: PyTree,
    reference: PyTree,
    spec: Any,
    columns: dict[str, list[Any]],
) -> dict[str, TensorTree]:
    """Build the slots of a state with the structure of ``like``; unneeded ones are left out."""
    required = tx.plan.required
    kept = {
        name: column
        for name, column in columns.items()
        if name in required or any(value is not None for value in column)
    }
    return dict(zip(kept, tree.each_unflattened_like(like, reference, spec, [*kept.values()])))


def eval_trees(tx: TransformationLike, state: Any, params: PyTree) -> PyTree:
    """Return the parameters to evaluate with; see ``GradientTransformation.eval_params``."""
    state = state if type(state) is OptState else as_state(tx, state)
    p, spec = tree.flatten(params)
    slots = state_slots(tx, state, params, spec)
    steps = _counts(state, params, spec, p, p)
    call = gather_tree(tx, params, None, p, steps.now, slots)
    return tree.unflatten(spec, converted_call(tx, call, True))


def advance_trees(
    tx: TransformationLike,
    grads: PyTree,
    state: Any,
    params: PyTree,
    inplace: bool,
    extra: dict[str, Any],
    apply: bool = False,
) -> tuple[list[Any], list[Any], Any, OptState]:
    """Take a step over trees; see ``GradientTransformation.update``.

    Returns:
        The updates, or the new parameters with ``apply``; the parameters; the structure of
        ``grads``, in whose order both are; and the new state.
    """
    plan = tx.plan
    state = state if type(state) is OptState else as_state(tx, state)
    g, spec = tree.flatten(grads)
    p = None if params is None else tree.flatten_like(params, grads, spec, "params", "grads")
    slots = state_slots(tx, state, grads, spec)
    steps = _counts(state, grads, spec, g, p)
    counters = _counters(state, grads, spec) if plan.counters else {}
    one = all(isinstance(x, (int, float, Tensor)) for x in state.counters.values())
    uniform = one and not isinstance(steps.before, list)
    call = gather_tree(tx, grads, g, p, steps.now, slots, counters, extra, params, uniform)
    own, pairs = whole.split(plan, state.slots) if plan.whole else (state.slots, {})
    if inplace:
        if steps.before == 0:  # an anchor may lead to the parameters, which may be leaves as well
            for name, slot in plan.slot_of.items():
                if slot.start == PARAM:
                    slots[name] = [x.detach() if isinstance(x, Tensor) else x for x in slots[name]]
        columns = {
            "grads": g,
            **slots,
            **{name: tree.flatten(value)[0] for name, value in pairs.items()},
            "hyperparameters": hyper_values(call.hyper),
            "extra values": tree.flatten(extra)[0] if extra else [],
        }
        refuse_recorded("update", columns, {} if p is None else {"params": p})
        # parameters may be leaves that require grad; the updates must not carry a graph
        call.p = [x.detach() if isinstance(x, Tensor) else x for x in call.p]
    if plan.whole:
        whole.begin(plan, pairs, call)
    results, slots = advance(tx, call, apply)
    like = grads if params is None else params
    if own:
        like = list(own.values())[0]  # noqa: RUF015 - torch 2.6 cannot compile next
    step = steps.after
    if isinstance(step, list):
        step = tree.unflatten_like(like, grads, spec, step)
    new_slots = slot_trees(tx, like, grads, spec, slots)
    if plan.whole:
        new_slots.update(whole.end(plan, call))
    if counters:
        following = _next_counters(call, counters, plan.kept_at, uniform)
        counters = {
            name: tree.unflatten_like(like, grads, spec, x) if isinstance(x, list) else x
            for name, x in following.items()
        }
    return results, call.p, spec, OptState(step, new_slots, counters)
