"""The tensors of an inner and of an outer problem in a module, and all places they stand in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchopt.nn.meta_module import MetaGradientModule
from torchopt.nn.parameters import parameter_sites, place_parameter


class Site:
    """A tensor and all places that it stands in: ``_parameters`` of modules, or a dict."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.owners: list[tuple[nn.Module, str]] = []
        self.dicts: list[tuple[dict[str, Any], str]] = []

    def place(self, tensor: Tensor) -> None:
        """Put a tensor into all places."""
        for owner, attribute in self.owners:
            place_parameter(owner, attribute, tensor)
        for place, key in self.dicts:
            place[key] = tensor

    def now(self) -> Any:
        """Return the tensor that stands there now."""
        for owner, attribute in self.owners:
            return owner._parameters[attribute]
        place, key = self.dicts[0]
        return place[key]


def own_sites(module: nn.Module) -> dict[str, Site]:
    """Return the parameters of a module by name."""
    sites: dict[str, Site] = {}
    for name, found in parameter_sites(module).items():
        sites[name] = site = Site(found.tensor)
        site.owners = found.owners
    return sites


def meta_sites(module: MetaGradientModule) -> dict[str, Site]:
    """Return the meta-parameters by name, with all their places."""
    names = {id(x): name for name, x in module.named_meta_parameters()}
    sites: dict[int, Site] = {}
    for holder in holders(module):
        for key, tensor in holder._meta_parameters.items():
            if tensor is not None:
                sites.setdefault(id(tensor), Site(tensor)).dicts.append(
                    (holder._meta_parameters, key)
                )
        for child in holder.meta_children():
            for found in parameter_sites(child).values():
                site = sites.setdefault(id(found.tensor), Site(found.tensor))
                site.owners += found.owners
    return {names[key]: site for key, site in sites.items() if key in names}


def holders(module: nn.Module) -> list[MetaGradientModule]:
    """Return all modules with meta-parameters that are reached from one."""
    found: dict[MetaGradientModule, None] = {}
    waiting = [module]
    while waiting:
        for part in waiting.pop().modules():
            if isinstance(part, MetaGradientModule) and part not in found:
                found[part] = None
                waiting.extend(part.meta_children())
    return list(found)


def as_leaf(tensor: Tensor, known: Tensor | None) -> Tensor:
    """Return a parameter without history that holds the values of a tensor."""
    if tensor.is_leaf:
        return tensor
    value = tensor.detach()
    if known is None or (known.shape, known.dtype) != (value.shape, value.dtype):
        return nn.Parameter(value.clone())
    if known.device != value.device:
        return nn.Parameter(value.clone())
    with torch.no_grad():
        known.data.copy_(value)
    return known
