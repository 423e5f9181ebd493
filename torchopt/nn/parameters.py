"""Where a module keeps its tensors, and how to put others in their place."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.base.torch_internals import disabled_torch_function, load_from_state_dict
from torchopt.nn import moments


_GRAD: Any = Tensor.grad
_NEW_PARAMETER = nn.Parameter.__new__.__code__
_LOAD_STATE_DICT = load_from_state_dict.__code__


class FastWeight(Tensor):
    """A parameter with history: what a differentiable optimizer puts into a module.

    It behaves as a tensor in every operation. Deep-copying a module that holds one works (a plain
    tensor with history refuses): the copy is a parameter without history.
    """

    # operations return plain tensors
    __torch_function__ = disabled_torch_function

    @property
    def _is_param(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether ``isinstance(weight, nn.Parameter)``: yes, as code that walks modules expects.

        But not for ``load_state_dict(assign=True)`` when it asks whether the tensor that it was
        given can stand in a module as it is: PyTorch wants no history there, and makes a parameter.
        """
        caller = sys._getframe(1).f_back
        if self.grad_fn is None or caller is None or caller.f_code is not _LOAD_STATE_DICT:
            return True
        return caller.f_locals.get("input_param") is not self

    @_is_param.setter
    def _is_param(self, _: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        # nn.Parameter(weight) marks what it makes
        self.__class__ = nn.Parameter  # pyright: ignore[reportAttributeAccessIssue]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        copied = nn.Parameter(self.detach().clone(), requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    def detach(self) -> Tensor:
        """Return the tensor without history; for ``nn.Parameter(weight)`` a parameter."""
        detached = super().detach()
        if sys._getframe(1).f_code is _NEW_PARAMETER:
            # it insists on the class that it was given, and then marks what it makes
            detached.__class__ = type(self)
        return detached

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a pickle cannot hold history either: what is loaded is a parameter
        return nn.Parameter(self.detach(), requires_grad=self.requires_grad).__reduce_ex__(protocol)

    @property
    def grad(self) -> Tensor | None:
        """The gradient, if asked for by ``retain_grad()``; silently ``None`` otherwise.

        ``net.zero_grad()`` and the like read it of every parameter, where a tensor warns.
        """
        return _GRAD.__get__(self) if self.is_leaf or self.retains_grad else None

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        _GRAD.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        _GRAD.__delete__(self)


@dataclasses.dataclass
class ParameterSite:
    """One tensor of a module and every place that holds it (several if weights are tied)."""

    name: str
    tensor: Tensor
    owners: list[tuple[nn.Module, str]]


def place_each(sites: Sequence[ParameterSite], tensors: Sequence[Tensor | None]) -> None:
    """Put tensors where the old ones were; ``None`` leaves the old one."""
    for site, tensor in zip(sites, tensors):
        if tensor is not None:
            for owner, attribute in site.owners:
                place_parameter(owner, attribute, tensor)


def parameter_sites(module: nn.Module) -> dict[str, ParameterSite]:
    """Return the distinct parameters of a module by their first dotted name."""
    sites: dict[int, ParameterSite] = {}
    for name, owner, attribute, tensor in named_places(module, "_parameters"):
        if id(tensor) in sites:
            sites[id(tensor)].owners.append((owner, attribute))
        else:
            sites[id(tensor)] = ParameterSite(name, tensor, [(owner, attribute)])
    return {site.name: site for site in sites.values()}


def modules_of(module: nn.Module) -> list[nn.Module]:
    """Return what ``module.modules()`` does, whose nested generators take several times as long."""
    seen: dict[nn.Module, None] = {}
    _collect_modules(module, seen)
    return list(seen)


def _collect_modules(module: nn.Module, seen: dict[nn.Module, None]) -> None:
    if module not in seen:
        seen[module] = None
        for child in module._modules.values():
            if child is not None:
                _collect_modules(child, seen)


def refuse_scripted(what: str, module: nn.Module, modules: Sequence[nn.Module] = ()) -> None:
    """Refuse a module that keeps its parameters in TorchScript, where no others can be put.

    Args:
        what: Who refuses it.
        module: The module.
        modules: It and its sub-modules, if they are known.

    Raises:
        TypeError: If there is one.
    """
    for part in modules or modules_of(module):
        if isinstance(part, torch.jit.ScriptModule):
            name = next(name for name, other in module.named_modules() if other is part)
            where = f"its part {name!r} is" if name else "it is"
            raise TypeError(
                f"{what} cannot put other weights into {type(module).__name__}: {where} "
                "scripted or traced by torch.jit. Give it the network before torch.jit.script."
            )


class ParameterWalk:
    """The parameters of a module, found again at little cost while its structure is the same.

    Args:
        module: The module.
        modules: It and its sub-modules, if they are known.

    Attributes:
        module: The module.
        modules: It and its sub-modules.
        sites: Its distinct parameters as they were at first.
    """

    def __init__(self, module: nn.Module, modules: list[nn.Module] | None = None) -> None:
        self.module = module
        self.sites = list(parameter_sites(module).values())
        self.modules = modules = modules or modules_of(module)
        self._inner = [m for m in modules if m._modules]
        self._outer = [m for m in modules if not m._modules]
        self._children = [list(map(id, m._modules.values())) for m in self._inner]
        self._holders = [m for m in modules if m._parameters]
        self._others = [m for m in modules if not m._parameters]
        self._names = [list(m._parameters) for m in self._holders]
        self._absent = [t is None for m in modules for t in m._parameters.values()]
        self._tied = any(len(site.owners) > 1 for site in self.sites)

    def has_same_modules(self) -> bool:
        """Whether the network consists of the same modules."""
        # the modules are held by this walk, so that an id stands for one of them only
        now = [list(map(id, m._modules.values())) for m in self._inner]
        return now == self._children and not any(m._modules for m in self._outer)

    def tensors(self) -> list[Tensor] | None:
        """Return the present tensors, in the order of the sites; ``None`` to walk again."""
        if self._tied or not self.has_same_modules():
            return None
        dicts = [m._parameters for m in self._holders]
        if list(map(list, dicts)) != self._names or any(m._parameters for m in self._others):
            return None
        found: list[Any] = list(itertools.chain.from_iterable(map(dict.values, dicts)))
        if [t is None for t in found] != self._absent:
            return None
        found = [t for t in found if t is not None]
        if len(set(map(id, found))) != len(found):
            return None
        return found


def named_places(module: nn.Module, kind: str) -> list[tuple[str, nn.Module, str, Tensor]]:
    """Return (dotted name, owner, attribute, tensor) of ``_parameters`` or ``_buffers``.

    In the order of ``named_modules()``, whose nested generators take twice the time.
    """
    found: list[tuple[str, nn.Module, str, Tensor]] = []
    _collect_places("", module, kind, set(), found)
    return found


def _collect_places(
    prefix: str,
    module: nn.Module,
    kind: str,
    seen: set[nn.Module],
    found: list[tuple[str, nn.Module, str, Tensor]],
) -> None:
    if module in seen:
        return
    seen.add(module)
    for attribute, tensor in getattr(module, kind).items():
        if tensor is not None:
            found.append((prefix + attribute, module, attribute, tensor))
    for name, child in module._modules.items():
        if child is not None:
            _collect_places(f"{prefix}{name}.", child, kind, seen, found)


def place_parameter(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
    """Put a tensor, with or without history, into a module as a parameter."""
    if type(tensor) is Tensor:
        # The class of this very tensor changes, so that no operation is added to the graph.
        tensor.__class__ = FastWeight
    if moments.references or moments.noting:
        moments.record(owner, "_parameters", attribute)
    owner._parameters[attribute] = tensor  # pyright: ignore[reportArgumentType]
    if isinstance(owner, nn.RNNBase):
        moments.refresh(owner)


def place_all(
    module: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    """Put tensors by dotted name; every name must exist."""
    for name, owner, attribute, _ in named_places(module, "_parameters"):
        if name in params:
            place_parameter(owner, attribute, params[name])
    for name, owner, attribute, _ in named_places(module, "_buffers"):
        if name in buffers:
            moments.put(owner, "_buffers", attribute, buffers[name])
