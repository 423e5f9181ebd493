"""A transformation made of two functions, ``init`` and ``update``, as in Optax and TorchOpt 0.7.3.

Its state is any tree: it need not have a tensor for each parameter, as slots have. So a call takes
the trees of its pairs along (``Call.pairs``) beside the slots, and the APIs keep them.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.numerics import to_compute_dtype
from torchopt.core.apply import apply_updates
from torchopt.core.call_trees import as_list, as_tree
from torchopt.core.engine import Call, Leaves
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation
from torchopt.typing import PyTree, TensorTree


T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False, repr=False, init=False)
class Pair(GradientTransformation):
    """Two functions as a transformation: ``GradientTransformation(init, update)``.

    By itself it is just the two functions, with any tree as state. In :func:`torchopt.chain`,
    :func:`torchopt.masked`, ``Optimizer`` and ``MetaOptimizer`` that tree is kept beside the slots.
    ``update`` is always called with ``inplace=False`` there, if it has such an argument.

    Args:
        init: ``params -> state``.
        update: ``(updates, state, params=None, ...) -> (updates, state)``. Of ``params``,
            ``inplace`` and the extra values of a call it is given those that it has arguments for.

    Example:
        A step that somebody else's number makes smaller. The number comes as an extra value:

        >>> import torch, torchopt
        >>> def init(params):
        ...     return {"calls": 0}
        >>> def update(updates, state, params=None, *, noise=0.0):
        ...     updates = {name: u / (1 + noise) for name, u in updates.items()}
        ...     return updates, {"calls": state["calls"] + 1}
        >>> damped = torchopt.GradientTransformation(init, update)
        >>> tx = torchopt.chain(damped, torchopt.sgd(lr=0.1))
        >>> params = {"w": torch.tensor([1.0])}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, state, params, noise=3.0)
        >>> updates, state.state
        ({'w': tensor([-0.0500])}, {'calls': 1})
    """

    init_fn: Callable[..., Any]
    update_fn: Callable[..., Any]
    #: Whether the functions are given the leaves as a list, as ``chain.flat`` of 0.7.3 does.
    flat: bool = False

    slots = (Slot("state", when=lambda shape, **_: False),)  # no parameter has one of its own

    def __init__(self, init: Callable[..., Any], update: Callable[..., Any]) -> None:
        for name, function in (("init", init), ("update", update)):
            if not callable(function):
                raise TypeError(
                    f"GradientTransformation(init, update) expects two functions, got {function!r} "
                    f"of type {type(function).__name__} as {name}."
                )
        for name, value in (("init_fn", init), ("update_fn", update), ("flat", False)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "use_accelerated_op", None)

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The extra values that ``update`` has arguments for."""
        arguments, everything, _ = _arguments_of(self.update_fn)
        return ("*",) if everything else tuple(arguments)

    def renewed(self, flat: bool | None = None) -> Pair:
        """Return a pair of the same functions with a state of its own."""
        new = Pair(self.init_fn, self.update_fn)
        object.__setattr__(new, "flat", self.flat if flat is None else flat)
        return new

    def with_accelerated_op(self, use_accelerated_op: bool | None) -> GradientTransformation:
        """Return itself: functions of the user's have no kernel."""
        return self

    def whole_slots(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Return that ``"state"`` is this pair's, for all parameters."""
        return {"state": (self, ())}

    # By itself ----------------------------------------------------------------------------------

    def init(self, params: TensorTree) -> Any:
        """Return what the first function returns."""
        return self.init_fn(params)

    def update(
        self,
        grads: T,
        state: Any,
        params: TensorTree | None = None,
        *,
        inplace: bool = True,
        **extra: Any,
    ) -> tuple[T, Any]:
        """Return what the second function returns."""
        return self._call(grads, state, params, {"inplace": inplace, **extra})

    def apply_gradients(
        self,
        grads: TensorTree,
        state: Any,
        params: T,
        *,
        inplace: bool = True,
        **extra: Any,
    ) -> tuple[T, Any]:
        """Take a step: :meth:`update` and :func:`torchopt.apply_updates` in one."""
        updates, state = self.update(grads, state, params, inplace=inplace, **extra)
        return apply_updates(params, updates, inplace=inplace), state

    def _call(self, updates: Any, state: Any, params: Any, further: dict[str, Any]) -> Any:
        arguments, everything, positional = _arguments_of(self.update_fn)
        given = {k: v for k, v in further.items() if everything or k in arguments}
        if everything or "params" in arguments:
            result = self.update_fn(updates, state, params=params, **given)
        elif positional > 2:
            result = self.update_fn(updates, state, params, **given)
        else:
            result = self.update_fn(updates, state, **given)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"{self!r}: update must return (updates, state), got {type(result).__name__}."
            )
        return result

    # As a part of something ----------------------------------------------------------------------

    def first_state(self, call: Call, chosen: frozenset[int] | None) -> PyTree:
        """Return the state for the parameters of a call."""
        params = [
            to_compute_dtype(p.detach()) if isinstance(p, Tensor) and _takes(chosen, i) else None
            for i, p in enumerate(call.p)
        ]
        return self.init_fn(self._tree(call, params))

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """Call the function with trees like the parameters; ``None`` where there is no gradient."""
        call, index = leaves.call, leaves.index
        own = call.pairs[id(self)]
        grads: list[Any] = [None] * len(call.g)
        params = [
            to_compute_dtype(p) if isinstance(p, Tensor) and _takes(own.chosen, i) else None
            for i, p in enumerate(call.p)
        ]
        apart = [g is not None and g.is_complex() for g in call.g]  # as pairs of reals
        for i, g, p in zip(index, leaves.g, leaves.p):
            grads[i] = _joined(g) if apart[i] else g
            params[i] = _joined(p) if apart[i] and p is not None else p
        given = None if all(p is None for p in params) else self._tree(call, params)
        further = {**call.extra, "inplace": False}
        updates, state = self._call(self._tree(call, grads), own.value, given, further)
        results = self._leaves(call, updates)
        for i in index:
            if not isinstance(results[i], Tensor) or results[i].shape != call.g[i].shape:
                raise ValueError(
                    f"{self!r}: update returned {_described(results[i])} for the gradient of "
                    f"{tree.quoted(call.names()[i])}, whose shape is {tuple(call.g[i].shape)}."
                )
        own.value = state
        found = [_parted(results[i]) if apart[i] else results[i] for i in index]
        return found, leaves.slots

    def _tree(self, call: Call, values: list[Any]) -> PyTree:
        return values if self.flat else as_tree(call, values)

    def _leaves(self, call: Call, updates: Any) -> list[Any]:
        what = f"The updates of {self!r}"
        if not self.flat:
            return as_list(call, updates, what, "the grads")
        reference = [None] * len(call.g)
        return tree.flatten_like(updates, reference, tree.flatten(reference)[1], what, "the grads")

    def __repr__(self) -> str:
        names = (getattr(f, "__name__", type(f).__name__) for f in (self.init_fn, self.update_fn))
        return f"GradientTransformation({', '.join(names)})"


def as_transformation(tx: T) -> T | Pair:
    """Return a tuple of two functions as a transformation, anything else as it is."""
    if isinstance(tx, tuple) and len(tx) == 2 and all(map(callable, tx)):
        return Pair(*tx)
    return tx


def _takes(chosen: frozenset[int] | None, i: int) -> bool:
    return chosen is None or i in chosen


def _arguments_of(function: Callable[..., Any]) -> tuple[frozenset[str], bool, int]:
    """Return the keywords of a function, whether it takes any, and how many positions it has."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins have none
        return frozenset({"params", "inplace"}), False, 2
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    keywords = frozenset(p.name for p in parameters if p.kind != p.POSITIONAL_ONLY)
    positional = sum(p.kind in by_position for p in parameters)
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        positional = max(positional, 3)
    return keywords, any(p.kind == p.VAR_KEYWORD for p in parameters), positional


def _joined(x: Tensor) -> Tensor:
    return x if x.is_complex() else torch.view_as_complex(x)


def _parted(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


GradientTransformation.of_functions = Pair
