"""Check and convert states saved by ``torch.optim`` or by the object-oriented face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchopt import hyper, misuse
from torchopt.numerics import HALF


def unexpected(optimizer: Any, given: Any) -> str:
    """Say that something is no saved state."""
    return (
        f"{type(optimizer).__name__}.load_state_dict expects a dict with 'state' and "
        f"'param_groups', got {given}."
    )


def checked_groups(optimizer: Any, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the saved parameter groups, with the live values of schedules, which are not saved.

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
    groups = []
    for index, (group, live) in enumerate(zip(saved, optimizer.param_groups)):
        if len(group["params"]) != len(live["params"]):
            raise ValueError(
                f"Parameter group {index} of the state has {len(group['params'])} parameters, "
                f"that of {title} has {len(live['params'])}."
            )
        for name, spec in optimizer.transformation.hyper_specs().items():
            if name in group:
                hyper.check(name, group[name], spec)
                continue
            if (
                not hyper.has_schedule(live[name])
                and name not in optimizer.optional_hyperparameters
            ):
                raise ValueError(
                    f"The state belongs to another optimizer: parameter group {index} has no "
                    f"{name!r}, which {title} needs; it has {sorted(map(str, group))}."
                )
        for name, value in optimizer.fixed_options.items():
            if group.get(name, value) != value:
                raise ValueError(
                    f"The state has {name}={misuse.short(group[name])}; {title} is "
                    f"{name}={value!r}."
                )
        groups.append(
            {
                **{k: v for k, v in live.items() if k in optimizer.transformation.hyper_specs()},
                **group,
            }
        )
    return groups


def checked_slots(
    optimizer: Any, state: Mapping[Any, Any], groups: list[dict[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """Return copies of the saved slots by parameter, in the dtype in which they are kept.

    Raises:
        ValueError: If they are those of another optimizer or do not match its parameters.
    """
    keys = [key for group in groups for key in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    plan, loaded = optimizer.transformation.plan, {}
    reads_step = any(part.uses_step for part in plan.parts)
    for key, p in zip(keys, params):
        entry = state.get(key, {})
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"The state of parameter {key} must be a dict, got {misuse.short(entry)}."
            )
        entry = {name: value for name, value in entry.items() if value is not None}
        if not entry:
            continue
        plan.check_slots([name for name in entry if name != "step"], type(optimizer).__name__)
        if reads_step and "step" not in entry:
            raise ValueError(f"The state of parameter {key} lacks 'step'.")
        dtype = torch.float32 if p.dtype in HALF else p.dtype
        loaded[p] = {
            name: _step_to_int(value, key)
            if name == "step"
            else _copy_slot(name, value, key, p, dtype)
            for name, value in entry.items()
        }
    return loaded


def step_to_tensor(step: Any) -> Any:
    """Return a count as ``torch.optim`` keeps it."""
    return step if isinstance(step, Tensor) else torch.tensor(float(step))


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


def _copy_slot(name: str, value: Any, key: Any, param: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name!r} of parameter {key} must be a tensor, got {misuse.short(value)}."
        )
    if value.shape != param.shape:
        raise ValueError(
            f"{name!r} of parameter {key} has shape {tuple(value.shape)} in the state, "
            f"the parameter {tuple(param.shape)}."
        )
    return value.detach().to(device=param.device, dtype=dtype, copy=True)
