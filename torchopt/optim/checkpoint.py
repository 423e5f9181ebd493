"""Check and convert states saved by ``torch.optim`` or by the object-oriented API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.core import hyper, whole
from torchopt.core.evaluation import evaluates
from torchopt.core.plan import Plan
from torchopt.core.slots import Slot
from torchopt.optim.algorithm import check_mark, mark, set_mark
from torchopt.optim.evaluation import TRAIN_MODE, TRAINED
from torchopt.optim.protocols import OptimizerLike
from torchopt.optim.schedules import REPLACED


def saved(optimizer: OptimizerLike) -> dict[str, Any]:
    """Return the state of an optimizer in ``torch.optim``'s format."""

    def convert(_: Any, found: dict[str, Any]) -> dict[str, Any]:
        state = {
            key: {n: number_to_tensor(v) for n, v in entry.items()}
            if isinstance(entry, dict)
            else entry
            for key, entry in found["state"].items()
        }
        groups = [saved_group(optimizer, group) for group in found["param_groups"]]
        for group, live in zip(groups, optimizer.param_groups):
            if replaced := optimizer._schedules.replaced(live):
                group[REPLACED] = replaced
        return {**found, "state": state, "param_groups": groups}

    optimizer._adopt_schedules(optimizer.param_groups)
    hook = optimizer.register_state_dict_post_hook(convert, prepend=True)  # before the user's
    optimizer._lent = bool(optimizer.state)
    try:
        return torch.optim.Optimizer.state_dict(optimizer)  # pyright: ignore[reportArgumentType]
    finally:
        hook.remove()


def load(optimizer: OptimizerLike, state_dict: Mapping[str, Any]) -> None:
    """Load a state in ``torch.optim``'s format; nothing changes if it is refused."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(unexpected(optimizer, type(state_dict).__name__))
    loaded: dict[Tensor, dict[str, Any]] = {}
    restore: Callable[..., None] = lambda *_: None  # noqa: E731
    plan = optimizer.transformation.plan

    def check(_: Any, given: Any) -> dict[str, Any]:
        nonlocal restore
        groups = checked_groups(optimizer, given)
        loaded.update(checked_slots(optimizer, given["state"], groups))
        schedules, live = optimizer._schedules, optimizer.param_groups
        restore = schedules.keep_through_load(live, given["param_groups"])
        whole.check(plan, given["state"].get(whole.PAIRS, {}), type(optimizer))
        return {**given, "param_groups": groups}

    def adopt(_: Any) -> None:  # torch has cast the slots to the parameters' dtype
        state = optimizer.state
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in loaded:
                    state[p] = loaded[p]
                else:
                    state.pop(p, None)
        optimizer._lent = False  # the slots are copies
        restore(optimizer.param_groups, optimizer._count)
        if whole.PAIRS in state:  # the states of pairs are copied as the slots are
            state[whole.PAIRS] = _copied(state[whole.PAIRS])

    hooks = [
        optimizer.register_load_state_dict_pre_hook(check),  # after the user's
        optimizer.register_load_state_dict_post_hook(adopt, prepend=True),  # before the user's
    ]
    try:
        torch.optim.Optimizer.load_state_dict(optimizer, dict(state_dict))  # pyright: ignore[reportArgumentType]
    finally:
        for hook in hooks:
            hook.remove()


def unexpected(optimizer: object, given: Any) -> str:
    """Say that something is no saved state."""
    return (
        f"{type(optimizer).__name__}.load_state_dict expects a dict with 'state' and "
        f"'param_groups', got {given}."
    )


def checked_groups(optimizer: OptimizerLike, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the saved parameter groups, complete and in the order of the live parameters.

    Raises:
        ValueError: If they are those of another optimizer or do not match its parameters.
    """
    title = type(optimizer).__name__
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            unexpected(
                optimizer, list(state_dict) if isinstance(state_dict, Mapping) else state_dict
            )
        )
    saved = state_dict["param_groups"]
    if not isinstance(state_dict["state"], Mapping):
        raise ValueError(f"'state' must be a dict, got {type(state_dict['state']).__name__}.")
    if not isinstance(saved, (list, tuple)) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple))
        for group in saved
    ):
        raise ValueError("'param_groups' must be a list of dicts, each with a list 'params'.")
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            f"The state has {len(saved)} parameter groups, {title} has "
            f"{len(optimizer.param_groups)}."
        )
    return [
        _checked_group(optimizer, index, group, live)
        for index, (group, live) in enumerate(zip(saved, optimizer.param_groups))
    ]


def _checked_group(
    optimizer: OptimizerLike, index: int, saved: Mapping[str, Any], live: dict[str, Any]
) -> dict[str, Any]:
    """Return one saved group, complete and in the order of the live parameters."""
    title, specs = type(optimizer).__name__, optimizer.group_specs(live)
    if len(saved["params"]) != len(live["params"]):
        raise ValueError(
            f"Parameter group {index} of the state has {len(saved['params'])} parameters, "
            f"that of {title} has {len(live['params'])}."
        )
    check_mark(optimizer, saved)
    group = {n: value for n, value in saved.items() if n != REPLACED}
    set_mark(optimizer, group)
    if "label" in live and group.setdefault("label", live["label"]) != live["label"]:
        raise ValueError(
            f"Parameter group {index} of the state has the label {group['label']!r}, that of "
            f"{title} {live['label']!r}."
        )
    if foreign := sorted(optimizer.foreign_hyperparameters & saved.keys()):
        raise ValueError(
            f"The state belongs to another optimizer: parameter group {index} has {foreign}, which "
            f"{title} does not take."
        )
    for name, spec in specs.items():
        if name in group:
            group[name] = from_text(group[name], spec)
            check_saved(name, group[name], spec)
        elif name in optimizer.former_defaults and not is_recent(saved, specs):
            group[name] = optimizer.former_defaults[name]
        elif optimizer.has_schedule(live, name) or name in optimizer.optional_hyperparameters:
            group[name] = live[name]
        else:
            raise ValueError(
                f"The state belongs to another optimizer: parameter group {index} has no "
                f"{name!r}, which {title} needs; it has {sorted(map(str, group))}."
            )
    for name, value in optimizer.fixed_options.items():
        if group.get(name, value) != value:
            raise ValueError(
                f"The state has {name}={misuse.short(group[name])}; {title} is {name}={value!r}."
            )
    names, own = saved.get("param_names"), live.get("param_names")
    if names is None or own is None or list(names) == list(own):
        return group
    return _reordered(group, _order_by_name(index, list(names), list(own)), specs)


def set_notes(optimizer: OptimizerLike, group: dict[str, Any]) -> None:
    """Let a new group say what a saved one does: of which algorithm, and that it is in training.

    It does from the start, for what takes states apart and puts them together again by the keys of
    live groups, as ``torch.distributed.checkpoint`` where it flattens them.
    """
    set_mark(optimizer, group)
    if evaluates(optimizer.transformation):
        group.setdefault(TRAIN_MODE, True)


def check_saved(name: str, value: Any, spec: hyper.HyperSpec) -> None:
    """Refuse a saved hyperparameter that this optimizer cannot have: three betas for two.

    Raises:
        ValueError: Saying that the state is another optimizer's, and why.
    """
    try:
        hyper.check(name, value, spec)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The state belongs to another optimizer: {error}") from error


def as_text(value: Any) -> Any:
    """Return a hyperparameter as it is saved: a dtype by name, for checkpoints that know none."""
    return str(value) if isinstance(value, torch.dtype) else value


def from_text(value: Any, spec: hyper.HyperSpec) -> Any:
    """Return what :func:`as_text` was given."""
    return next((x for x in spec.choices if as_text(x) == value), value)


def is_recent(group: Mapping[str, Any], specs: Mapping[str, Any]) -> bool:
    """Whether a group lacks what old ones lack for another reason: it is RAdam's or NAdam's."""
    theirs = "decoupled_weight_decay" in group and "decoupled_weight_decay" not in specs
    return theirs and not {"fused", "amsgrad"} & group.keys()


def _order_by_name(index: int, names: list[str], own: list[str]) -> list[int]:
    """Return where each of the live parameters stands in a saved group.

    Raises:
        ValueError: If the names are not the same ones.
    """
    if sorted(names) != sorted(own) or len(set(own)) < len(own):
        raise ValueError(
            f"The names of the parameters in group {index} differ from those of the state: "
            f"{tree.first_difference(names, own)}. The state has {names}, the optimizer {own}. "
            f"To load by position, remove the names: "
            f"state['param_groups'][{index}].pop('param_names')."
        )
    return [names.index(name) for name in own]


def _reordered(group: dict[str, Any], order: list[int], specs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved group, with what lists one value for each parameter, in another order."""

    def own(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and len(value) == len(order):
            return [value[k] for k in order]
        return value

    for name in specs:
        several = specs[name].length
        group[name] = tuple(map(own, group[name])) if several else own(group[name])
    for name in ("params", "param_names"):
        group[name] = own(group[name])
    return group


def saved_group(optimizer: OptimizerLike, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter group to save: tensors that schedulers change in place are copied."""
    names = optimizer.group_specs(group)
    own = {n: as_text(_copied(value)) if n in names else value for n, value in group.items()}
    return {**optimizer.fixed_options, **own, **mark(optimizer)}


def _copied(value: Any) -> Any:
    if isinstance(value, (Tensor, Mapping, list, tuple)):
        return tree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)
    return value


def checked_slots(
    optimizer: OptimizerLike, state: Mapping[Any, Any], groups: list[dict[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """Return copies of the saved slots by parameter, in the dtype in which they are kept.

    Raises:
        ValueError: If they are those of another optimizer or do not match its parameters.
    """
    keys = [key for group in groups for key in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    plan, loaded = optimizer.transformation.plan, {}
    reads_step = plan.uses_step
    for key, p in zip(keys, params):
        entry = state.get(key, {})
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"The state of parameter {key} must be a dict, got {misuse.short(entry)}."
            )
        entry = {name: value for name, value in entry.items() if value is not None}
        if not entry:
            continue
        slots = [name for name in entry if name not in ("step", TRAINED)]
        plan.check_slots(slots, type(optimizer).__name__)
        if reads_step and "step" not in entry:
            raise ValueError(f"The state of parameter {key} lacks 'step'.")
        loaded[p] = {name: _loaded(plan, name, value, key, p) for name, value in entry.items()}
    return loaded


def number_to_tensor(value: Any) -> Any:
    """Return a number of a state as a tensor: a count as ``torch.optim`` keeps it, others exact."""
    if isinstance(value, int):
        return torch.tensor(float(value))
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else value


def _loaded(plan: Plan, name: str, value: Any, key: Any, param: Tensor) -> Any:
    """Return a copy of an entry of a saved state as it is kept."""
    if name == "step":
        return _step_to_int(value, key)
    if name in plan.counters:
        return counter_of(f"{name!r} of parameter {key}", value)
    slot = Slot(TRAINED, dtype=param.dtype) if name == TRAINED else plan.slot_of[name]
    slot.check(f"{name!r} of parameter {key}", value, param)
    return slot.kept(value, param)


def counter_of(what: str, value: Any) -> float:
    """Return a saved counter as a number.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.numel() != 1):
        raise ValueError(f"{what} must be a number, got {misuse.short(value)}.")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} must be a number, got {misuse.short(value)}.") from error


def _step_to_int(step: Any, key: Any) -> int:
    try:
        number = float(step)
    except (TypeError, ValueError, RuntimeError):
        number = -1.0
    if not (number >= 0 and number.is_integer()):
        raise ValueError(
            f"'step' of parameter {key} must be a count of updates, got {misuse.short(step)}."
        )
    return int(number)
