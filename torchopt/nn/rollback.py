"""What a network was at the start of a block, to make it so again at its end."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from torchopt.nn import moments
from torchopt.nn.buffers import put_copies
from torchopt.nn.values_before import ValuesBefore


_KINDS = ("_modules", "_parameters", "_buffers")


class Rollback:
    """A network as it is now: its structure, values of parameters, flags and modes.

    Args:
        modules: All modules of the network, or of several, each once.
        with_buffers: Let the network work on copies of its buffers from now on.
    """

    def __init__(self, modules: Sequence[nn.Module], with_buffers: bool) -> None:
        self._modules = [_Module(m, with_buffers) for m in modules]
        tensors = {id(t): t for m in modules for t in m._parameters.values() if t is not None}
        self._values = ValuesBefore(list(tensors.values()))
        if with_buffers:
            put_copies(modules)

    def undo(self) -> None:
        """Make the network what it was. It may be called again if it was interrupted."""
        for module in self._modules:
            module.undo()
        changed = {id(tensor) for tensor in self._values.undo()}
        for module in self._modules if changed else ():
            for name, tensor in module.module._parameters.items():
                if tensor is not None and id(tensor) in changed:
                    moments.spoil(module.module, name, tensor, _SPOILED)


_SPOILED = (
    "A checkpointed part of the network cannot be computed again: it ran inside an inner_loop "
    "block after values of a parameter had been changed in place there (reset_parameters, "
    "load_state_dict, an embedding's max_norm), and the block has put the old values back at "
    "its end. Differentiate inside the block, or do not checkpoint this part."
)


_NOTHING: dict[str, Any] = {}  # what most modules hold of most kinds: one for all, never changed


class _Module:
    """One module without its children: what it holds, its class and its mode."""

    # a block makes one for each module, and should not set off the garbage collector
    __slots__ = ("_attributes", "_class", "_held", "_lazy", "_properties", "_volatile", "module")

    def __init__(self, module: nn.Module, with_buffers: bool) -> None:
        self.module = module
        self._class = type(module)
        self._attributes = dict(vars(module))
        kinds = _KINDS if with_buffers else _KINDS[:2]
        contents = (self._attributes[kind] for kind in kinds)
        self._held = [dict(held) if held else _NOTHING for held in contents]
        self._volatile: frozenset[str] | None = None
        if with_buffers:
            self._volatile = frozenset(module._non_persistent_buffers_set)
        lazy: Any = module if isinstance(module, LazyModuleMixin) else None
        self._lazy = lazy is not None and lazy.has_uninitialized_params()
        self._properties = _NOTHING
        if "parametrizations" in module._modules:
            members = vars(self._class).items()
            self._properties = {n: p for n, p in members if isinstance(p, property)}

    def undo(self) -> None:
        module = self.module
        # a lazy module that got its shapes keeps them, with the values that it was initialised with
        grown = self._lazy and not isinstance(module, LazyModuleMixin)
        if type(module) is not self._class and not grown:  # a parametrization came or went
            module.__class__ = self._class  # pyright: ignore[reportAttributeAccessIssue]
        for name, value in self._properties.items():
            if name not in vars(self._class):
                setattr(self._class, name, value)
        present = vars(module)
        for kind, held in zip(_KINDS, self._held):
            _put_all(module, kind, held)
        if self._volatile is not None and self._volatile != module._non_persistent_buffers_set:
            module._non_persistent_buffers_set = set(self._volatile)
        if present["training"] != self._attributes["training"]:
            moments.put(module, "", "training", self._attributes["training"])
        if present.keys() == self._attributes.keys():
            return
        # an attribute would hide a parameter, a buffer or a module of its name, and the other way
        hidden = {name for held in self._held for name in held} & present.keys()
        for name in hidden - self._attributes.keys():
            moments.put(module, "", name, moments.ABSENT)
        for name, value in self._attributes.items() if not grown else ():
            if name not in present:
                moments.put(module, "", name, value)


def _put_all(module: nn.Module, kind: str, held: dict[str, Any]) -> None:
    present = vars(module)[kind]
    in_order = list(present) == list(held)
    if in_order and all(map(operator.is_, present.values(), held.values())):
        return
    for name in [name for name in present if name not in held]:
        moments.put(module, kind, name, moments.ABSENT)
    for name, value in held.items():
        if present.get(name, moments.ABSENT) is not value:
            moments.put(module, kind, name, value)
    if not in_order:
        present.clear()
        present.update(held)
