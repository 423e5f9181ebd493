"""Saved states of differentiable optimizers: ``torch.optim``'s format, made and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.values import same
from torchopt.core import hyper
from torchopt.core.opt_state import OptState
from torchopt.nn.parameters import ParameterSite, parameter_sites
from torchopt.optim.algorithm import ALGORITHM, check_mark, mark
from torchopt.optim.checkpoint import (
    as_text,
    check_saved,
    counter_of,
    from_text,
    is_recent,
    number_to_tensor,
)
from torchopt.optim.evaluation import TRAIN_MODE
from torchopt.optim.meta_state import GroupState
from torchopt.optim.protocols import MetaOptimizerLike
from torchopt.optim.schedules import REPLACED


#: What a group holds besides hyperparameters, and what schedulers note there.
_OPTIONS = frozenset(
    {"params", "param_names", "foreach", "fused", "capturable", "differentiable", REPLACED}
) | {"decoupled_weight_decay", TRAIN_MODE}
_NOTES = frozenset(
    f"{kind}_{name}"
    for kind in ("initial", "min", "max", "base", "swa")
    for name in ("lr", "momentum")
)


def saved_form(optimizer: MetaOptimizerLike, states: Sequence[GroupState]) -> dict[str, Any]:
    """Return state and hyperparameters, detached: what ``torch.optim``'s class would save.

    Schedules given as hyperparameters are code and are left out.
    """
    fixed = _options(optimizer)
    entries: dict[int, dict[str, Any]] = {}
    groups = []
    first = 0
    for group, state in zip(optimizer.param_groups, states):
        names = list(parameter_sites(group["params"]))
        columns = {slot: dict(column) for slot, column in state.slots.items()}
        for key, name in enumerate(names, first):
            if name in state.steps:
                slots = {slot: column.get(name) for slot, column in columns.items()}
                entries[key] = {
                    "step": torch.tensor(float(state.steps[name])),
                    **{slot: x for slot, x in slots.items() if x is not None},
                    **{
                        n: number_to_tensor(c[name]) for n, c in state.counters.items() if name in c
                    },
                }
        saved = {
            name: as_text(value)
            for name, value in group.items()
            if name != "params" and not hyper.has_schedule(value)
        }
        params = list(range(first, first + len(names)))
        own = {**fixed, **saved, **mark(optimizer)}
        groups.append({**own, "params": params, "param_names": names})
        first += len(names)
    return tree.tree_map(_detached, {"state": entries, "param_groups": groups})


def _options(optimizer: MetaOptimizerLike) -> dict[str, Any]:
    return getattr(optimizer._twin, "fixed_options", {})


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@dataclasses.dataclass
class _Saved:
    """A saved group, or several that share one network."""

    keys: list[Any]
    names: list[str] | None
    hyperparameters: dict[str, Any]


def loaded_form(
    optimizer: MetaOptimizerLike, state_dict: Any
) -> tuple[tuple[OptState, ...], list[dict[str, Any]]]:
    """Return the states and the hyperparameters of a saved form, one of each per group.

    Slots are copied to the device of their parameter, in the dtype in which they are kept.

    Raises:
        ValueError: If it is none, or that of another optimizer or network.
    """
    title = type(optimizer).__name__
    if isinstance(state_dict, (list, tuple)) and any(isinstance(s, OptState) for s in state_dict):
        raise ValueError(
            f"This is no state_dict of {title}, but what extract_state_dict returned: write "
            "torchopt.recover_state_dict(optimizer, state)."
        )
    saved, groups = _contents(title, state_dict)
    live = optimizer.param_groups
    joined = [groups] if groups and len(live) == 1 else [[group] for group in groups]
    if len(joined) != len(live):
        raise ValueError(
            f"The state has {len(groups)} param_groups, {title} has {len(live)}: one per network."
        )
    states, hyperparameters = [], []
    known: set[Any] = set()
    for own, group in zip(joined, live):
        sites = parameter_sites(group["params"])
        united = _unite(optimizer, own, group)
        keys = _keys_by_name(united, len(own), sites)
        known.update(united.keys)
        states.append(_state(optimizer, saved, keys, sites))
        hyperparameters.append(united.hyperparameters)
    strange = [key for key in saved if key not in known]
    if strange:
        raise ValueError(f"The state has an entry {strange[0]!r}, which is in no param_group.")
    return tuple(states), hyperparameters


def _contents(title: str, state_dict: Any) -> tuple[Mapping[Any, Any], list[Mapping[str, Any]]]:
    """Return the two halves of a state_dict, if they are those."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        given = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f"This is no state_dict of {title}: expected a dict with 'state' and 'param_groups', "
            f"got {given}."
        )
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping) or not all(isinstance(e, Mapping) for e in state.values()):
        raise ValueError(
            f"This is no state_dict of {title}: 'state' must be a dict with a dict for each "
            "parameter."
        )
    if not isinstance(groups, (list, tuple)) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple))
        for group in groups
    ):
        raise ValueError(
            f"This is no state_dict of {title}: 'param_groups' must be a list of dicts, each with "
            "a list 'params'."
        )
    return state, list(groups)


def _unite(
    optimizer: MetaOptimizerLike, groups: Sequence[Mapping[str, Any]], live: Mapping[str, Any]
) -> _Saved:
    """Return saved groups as one; where they differ, a hyperparameter becomes a dict by name."""
    keys = [key for group in groups for key in group["params"]]
    each: list[Any] = [group.get("param_names") for group in groups]
    names = [name for own in each for name in own] if all(each) else None
    if names is not None and len(names) != len(keys):
        raise ValueError(f"The state names {len(names)} parameters and has {len(keys)}.")
    values = [_hyperparameters(optimizer, group, live) for group in groups]
    united: dict[str, Any] = dict(values[0])
    for name, spec in optimizer.transformation.hyper_specs().items():
        column: list[Any] = [own.get(name) for own in values]
        if all(same(value, column[0]) for value in column):
            continue
        if names is None or spec.fixed or any(isinstance(v, (Mapping, list)) for v in column):
            raise ValueError(
                f"The param_groups of the state differ in {name!r}: {column}. "
                f"{type(optimizer).__name__} has one group per network, and takes numbers that "
                "differ by parameter name: save the state of an optimizer over named_parameters()."
            )
        rows = [(n, v) for own, v in zip(each, column) for n in own]
        if spec.length:
            united[name] = tuple({n: v[k] for n, v in rows} for k in range(spec.length))
        else:
            united[name] = dict(rows)
    return _Saved(keys, names, united)


def _hyperparameters(
    optimizer: MetaOptimizerLike, group: Mapping[str, Any], live: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the hyperparameters of a saved group, checked."""
    check_mark(optimizer, group)
    if not group.get(TRAIN_MODE, True):
        raise ValueError(
            "The state was saved at the weights to evaluate with, and a differentiable optimizer "
            "has those to train: call optimizer.train() before optimizer.state_dict()."
        )
    specs = optimizer.transformation.hyper_specs()
    optional = getattr(optimizer._twin, "optional_hyperparameters", ())
    fixed = _options(optimizer)
    former = {} if is_recent(group, specs) else getattr(optimizer._twin, "former_defaults", {})
    group = {**{name: value for name, value in former.items() if name in specs}, **group}
    for name, spec in specs.items():
        if name in group:
            group[name] = from_text(group[name], spec)
            check_saved(name, group[name], spec)
        elif name not in optional and not hyper.has_schedule(live[name]):  # schedules are not saved
            raise ValueError(
                f"The state belongs to another optimizer: it lacks the hyperparameter {name!r}."
            )
    for name, value in group.items():
        if name in fixed and value != fixed[name]:
            raise ValueError(
                f"The state belongs to another optimizer: it has {name}={value!r}, "
                f"{type(optimizer).__name__} is {name}={fixed[name]!r}."
            )
        if name not in specs and name not in _OPTIONS | _NOTES | {ALGORITHM}:
            raise ValueError(
                f"The state belongs to another optimizer: it has the hyperparameter {name!r}, "
                f"while those of {type(optimizer).__name__} are {list(specs)}."
            )
    return tree.tree_map(_copied, {name: group[name] for name in specs if name in group})


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _keys_by_name(saved: _Saved, groups: int, sites: Mapping[str, ParameterSite]) -> dict[str, Any]:
    """Return the saved key of each parameter: by name, or else by order."""
    trainable = [name for name, site in sites.items() if site.tensor.requires_grad]
    if saved.names is not None:
        given = dict(zip(saved.names, saved.keys))
        frozen = set(sites) - set(trainable)
        wanted = [name for name in sites if name in given or name not in frozen]
        if set(given) != set(wanted):
            difference = tree.first_difference(list(given), wanted)
            raise ValueError(f"The state does not match at the parameters: {difference}.")
        return given
    if groups > 1:
        raise ValueError(
            f"The state has {groups} param_groups without names, so that the order of the "
            "network's parameters says nothing: make its optimizer over named_parameters()."
        )
    for names in (list(sites), trainable):
        if len(names) == len(saved.keys):
            return dict(zip(names, saved.keys))
    raise ValueError(
        f"The state has {len(saved.keys)} parameters, the network {len(sites)}, of which "
        f"{len(trainable)} require grad."
    )


def _state(
    optimizer: MetaOptimizerLike,
    saved: Mapping[Any, Mapping[str, Any]],
    keys: Mapping[str, Any],
    sites: Mapping[str, ParameterSite],
) -> OptState:
    """Return the state of one group; an entry without a count (SGD's) counts as one step."""
    plan = optimizer.transformation.plan
    counts = plan.uses_step
    steps: dict[str, Any] = {}
    counters: dict[str, dict[str, Any]] = {counter: {} for counter in plan.counters}
    columns: dict[str, dict[str, Any]] = {slot: {} for slot in plan.slot_names}
    for name, key in keys.items():
        entry = {slot: x for slot, x in saved.get(key, {}).items() if x is not None}
        steps[name] = 0
        if not entry:
            continue
        plan.check_slots([slot for slot in entry if slot != "step"], type(optimizer).__name__)
        if counts and "step" not in entry:
            raise ValueError(f"The state of parameter {name!r} lacks 'step'.")
        steps[name] = entry.get("step", 1)
        for slot in plan.slot_names:
            value, param = entry.get(slot), sites[name].tensor
            own = plan.slot_of[slot]
            columns[slot][name] = own.kept(value, param) if isinstance(value, Tensor) else value
        for counter, column in counters.items():
            column[name] = counter_of(f"{counter} of {name!r}", entry[counter])
    return OptState(steps, columns, counters)
