"""Extract, recover, stop gradients, clone: for modules, meta-optimizers and trees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import (
    Any,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
    overload,
    runtime_checkable,
)

import torch
from torch import Tensor, nn
from typing_extensions import TypeAlias

from torchopt.base import misuse, tree
from torchopt.core.opt_state import OptState
from torchopt.nn import marks, moments
from torchopt.nn.copying import Copier, CopiesHistory
from torchopt.nn.matching import check_places, check_shape
from torchopt.nn.parameters import named_places, parameter_sites, place_all, place_each
from torchopt.nn.targets import check_tree
from torchopt.typing import PyTree


T = TypeVar("T")
By: TypeAlias = Literal["reference", "copy", "deepcopy"]


class ModuleState(NamedTuple):
    """The tensors of a module by dotted name, tied ones under each of their names.

    Example:
        >>> import torch, torchopt
        >>> state = torchopt.extract_state_dict(torch.nn.Linear(2, 1))
        >>> {name: tuple(tensor.shape) for name, tensor in state.params.items()}
        {'weight': (1, 2), 'bias': (1,)}
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor] | None  # None: extracted with_buffers=False
    visual_contents: dict[str, Tensor] | None = None  # for make_dot: extracted enable_visual=True
    detach_buffers: bool = False


@runtime_checkable
class HoldsState(Protocol):
    """What has an optimizer state of its own: :class:`torchopt.MetaOptimizer`."""

    def extract_state(self) -> tuple[OptState, ...]:
        """Return the state by reference."""
        ...

    def recover_state(self, state: Any) -> None:
        """Go back to an extracted state."""
        ...

    def clone(self, clone_module: Callable[[nn.Module], nn.Module]) -> HoldsState:
        """Return an optimizer of the same state over clones of its modules."""
        ...


@overload
def extract_state_dict(
    target: nn.Module,
    *,
    by: By = "reference",
    device: torch.device | str | int | None = None,
    with_buffers: bool = True,
    detach_buffers: bool = False,
    enable_visual: bool = False,
    visual_prefix: str = "",
) -> ModuleState: ...
@overload  # first: it has any attribute, so that checkers may take it for what holds a state
def extract_state_dict(
    target: OptState, *, by: By = "reference", device: torch.device | str | int | None = None
) -> OptState: ...
@overload
def extract_state_dict(
    target: HoldsState,
    *,
    by: By = "reference",
    device: torch.device | str | int | None = None,
    enable_visual: bool = False,
    visual_prefix: str = "",
) -> tuple[OptState, ...]: ...
@overload
def extract_state_dict(
    target: T, *, by: By = "reference", device: torch.device | str | int | None = None
) -> T: ...
def extract_state_dict(
    target: Any,
    *,
    by: By = "reference",
    device: torch.device | str | int | None = None,
    with_buffers: bool = True,
    detach_buffers: bool = False,
    enable_visual: bool = False,
    visual_prefix: str = "",
) -> Any:
    """Return the tensors of a module, a meta-optimizer or a tree, to go back to them later.

    Args:
        target: An ``nn.Module``, a :class:`torchopt.MetaOptimizer`, or any pytree of tensors, such
            as parameters or an :class:`~torchopt.OptState`.
        by: ``"reference"`` keeps the tensors themselves; ``"copy"`` clones them, connected to the
            originals in the graph; ``"deepcopy"`` clones and detaches. Tied tensors stay tied.
        device: Move the tensors there.
        with_buffers: Include buffers (BatchNorm statistics); modules only.
        detach_buffers: Clone buffers now and at every recovery, so that a module that updates them
            in place does not change the extracted state; modules only.
        enable_visual: Let the state carry the names of its tensors for
            :func:`torchopt.visual.make_dot`; modules and meta-optimizers only.
        visual_prefix: What these names begin with, such as ``"step1."``.

    Returns:
        A :class:`ModuleState`, a tuple with one :class:`~torchopt.OptState` per parameter group,
        or a tree like ``target``.

    Raises:
        ValueError: If ``by`` is another word, or a tree is to carry names.
        TypeError: If there are no tensors to take, as in a :class:`torchopt.Optimizer`, whose
            ``state_dict()`` they are.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> inner = torchopt.MetaSGD(net, lr=0.1)
        >>> state = torchopt.extract_state_dict(net)
        >>> inner.step(net(torch.ones(1, 2)).sum())
        >>> torchopt.recover_state_dict(net, state)
        >>> isinstance(net.weight, torch.nn.Parameter) and net.weight.is_leaf
        True
    """
    copier = Copier(by, device)
    if isinstance(target, nn.Module):
        params = {name: copier(t) for name, _, _, t in named_places(target, "_parameters")}
        places = named_places(target, "_buffers") if with_buffers else ()
        buffers = {name: copier.buffer(t, detach_buffers) for name, _, _, t in places}
        visual = _prefixed(visual_prefix, {**params, **buffers}) if enable_visual else None
        return ModuleState(params, buffers if with_buffers else None, visual, detach_buffers)
    if isinstance(target, HoldsState):
        states = tuple(tree.tree_map(copier, state) for state in target.extract_state())
        for position, state in enumerate(states if enable_visual else ()):
            prefix = visual_prefix if len(states) == 1 else f"{visual_prefix}{position}."
            state.__dict__["visual_contents"] = _prefixed(prefix, tree.named_leaves(state.slots))
        return states
    check_tree("extract_state_dict", target)
    if enable_visual or visual_prefix:
        raise ValueError(
            "enable_visual is for modules and meta-optimizers. Give make_dot a dict of names and "
            f"tensors instead of a {type(target).__name__}."
        )
    return tree.tree_map(copier, target)


def _prefixed(prefix: str, tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in tensors.items() if isinstance(x, Tensor)}


@overload
def recover_state_dict(target: nn.Module, state: ModuleState) -> None: ...
@overload
def recover_state_dict(target: HoldsState, state: Sequence[OptState]) -> None: ...
@overload
def recover_state_dict(target: T, state: T) -> T: ...
def recover_state_dict(target: Any, state: Any) -> Any:
    """Put an extracted state back.

    Args:
        target: The module or meta-optimizer to put it into, or a tree, whose dicts, lists and
            optimizer states are changed in place.
        state: What :func:`extract_state_dict` returned for it, or for another of its structure.

    Returns:
        ``None``; for a tree, a tree of the structure of ``target`` with the tensors of ``state``.

    Raises:
        ValueError: If ``state`` has another structure, naming the first path that differs. Nothing
            has changed then.
        TypeError: If ``state`` is no extracted state of such a target, or ``target`` is something
            else, such as a :class:`torchopt.Optimizer`, which has its ``load_state_dict``.

    Example:
        >>> import torch, torchopt
        >>> params = {"w": torch.tensor([1.0])}
        >>> state = torchopt.extract_state_dict(params, by="deepcopy")
        >>> _ = params["w"].add_(1.0)
        >>> torchopt.recover_state_dict(params, state)
        {'w': tensor([1.])}
    """
    if isinstance(target, nn.Module):
        _recover_module(target, state)
        return None
    if isinstance(target, HoldsState):
        target.recover_state(state)
        return None
    misuse.check_recovered(target, state)
    check_tree("recover_state_dict", target)
    leaves, spec = tree.flatten(target)
    values = tree.flatten_like(state, target, spec, "The leaves of the state", "the target")
    names = tree.leaf_names(target)
    for name, old, new in zip(names, leaves, values):
        check_shape(name, old, new)
    check_places((), target, state)
    return _put_back(target, state)


def _recover_module(module: nn.Module, state: Any) -> None:
    if not isinstance(state, ModuleState):
        raise TypeError(misuse.not_a_module_state(state))
    params = {name: t for name, _, _, t in named_places(module, "_parameters")}
    buffers = {name: t for name, _, _, t in named_places(module, "_buffers")}
    for what, own, given in (
        ("parameters", params, state.params),
        ("buffers", buffers, state.buffers),
    ):
        if given is None:
            continue  # extracted with_buffers=False
        if own.keys() != given.keys():
            difference = tree.first_difference(list(given), list(own))
            raise ValueError(f"The {what} of the state do not match the module: {difference}.")
        for name in own:
            check_shape(name, own[name], given[name])
    kept = {n: b.clone() if state.detach_buffers else b for n, b in (state.buffers or {}).items()}
    place_all(module, state.params, kept)


def _put_back(target: Any, state: Any) -> Any:
    """Write ``state`` into the mutable containers of ``target`` and return what stands there."""
    if isinstance(target, OptState):
        target.step = _put_back(target.step, state.step)
        target.slots = _put_back(target.slots, state.slots)
        target.counters = _put_back(target.counters, state.counters)
    elif isinstance(target, dict):
        for key in target:
            target[key] = _put_back(target[key], state[key])
    elif isinstance(target, list):
        target[:] = [_put_back(old, new) for old, new in zip(target, state)]
    elif isinstance(target, tuple):
        values = [_put_back(old, new) for old, new in zip(target, state)]
        return type(target)(*values) if hasattr(target, "_fields") else type(target)(values)
    elif not tree.is_leaf(target):  # a registered class is rebuilt
        return tree.unflatten(tree.flatten(target)[1], tree.flatten(state)[0])
    else:
        return state
    return target


def stop_gradient(target: T) -> T:
    """Cut the graph behind a module, a meta-optimizer or a tree: its tensors become leaves.

    Values and ``requires_grad`` stay. In a module, weights with history become parameters again.
    Call it after each outer step when the inner optimization continues from where it is (as in
    meta-gradient reinforcement learning), for the network and for its optimizer.

    Args:
        target: An ``nn.Module``, a :class:`torchopt.MetaOptimizer` (its state; its network is a
            target of its own), an extracted state, or a pytree of tensors, which are detached in
            place.

    Returns:
        ``target``.

    Raises:
        ValueError: If a tensor of a tree is a view with history, which cannot be detached in place.
        TypeError: If there is nothing to cut, as in a :class:`torchopt.Optimizer`.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> inner = torchopt.MetaAdam(net, lr=0.1)
        >>> inner.step(net(torch.ones(1, 2)).sum())
        >>> net.weight.is_leaf
        False
        >>> _ = torchopt.stop_gradient(net), torchopt.stop_gradient(inner)
        >>> net.weight.is_leaf
        True
    """
    if isinstance(target, nn.Module):
        for site in parameter_sites(target).values():
            old = site.tensor
            if old.grad_fn is not None:
                leaf = nn.Parameter(old.detach(), requires_grad=old.requires_grad)
                marks.carry(old, leaf)
                place_each([site], [leaf])
        for _, owner, attribute, buffer in named_places(target, "_buffers"):
            if buffer.grad_fn is not None:
                moments.put(owner, "_buffers", attribute, buffer.detach())
    elif isinstance(target, HoldsState):
        states = target.extract_state()
        # without requires_grad: an outer backward() would fill the grad of every moment
        target.recover_state(tuple(tree.tree_map(_detached, state) for state in states))
    else:
        check_tree("stop_gradient", target)
        _detach_leaves(target)
    return target


def _detached(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.grad_fn is None:
        return value
    return value.detach()


def _detach_leaves(target: PyTree) -> None:
    leaves, names = tree.flatten(target)[0], tree.leaf_names(target)
    recorded = [
        (name, leaf)
        for name, leaf in zip(names, leaves)
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None
    ]
    for name, leaf in recorded:
        if leaf._is_view():
            raise ValueError(
                f"The tensor at {tree.quoted(name)} is a view with history and cannot be "
                "detached in "
                "place; take its detach() instead."
            )
    for _, leaf in recorded:
        leaf.detach_().requires_grad_(True)


def module_clone(
    target: T,
    *,
    by: By = "reference",
    detach_buffers: bool = False,
    device: torch.device | str | int | None = None,
) -> T:
    """Return a new module, meta-optimizer or tree that holds the same tensors or copies of them.

    Args:
        target: An ``nn.Module``, a :class:`torchopt.MetaOptimizer` or a pytree of tensors.
        by: As in :func:`extract_state_dict`: ``"reference"``, ``"copy"`` or ``"deepcopy"``.
        detach_buffers: Give the clone buffers of its own; modules only.
        device: Move the tensors of the clone there.

    Raises:
        ValueError: If ``by`` is another word.
        TypeError: If ``target`` is something else, such as a :class:`torchopt.Optimizer`.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> clone = torchopt.module_clone(net, by="copy")
        >>> clone.weight.grad_fn is not None
        True
    """
    if isinstance(target, nn.Module):
        state = extract_state_dict(target, by=by, device=device, detach_buffers=detach_buffers)
        shared = {
            id(t): t
            for kind in ("_parameters", "_buffers")
            for _, _, _, t in named_places(target, kind)
        }
        with CopiesHistory(Copier(by, device)):
            cloned = copy.deepcopy(target, dict(shared))
        recover_state_dict(cloned, state)
        return cloned
    if isinstance(target, HoldsState):
        cloned: Any = target.clone(
            lambda module: module_clone(module, by=by, device=device, detach_buffers=detach_buffers)
        )
        cloned.recover_state(extract_state_dict(target, by=by, device=device))
        return cloned
    check_tree("module_clone", target)
    return extract_state_dict(target, by=by, device=device)
