"""A live optimizer of ``torch.optim`` as a functional transformation."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.base.misuse.given import given
from torchopt.base.recording import is_recorded
from torchopt.base.torch_internals import in_forward_mode
from torchopt.core.pair import Pair
from torchopt.core.transform import GradientTransformation
from torchopt.optim.optimizer import Optimizer
from torchopt.typing import PyTree


#: What torch calls an optimizer's method is sometimes replaced on the object: schedulers do.
_OWN = ("step", "zero_grad")


class FromTorch:
    """The two functions of :func:`from_torch`, which read a live optimizer and leave it alone."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def _title(self) -> str:
        return f"from_torch({type(self.optimizer).__name__})"

    def init(self, params: PyTree) -> dict[str, dict[str, Any]]:
        """Return what the optimizer keeps of its parameters now, copied, by parameter name."""
        leaves = tree.named_leaves(params)
        own = self._own_of(leaves)
        state = self.optimizer.state
        return {name: _copied(state.get(p, {})) if p is not None else {} for name, p in own.items()}

    def update(
        self, updates: PyTree, state: Any, params: PyTree = None, *, inplace: bool = True
    ) -> tuple[PyTree, dict[str, dict[str, Any]]]:
        """Let a copy of the optimizer take its step from copies of parameters and state."""
        if params is None or all(p is None for p in tree.flatten(params)[0]):
            raise ValueError(
                f"{self._title} needs the parameters: call update(grads, state, params)."
            )
        g, spec = tree.flatten(updates)
        names = tree.leaf_names(updates)
        p = tree.flatten_like(params, updates, spec, "params", "grads")
        self._check_state(state, names)
        self._refuse_recorded(g, state, p, inplace)
        copies = {n: x.detach().clone() for n, x in zip(names, p) if isinstance(x, Tensor)}
        for name, grad in zip(names, g):
            if grad is not None:
                if name not in copies:
                    raise ValueError(f"{tree.quoted(name)} has a gradient and no parameter.")
                copies[name].grad = grad.detach().clone()
        twin = self._twin(copies, state)
        with torch.no_grad():
            twin.step()
            moved = [
                None if grad is None else copies[n] - x.detach() for n, grad, x in zip(names, g, p)
            ]
        after = {n: dict(twin.state.get(copies[n], {})) if n in copies else {} for n in state}
        return tree.unflatten(spec, moved), after

    def _twin(
        self, params: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> torch.optim.Optimizer:
        """Return an optimizer like the live one over other parameters, with a copied state."""
        twin = object.__new__(type(self.optimizer))
        vars(twin).update({k: v for k, v in vars(self.optimizer).items() if k not in _OWN})
        places = self._groups_of(list(state))
        twin.param_groups = [
            {
                **{name: _copied(value) for name, value in group.items() if name != "params"},
                "params": [params[n] for n, place in places.items() if place == k and n in params],
            }
            for k, group in enumerate(self.optimizer.param_groups)
        ]
        twin.state = defaultdict(dict)
        for name, entry in state.items():
            if entry and name in params:
                twin.state[params[name]] = _copied(entry)
        return twin

    def _check_state(self, state: Any, names: list[str]) -> None:
        if not isinstance(state, Mapping) or set(state) != set(names):
            found = list(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"The state of {self._title} must be what init returned for the same parameters, "
                f"{misuse.some(names)}, got {found}."
            )

    def _refuse_recorded(self, g: list[Any], state: Any, p: list[Any], inplace: bool) -> None:
        hyperparameters = [
            value
            for group in self.optimizer.param_groups
            for name, value in group.items()
            if name != "params"
        ]
        inputs = {
            "grads": (g, True),
            "state": (tree.flatten(dict(state))[0], True),
            "hyperparameters": (tree.flatten(hyperparameters)[0], True),
            "params": (p, not inplace),
        }
        forward = in_forward_mode()
        for what, (values, leaves_count) in inputs.items():
            if any(is_recorded(value, leaves_count, forward) for value in values):
                name = type(self.optimizer).__name__
                raise RuntimeError(
                    f"{self._title} has no derivative, and one is being recorded through {what}: "
                    "torch.optim computes in place, and its differentiable=True is not exact. "
                    f"Take the transformation of this library (torchopt.{name.lower()}, if there "
                    "is one), or run under torch.no_grad()."
                )

    def _own_of(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Return the optimizer's own parameter for each leaf, ``None`` if that does not matter.

        Raises:
            ValueError: If it does, and they are other parameters.
        """
        groups, state = self.optimizer.param_groups, self.optimizer.state
        own = [p for group in groups for p in group["params"]]
        matter = len(groups) > 1 or any(state.get(p) for p in own)
        named = self._names()
        if named is not None and set(named) == set(leaves):
            own = [named[name] for name in leaves]
        alike = len(own) == len(leaves) and all(
            x is None or (isinstance(x, Tensor) and x.shape == p.shape)
            for x, p in zip(leaves.values(), own)
        )
        if not alike and matter:
            shapes = [tuple(p.shape) for p in own]
            found = {n: tuple(x.shape) for n, x in leaves.items() if isinstance(x, Tensor)}
            why = "a state" if len(groups) == 1 else "parameter groups"
            raise ValueError(
                f"{self._title} has {why} for parameters of shapes {misuse.some(shapes)}, got "
                f"{misuse.short(found)}. Give init the parameters of that optimizer, in its order."
            )
        return dict(zip(leaves, own)) if alike else dict.fromkeys(leaves)

    def _names(self) -> dict[str, Any] | None:
        """Return the optimizer's parameters by name, if it was made over named ones."""
        groups = self.optimizer.param_groups
        if not all("param_names" in group for group in groups):
            return None
        pairs = [(n, p) for g in groups for n, p in zip(g["param_names"], g["params"])]
        return dict(pairs)

    def _groups_of(self, names: list[str]) -> dict[str, int]:
        """Return the number of the group of each parameter; names are in the order of ``init``."""
        groups = self.optimizer.param_groups
        if len(groups) == 1:
            return dict.fromkeys(names, 0)
        known = self._names()
        if known is not None and set(known) == set(names):
            return {n: k for k, group in enumerate(groups) for n in group["param_names"]}
        numbers = [k for k, group in enumerate(groups) for _ in group["params"]]
        if len(numbers) != len(names):
            raise ValueError(
                f"{self._title} has {len(numbers)} parameters by now, and the state has "
                f"{len(names)}: call init again."
            )
        return dict(zip(names, numbers))


def _copied(value: Any) -> Any:
    """Return a tree with tensors of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copied(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(_copied, value))
    return value


def from_torch(optimizer: torch.optim.Optimizer) -> GradientTransformation:
    """Return the step of a live ``torch.optim`` optimizer as a functional transformation.

    For optimizers that this library lacks, including those of third parties: they only have to work
    through ``param_groups``, ``state`` and ``p.grad``, as all of torch's do except L-BFGS. It is
    pure: each update lets a copy of the optimizer step copies of the parameters, and returns how
    far they moved. The optimizer itself, its parameters and its state do not change; its groups are
    read at each update, so a scheduler of the optimizer sets the learning rate here, too. ``init``
    starts with a copy of the optimizer's current state.

    It is a pair of functions (``GradientTransformation(init, update)``), and so can be a part of
    :func:`torchopt.chain`, :func:`torchopt.masked` and the other APIs. It is **not
    differentiable**: where a derivative would be recorded through an update it is refused.

    Args:
        optimizer: The optimizer. If it has several groups, or a state, the parameters that are
            given to ``init`` must be like its own: by name, if it was made over
            ``named_parameters()``, else in its order. Otherwise they may be any.

    Raises:
        TypeError: If it is no optimizer of torch, or one of this library, which has its
            transformation.
        ValueError: If its step needs a closure (L-BFGS).

    State: that of the optimizer, as a dict of dicts by parameter name.

    Example:
        >>> import torch, torchopt
        >>> w = torch.tensor([1.0, -2.0])
        >>> tx = torchopt.from_torch(torch.optim.Rprop([w], lr=0.1))
        >>> params = {"w": w}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(params, state, params)  # the gradient of a square
        ...     params = torchopt.apply_updates(params, updates, inplace=False)
        >>> params, w
        ({'w': tensor([ 0.7800, -1.7800])}, tensor([ 1., -2.]))
    """
    if isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} is an optimizer of torchopt: its transformation is "
            "optimizer.transformation."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"from_torch expects an optimizer, such as torch.optim.Rprop(net.parameters()), got "
            f"{given(optimizer)}."
        )
    step = inspect.signature(type(optimizer).step).parameters
    closure = step.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"The step of {type(optimizer).__name__} needs a closure that evaluates the loss, and "
            "an update has none. For L-BFGS there is torchopt.solvers."
        )
    functions = FromTorch(optimizer)
    return Pair(functions.init, functions.update)
