"""What a network was at the start of a block, to make it so again at its end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchopt import moments
from torchopt.module_state import FastWeight


_KINDS = ("_modules", "_parameters", "_buffers")
_COMPARABLE = {Tensor, nn.Parameter, FastWeight}


class Rollback:
    """A network as it is now: its structure, values of parameters, flags and modes.

    Args:
        modules: The network, or several.
        with_buffers: Let the network work on copies of its buffers from now on.
    """

    def __init__(self, modules: Iterable[nn.Module], with_buffers: bool) -> None:
        found = {id(m): m for module in modules for m in module.modules()}
        self._modules = [_Module(m, with_buffers) for m in found.values()]
        tensors = {
            id(t): t for m in found.values() for t in m._parameters.values() if t is not None
        }
        self._parameters = _Parameters(list(tensors.values()))
        if with_buffers:
            copies: dict[int, Tensor] = {}
            for module in found.values():
                for name, buffer in module._buffers.items():
                    if buffer is None:
                        continue
                    if id(buffer) not in copies:
                        copies[id(buffer)] = buffer.clone()
                    moments.put(module, "_buffers", name, copies[id(buffer)])

    def undo(self) -> None:
        """Make the network what it was. It may be called again if it was interrupted."""
        for module in self._modules:
            module.undo()
        changed = self._parameters.undo()
        if not changed:
            return
        for module in self._modules:
            for name, tensor in module.module._parameters.items():
                if tensor is not None and id(tensor) in changed:
                    moments.spoil(module.module, name, tensor, _SPOILED)


_SPOILED = (
    "A checkpointed part of the network cannot be computed again: it ran inside an inner_loop block "
    "after values of a parameter had been changed in place there (reset_parameters, load_state_dict, "
    "an embedding's max_norm), and the block has put the old values back at its end. Differentiate "
    "inside the block, or do not checkpoint this part."
)


class _Module:
    """One module without its children: what it holds, its class and its mode."""

    def __init__(self, module: nn.Module, with_buffers: bool) -> None:
        self.module = module
        self._class = type(module)
        self._attributes = dict(vars(module))
        kinds = _KINDS if with_buffers else _KINDS[:2]
        self._held = [(kind, dict(self._attributes[kind])) for kind in kinds]
        self._volatile = set(module._non_persistent_buffers_set) if with_buffers else None
        parametrized = "parametrizations" in module._modules
        members = vars(self._class).items() if parametrized else ()
        self._properties = {n: p for n, p in members if isinstance(p, property)}

    def undo(self) -> None:
        module = self.module
        if type(module) is not self._class:  # a parametrization was added or removed
            module.__class__ = self._class
        for name, value in self._properties.items():
            if name not in vars(self._class):
                setattr(self._class, name, value)
        for kind, held in self._held:
            _put_all(module, kind, held)
        if self._volatile is not None:
            module._non_persistent_buffers_set = set(self._volatile)
        if module.training != self._attributes["training"]:
            moments.put(module, "", "training", self._attributes["training"])
        present = vars(module)
        for name, value in self._attributes.items():
            # one that gave way to a parameter, a buffer or a module of its name
            if name not in present:
                moments.put(module, "", name, value)


def _put_all(module: nn.Module, kind: str, held: dict[str, Any]) -> None:
    present = vars(module)[kind]
    if list(map(id, present.values())) == list(map(id, held.values())) and list(present) == list(
        held
    ):
        return
    for name in [name for name in present if name not in held]:
        moments.put(module, kind, name, moments.ABSENT)
    for name, value in held.items():
        moments.put(module, kind, name, value)
    if list(present) != list(held):
        content = dict(held)
        present.clear()
        present.update(content)


class _Parameters:
    """Values and flags of parameters.

    Changes in place show in the tensors' versions; those by way of ``.data`` do not, so that values
    are compared as well. What has not changed is not written: that would count as a change, and
    autograd would refuse the graph that holds the parameter.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._flags = [t.requires_grad for t in tensors]
        self._versions = [_version(t) for t in tensors]
        self._memory = [t.detach() for t in tensors]
        self._values = [t.clone() for t in self._memory]

    def undo(self) -> set[int]:
        """Put values and flags back; return the ids of the tensors whose values had changed."""
        changed = set()
        rows = zip(self._tensors, self._memory, self._values, self._versions, self._flags)
        for tensor, memory, values, version, flag in rows:
            if _version(tensor) != version or _moved(tensor, memory) or _differ(memory, values):
                changed.add(id(tensor))
                with torch.no_grad():
                    if _moved(tensor, memory):
                        tensor.data = memory
                    tensor.copy_(values)
            if tensor.is_leaf and tensor.requires_grad != flag:
                tensor.requires_grad_(flag)
        self._versions = [_version(t) for t in self._tensors]
        return changed


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _moved(tensor: Tensor, memory: Tensor) -> bool:
    """Whether ``tensor.data = ...`` or ``set_`` gave the parameter other memory."""
    if type(tensor) not in _COMPARABLE or tensor.layout != torch.strided:
        return False
    return (
        tensor.dtype != memory.dtype
        or tensor.device != memory.device
        or tensor.shape != memory.shape
        or tensor.data_ptr() != memory.data_ptr()
    )


def _differ(memory: Tensor, values: Tensor) -> bool:
    if memory.layout != torch.strided or memory.is_meta or type(memory) is not Tensor:
        return False
    if torch.equal(memory, values):
        return False
    same = (memory == values) | ((memory != memory) & (values != values))
    return not bool(same.all())
