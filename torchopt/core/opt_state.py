"""The state of an optimizer in the functional API."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from torchopt.base import tree
from torchopt.base.torch_internals import len_torch_dispatch_stack, torch_pytree
from torchopt.base.values import describe
from torchopt.core.state_parts import parts_of
from torchopt.core.step_count import as_tensor, read_number
from torchopt.typing import PyTree, TensorTree


class OptState:
    """What an optimizer remembers between two updates.

    Attributes:
        step: How many gradients the parameters have received: one number for all. It becomes a
            tree of numbers with the structure of the parameters once they differ (a gradient was
            ``None``). A number is an ``int``, or a 0-d int64 tensor on the CPU in a state that has
            been taken apart.
        slots: Named buffers under ``torch.optim``'s names (``exp_avg``, ``momentum_buffer``, ...),
            each a tree with the structure of the parameters. Also readable as attributes.
        counters: Named numbers (``mu_product``, ...), kept as the step count is: one for all
            parameters, or a tree of them. Also readable as attributes.

    Indexing and iteration give the parts as TorchOpt 0.7.3 named them (``state[0].mu``), the step
    count last (``state[-1].count``); a tuple of such parts is accepted where a state is.

    It is a pytree node for optree and for PyTorch's own pytrees, and everything in it is a leaf,
    the step count too, as a tensor: a state that is copied or saved leaf by leaf is whole.

    Example:
        >>> import torch, torchopt
        >>> state = torchopt.adam().init({"w": torch.randn(2, 3)})
        >>> state
        OptState(step=0, exp_avg={'w': float32[2, 3]}, exp_avg_sq={'w': float32[2, 3]})
        >>> state.exp_avg["w"].shape
        torch.Size([2, 3])
        >>> torch.utils._pytree.tree_leaves(state)[-1]
        tensor(0)
    """

    def __init__(
        self,
        step: PyTree,
        slots: dict[str, TensorTree],
        counters: dict[str, PyTree] | None = None,
    ) -> None:
        self.step = step
        self.slots = slots
        self.counters = counters or {}

    def __getattr__(self, name: str) -> TensorTree:
        slots, counters = (self.__dict__.get(n, {}) for n in ("slots", "counters"))
        if name in slots:
            return slots[name]
        if name in counters:
            return counters[name]
        raise AttributeError(
            f"OptState has no attribute or slot {name!r}; slots: {[*slots, *counters]}"
        )

    def _parts(self) -> tuple[Any, ...]:
        return parts_of(self.step, {**self.slots, **self.counters})

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parts())

    def __len__(self) -> int:
        return len(self._parts())

    def __getitem__(self, index: Any) -> Any:
        return self._parts()[index]

    def __repr__(self) -> str:
        numbers = {"step": self.step, **self.counters}
        parts = [f"{name}={describe(tree.tree_map(_shown, n))}" for name, n in numbers.items()]
        parts[1:1] = [f"{name}={describe(value)}" for name, value in self.slots.items()]
        return f"OptState({', '.join(parts)})"


def _shown(number: Any) -> Any:
    return number if getattr(number, "ndim", 0) else read_number(number)


class _Present:
    """A slot that some parameters lack, as a node whose leaves are the tensors that there are.

    Trees of a state have the structure of the parameters, with ``None`` where there is no slot; but
    ``torch.func.vmap`` takes ``None`` neither in nor out.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


def _flatten_present(node: _Present) -> tuple[list[Any], Any]:
    leaves, spec = tree.flatten(node.value)
    there = tuple(x is not None for x in leaves)
    return [x for x in leaves if x is not None], (spec, there)


def _unflatten_present(metadata: Any, children: Any) -> Any:
    spec, there = metadata
    rest = iter(children)
    return tree.unflatten(spec, [next(rest) if present else None for present in there])


def _entries_present(node: _Present) -> tuple[str, ...]:
    names, leaves = tree.leaf_names(node.value), tree.flatten(node.value)[0]
    return tuple(name for name, x in zip(names, leaves) if x is not None)


def _keys_present(node: _Present) -> list[Any]:
    pairs = torch_pytree.tree_flatten_with_path(node.value, is_leaf=lambda x: x is None)[0]
    return [_Keys(path) for path, x in pairs if x is not None]


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Several keys of PyTorch's as one, for a leaf several levels below."""

    path: tuple[Any, ...]

    def __str__(self) -> str:
        return torch_pytree.keystr(self.path)

    def get(self, parent: Any) -> Any:
        """Return the leaf below a node."""
        value = parent.value if isinstance(parent, _Present) else parent
        for key in self.path:
            value = key.get(value)
        return value


tree.register_node(_Present, _flatten_present, _unflatten_present, _entries_present, _keys_present)


def _without_none(slot: Any) -> Any:
    if torch.compiler.is_compiling() or all(x is not None for x in tree.flatten(slot)[0]):
        return slot
    return _Present(slot)


def _flatten(state: OptState) -> tuple[list[Any], Any]:
    names, counters = tuple(state.slots), tuple(state.counters)
    slots = [_without_none(slot) for slot in state.slots.values()]
    children = [*slots, *map(as_tensor, state.counters.values())]
    if torch.compiler.is_compiling() and isinstance(state.step, int):
        # the compiler knows an int, which becomes a guard at most, but not what a tensor holds
        return children, (names, counters, state.step)
    # A count is an int until somebody looks: an update needs the number, and a tensor takes longer
    # to make than a small update. From then on the leaf is what counts: it may be changed in place.
    step = as_tensor(state.step)
    if len_torch_dispatch_stack() == 0:  # a tracer's tensors stand for others
        state.step = step
        state.counters = dict(zip(counters, children[len(names) :]))
    return [*children, step], (names, counters, None)


def _unflatten(metadata: Any, children: Any) -> OptState:
    names, counters, step = metadata
    children = list(children)
    if step is None:
        step = children.pop()
    n = len(names)
    return OptState(step, dict(zip(names, children)), dict(zip(counters, children[n:])))


def _entries(state: OptState) -> tuple[str, ...]:
    if torch.compiler.is_compiling() and isinstance(state.step, int):
        return (*state.slots, *state.counters)
    return (*state.slots, *state.counters, "step")


tree.register_node(OptState, _flatten, _unflatten, _entries)
