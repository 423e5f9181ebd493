"""What the state functions refuse, for they could do nothing with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree


#: What to do instead with an optimizer that changes parameters in place.
_INSTEAD = {
    "extract_state_dict": "Write copy.deepcopy(optimizer.state_dict()).",
    "recover_state_dict": "Write optimizer.load_state_dict(state).",
    "stop_gradient": "Its steps record no graph, so that there is none to cut.",
    "module_clone": "Make a new one and load_state_dict(optimizer.state_dict()).",
}


def check_tree(function: str, target: Any) -> None:
    """Refuse a tree whose leaves have a state of their own, or a leaf that holds no tensors.

    Raises:
        TypeError: Saying what to give instead.
    """
    leaves = tree.flatten(target)[0]
    for position, leaf in enumerate(leaves):
        if leaf is None or isinstance(leaf, Tensor):
            continue
        if callable(getattr(leaf, "state_dict", None)):
            where = "" if tree.is_leaf(target) else f" at {tree.leaf_names(target)[position]!r}"
            raise TypeError(_with_a_state(function, leaf, where))
    if len(leaves) == 1 and tree.is_leaf(target) and not _is_value(target):
        raise TypeError(
            f"{function} takes a module, a MetaOptimizer or a tree of tensors, got "
            f"{_named(target)}. Give parameters as list(net.parameters()) or "
            "dict(net.named_parameters())."
        )


def _is_value(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, (Tensor, int, float))


def _named(value: Any) -> str:
    kind = type(value).__name__
    return f"the string {value!r:.60}" if isinstance(value, str) else f"a {kind}"


def _with_a_state(function: str, leaf: Any, where: str) -> str:
    kind = type(leaf).__name__
    if isinstance(leaf, torch.optim.Optimizer):
        return (
            f"{function} takes a module, a MetaOptimizer or a tree of tensors, got {kind}{where}, "
            "which changes its parameters in place and has a state_dict() of its own. "
            f"{_INSTEAD[function]}"
        )
    if not where:
        return (
            f"{function} takes a module, a MetaOptimizer or a tree of tensors, got {kind}. Use its "
            "state_dict() and load_state_dict(state)."
        )
    return (
        f"{function} takes a tree of tensors, or one module or MetaOptimizer, got {kind}{where}. "
        "Call it for each of them."
    )
