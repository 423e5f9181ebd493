"""Whether a network, with hyperparameters of its own, can join a differentiable optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from torchopt.base import misuse
from torchopt.core import hyper, resolving
from torchopt.core.gradient_checks import refuse_parameters
from torchopt.nn.parameters import ParameterWalk, modules_of, parameter_sites, refuse_scripted
from torchopt.optim.meta_call import known_names
from torchopt.optim.protocols import HasGroups


def checked_group(
    optimizer: HasGroups, group: nn.Module | dict[str, Any]
) -> tuple[dict[str, Any], ParameterWalk]:
    """Return a whole group and the walk over its network.

    Raises:
        TypeError: If there is no module in it, or an unknown hyperparameter.
        ValueError: If the module has no parameters or shares one with another group.
    """
    tx, where = optimizer.transformation, type(optimizer).__name__
    given = dict(group) if isinstance(group, Mapping) else {"params": group}
    module = given.pop("params", None)
    if not isinstance(module, nn.Module):
        raise TypeError(misuse.not_a_module(group if module is None else module, where))
    modules = modules_of(module)
    refuse_scripted(where, module, modules)
    specs = tx.hyper_specs()
    given = {name: hyper.plain(value) for name, value in given.items()}
    for name, value in given.items():
        if name not in specs:
            raise TypeError(misuse.unknown_hyperparameter(name, optimizer, list(specs)))
        hyper.check(name, value, specs[name])
    walk = ParameterWalk(module, modules)
    if not walk.sites:
        raise ValueError(f"The module {type(module).__name__} has no parameters to optimize.")
    taken = {
        id(s.tensor) for g in optimizer.param_groups for s in parameter_sites(g["params"]).values()
    }
    for site in walk.sites:
        if id(site.tensor) in taken:
            raise ValueError(f"Parameter {site.name!r} belongs to another group already.")
    hyperparameters = {**tx.hyperparameters(), **given}
    trained = {s.name: s.tensor for s in walk.sites if s.tensor.requires_grad}
    refuse_parameters(tx, trained.items())
    around = partial(known_names, module)
    resolving.resolve(
        hyperparameters, specs, list(trained.values()), lambda: list(trained), 0, around
    )
    return {"params": module, **hyperparameters}, walk
