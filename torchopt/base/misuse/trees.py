"""What is given instead of a tree, of parameters or of a network."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torchopt.base.misuse.given import given, is_optimizer, is_read_once, some


def not_a_module(value: Any, where: str) -> str:
    """Return the message for something that is given instead of a network."""
    what = given(value)
    if isinstance(value, Mapping):
        what = f"a dict without the key 'params', but {some(list(value))}"
    elif not isinstance(value, (type, nn.Module)) and not is_optimizer(value):
        what = type(value).__name__
    advice = f"Write {where}(net, ...)."
    if where == "inner_loop" and isinstance(value, (list, tuple)):
        advice = "For several write inner_loop(a, torchopt.MetaSGD([a, b], lr=0.1))."
    return f"{where} expects an nn.Module (the network, not its parameters), got {what}. {advice}"


def check_parameters(params: Any, where: str) -> None:
    """Refuse a network, a transformation, a dict or a method given instead of parameters.

    Raises:
        TypeError: With what to give.
    """
    if isinstance(params, (types.MethodType, types.FunctionType, type(None))):
        called = "Call it: " if params is not None else "Write "
        raise TypeError(
            f"{where} expects parameters, got {given(params)}. {called}{where}(net.parameters())."
        )
    if isinstance(params, Mapping) and "params" not in params:
        raise TypeError(
            f"{where} expects parameters, got a dict. Write {where}(params.items()), or "
            f"{where}([{{'params': ..., 'lr': ...}}]) for groups."
        )
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
            "It can be read only once, or has no order: give a tree of tensors, such as "
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
    if isinstance(value, types.MethodType):
        return "Call it, and give a tree: dict(net.named_parameters())."
    if isinstance(value, types.FunctionType):
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
    """Say so if two trees are of different kinds to begin with, as one more sentence."""
    kinds = (Tensor, Mapping, type(None), (list, tuple))
    if any(isinstance(tree, kind) and isinstance(reference, kind) for kind in kinds):
        return ""
    words = f" The first is {given(tree)}, the second {given(reference)}."
    for single in (tree, reference):
        if isinstance(single, Tensor) and single.dim() == 0 and single.requires_grad:
            words += " A loss is differentiated first: torch.autograd.grad(loss, leaves)."
    if isinstance(tree, Mapping) and isinstance(reference, (list, tuple)):
        words += f" Name them alike: dict(zip({what}, {like}))." if what == "params" else ""
    return words


def check_group(group: object, where: str) -> None:
    """Refuse a parameter group without parameters, or with a network.

    Raises:
        TypeError: With what to give.
    """
    if isinstance(group, Mapping):
        if "params" not in group:
            raise TypeError(
                f"{where} expects groups with the key 'params', got one with {some(list(group))}. "
                "Write {'params': net.parameters(), 'lr': ...}."
            )
        check_parameters(group["params"], where)


def with_history(where: str) -> str:
    """Return the message for parameters that a differentiable optimizer has put into a network."""
    return (
        f"{where}: can't optimize a non-leaf Tensor. Weights that a differentiable optimizer has "
        "stepped have a history: give this optimizer the parameters before the first such step, "
        "outside of the inner_loop block, or cut it: torchopt.stop_gradient(net)."
    )


def given_params(what: str, params: Any) -> Any:
    """Return the parameter that a rule needs.

    Raises:
        ValueError: If the caller gave none.
    """
    if params is None:
        raise ValueError(f"{what} needs the parameters: call update(grads, state, params).")
    return params


def no_state(value: Any) -> str:
    """Return the message for something that is given instead of an ``OptState``."""
    if _is_pair(value):
        return (
            "update expects the state that init returned, got a tuple: the pair of updates and "
            "state that update returned. Write updates, state = tx.update(grads, state, params)."
        )
    if isinstance(value, (tuple, list)) and value and type(value[0]).__name__ == "OptState":
        return (
            f"update expects the state that init returned, got a {type(value).__name__} of them. "
            "A differentiable optimizer has one for each network: give state[0]."
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
    """Return the message for something that is given instead of a ``ModuleState``."""
    advice = "Write state = torchopt.extract_state_dict(net) beforehand."
    if isinstance(state, Mapping):
        advice = "For a state_dict() there is net.load_state_dict(state)."
    elif isinstance(state, tuple) and state and type(state[0]).__name__ == "OptState":
        advice = "This one is an optimizer's: write recover_state_dict(optimizer, state)."
    return (
        "The state of a module must be what extract_state_dict(module) returned, got "
        f"{given(state) if isinstance(state, nn.Module) else type(state).__name__}. {advice}"
    )


def not_an_optimizer_state(state: Any, optimizer: object) -> str:
    """Return the message for something that is given instead of an optimizer's state."""
    advice = "Write state = torchopt.extract_state_dict(optimizer) beforehand."
    if isinstance(state, Mapping):
        advice = "For a state_dict() there is optimizer.load_state_dict(state)."
    elif type(state).__name__ == "ModuleState":
        advice = "This one is a network's: write recover_state_dict(net, state)."
    return (
        f"The state of {type(optimizer).__name__} must be what extract_state_dict returned for "
        f"one, got {type(state).__name__}. {advice}"
    )
