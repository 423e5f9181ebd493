"""The state of an optimizer in the functional face."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchopt import tree
from torchopt.state_parts import parts_of
from torchopt.typing import PyTree, TensorTree
from torchopt.values import describe


class OptState:
    """What an optimizer remembers between two updates.

    Attributes:
        step: How many gradients the parameters have received: one ``int`` for all. It becomes a
            tree of ints with the structure of the parameters once they differ (a gradient was
            ``None``), and may be a 0-d tensor where a graph must not be specialised on it.
        slots: Named buffers under ``torch.optim``'s names (``exp_avg``, ``momentum_buffer``, ...),
            each a tree with the structure of the parameters. Also readable as attributes.

    Indexing and iteration give the parts as TorchOpt 0.7.3 named them (``state[0].mu``), the step
    count last (``state[-1].count``); a tuple of such parts is accepted where a state is.

    It is a pytree node for optree and for ``torch.func``; an int ``step`` is part of the structure.

    Example:
        >>> import torch, torchopt
        >>> state = torchopt.adam().init({"w": torch.randn(2, 3)})
        >>> state
        OptState(step=0, exp_avg={'w': float32[2, 3]}, exp_avg_sq={'w': float32[2, 3]})
        >>> state.exp_avg["w"].shape
        torch.Size([2, 3])
    """

    def __init__(self, step: PyTree, slots: dict[str, TensorTree]) -> None:
        self.step = step
        self.slots = slots

    def __getattr__(self, name: str) -> TensorTree:
        slots = self.__dict__.get("slots", {})
        if name in slots:
            return slots[name]
        raise AttributeError(f"OptState has no attribute or slot {name!r}; slots: {list(slots)}")

    def __iter__(self) -> Iterator[Any]:
        return iter(parts_of(self.step, self.slots))

    def __len__(self) -> int:
        return len(parts_of(self.step, self.slots))

    def __getitem__(self, index: Any) -> Any:
        return parts_of(self.step, self.slots)[index]

    def __repr__(self) -> str:
        parts = [f"step={describe(self.step)}"]
        parts += [f"{name}={describe(value)}" for name, value in self.slots.items()]
        return f"OptState({', '.join(parts)})"


def _flatten(state: OptState) -> tuple[list[Any], Any]:
    names = tuple(state.slots)
    children = [state.slots[name] for name in names]
    if isinstance(state.step, int):
        return children, (names, state.step)
    return [*children, state.step], (names, None)


def _unflatten(metadata: Any, children: Any) -> OptState:
    names, step = metadata
    children = list(children)
    if step is None:
        step = children.pop()
    return OptState(step, dict(zip(names, children)))


def _entries(state: OptState) -> tuple[str, ...]:
    return (*state.slots, *(() if isinstance(state.step, int) else ("step",)))


tree.register_node(OptState, _flatten, _unflatten, _entries)
