"""What stands in the place of a tree, of parameters or of a network."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torchopt.misuse.given import given, is_optimizer, is_read_once, some


def not_a_module(value: Any, where: str) -> str:
    """Return the message for something that stands in the place of a network."""
    what = given(value)
    if isinstance(value, Mapping):
        what = f"a dict without the key 'params', but {some(list(value))}"
    elif not isinstance(value, (type, nn.Module)) and not is_optimizer(value):
        what = type(value).__name__
    return (
        f"{where} expects an nn.Module (the network, not its parameters), got {what}. "
        f"Write {where}(net, ...)."
    )


def check_parameters(params: Any, where: str) -> None:
    """Refuse a network, or a transformation, in the place of parameters.

    Raises:
        TypeError: With what to give.
    """
    if isinstance(params, nn.Module):
        if not isinstance(params, (nn.ParameterList, nn.ParameterDict)):
            raise TypeError(
                f"{where} expects parameters, got {given(params)}. Write "
                f"{where}(net.parameters(), ...); torchopt.MetaOptimizer takes a network."
            )
    elif hasattr(params, "hyper_specs"):
        raise TypeError(
            f"{where} expects parameters first, got a transformation. Write "
            f"{where}(net.parameters(), tx)."
        )


def instead_of_tree(value: Any) -> str:
    """Return what to type instead of something that is no tree; the empty string if it is one."""
    if is_read_once(value):
        return (
            "It can be read only once, or in no order: give a tree of tensors, such as "
            "list(net.parameters()) or dict(net.named_parameters())."
        )
    if isinstance(value, nn.Module):
        return "Give a tree of its tensors: dict(net.named_parameters())."
    if _is_pair(value):
        return (
            "update and apply_gradients return two things: write updates, state = tx.update(...)."
        )
    if type(value).__name__ == "OptState":
        return "The order is update(grads, state, params)."
    if isinstance(value, (types.FunctionType, types.MethodType)):
        return "Give the tensors themselves, such as torch.func.grad(function)(params)."
    return ""


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and type(value[1]).__name__ == "OptState"


def check_trees(trees: Mapping[str, Any]) -> None:
    """Refuse what is no tree: an iterator, a network, the pair that ``update`` returned.

    Raises:
        TypeError: With what to give.
    """
    for what, value in trees.items():
        advice = instead_of_tree(value)
        if not advice:
            continue
        shown = given(value)
        if _is_pair(value):
            shown = "the pair (updates, state)"
        elif type(value).__name__ == "OptState":
            shown = "an OptState"
        raise TypeError(f"{what} must be a tree of tensors, got {shown}. {advice}")


def advice_for_leaf(value: Any) -> str:
    """Return what to give instead of a leaf that is no tensor, as one more sentence."""
    advice = instead_of_tree(value)
    return f" {advice}" if advice else ""


def different_kinds(what: str, tree: Any, like: str, reference: Any) -> str:
    """Say so if one of two trees is a single tensor, and the other is not, as one more sentence."""
    if isinstance(tree, Tensor) == isinstance(reference, Tensor):
        return ""
    words = f" Given were {what}: {given(tree)}, and {like}: {given(reference)}."
    single = tree if isinstance(tree, Tensor) else reference
    if single.dim() == 0 and single.requires_grad:
        words += " A loss is differentiated first: torch.autograd.grad(loss, leaves)."
    return words


def check_target(target: Any, where: str) -> None:
    """Refuse an iterator, on which a state function would do nothing.

    Raises:
        TypeError: With what to give.
    """
    if is_read_once(target):
        raise TypeError(
            f"{where} expects a module, a meta-optimizer or a tree of tensors, got "
            f"{given(target)}. {instead_of_tree(target)}"
        )


def no_state(value: Any) -> str:
    """Return the message for something that stands in the place of an ``OptState``."""
    if _is_pair(value):
        return (
            "update expects the state that init returned, got a tuple: the pair of updates and "
            "state that update returned. Write updates, state = tx.update(grads, state, params)."
        )
    return (
        f"update expects the state that init returned, got {type(value).__name__}. Begin with "
        "state = tx.init(params); the order is update(grads, state, params)."
    )


def check_recovered(target: Any, state: Any) -> None:
    """Refuse arguments of ``recover_state_dict`` in the other order.

    Raises:
        TypeError: With what to type.
    """
    holder = "net" if isinstance(state, nn.Module) else "optimizer"
    if isinstance(state, nn.Module) or hasattr(type(state), "extract_state"):
        raise TypeError(
            f"recover_state_dict got its arguments in the other order: {type(target).__name__} "
            f"and {given(state)}. Write recover_state_dict({holder}, state)."
        )


def not_a_module_state(state: Any) -> str:
    """Return the message for something that stands in the place of a ``ModuleState``."""
    advice = "Write state = torchopt.extract_state_dict(net) beforehand."
    if isinstance(state, Mapping):
        advice = "For a state_dict() there is net.load_state_dict(state)."
    elif isinstance(state, tuple) and state and type(state[0]).__name__ == "OptState":
        advice = "This one is an optimizer's: write recover_state_dict(optimizer, state)."
    return (
        "The state of a module must be what extract_state_dict(module) returned, got "
        f"{given(state) if isinstance(state, nn.Module) else type(state).__name__}. {advice}"
    )


def not_an_optimizer_state(state: Any, optimizer: Any) -> str:
    """Return the message for something that stands in the place of an optimizer's state."""
    advice = "Write state = torchopt.extract_state_dict(optimizer) beforehand."
    if isinstance(state, Mapping):
        advice = "For a state_dict() there is optimizer.load_state_dict(state)."
    elif type(state).__name__ == "ModuleState":
        advice = "This one is a network's: write recover_state_dict(net, state)."
    return (
        f"The state of {type(optimizer).__name__} must be what extract_state_dict returned for "
        f"one, got {type(state).__name__}. {advice}"
    )
