"""What is given instead of a loss, and losses of something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torchopt.base.misuse.given import given, is_number, short


def not_a_loss(value: Any) -> str:
    """Return the message for something that is given instead of a loss."""
    advice = ""
    if callable(value):
        advice = " Call it: step(closure())."
    elif is_number(value):
        advice = " Give the tensor itself, without item()."
    elif value is None:
        advice = " Does the function that computes it return it?"
    elif isinstance(value, (Mapping, list, tuple)):
        advice = " Its parts have to be added up; the loss comes first: step(loss)."
    return f"step expects the loss as a tensor, got {type(value).__name__}.{advice}"


def unrelated_loss(loss: Tensor, params: Sequence[Tensor]) -> str:
    """Say of which tensors a loss is that depends on no present parameter."""
    found = _leaves_behind([loss])
    before = _leaves_behind(params)
    message = "The loss does not depend on the present parameters."
    if found.keys() & before.keys():
        return (
            f"{message} It seems to be that of earlier weights of the network, from before the "
            "last step or outside of the inner_loop block: compute it again before each step, "
            "inner.step(loss_of(net))."
        )
    if not found:
        return f"{message} It was made without them: compute it again before each step."
    first = short(next(iter(found.values())))
    return (
        f"{message} It depends on others, such as {first}: those of another network, or "
        "weights that were replaced since (by a step under no_grad, stop_gradient or "
        "recover_state_dict); compute it again from those that are to be updated."
    )


def _leaves_behind(tensors: Sequence[Tensor], most: int = 5000) -> dict[int, Tensor]:
    """Return the leaves that tensors were computed from, of the first nodes of their graph."""
    leaves = {id(x): x for x in tensors if x.grad_fn is None}
    queue: list[Any] = [x.grad_fn for x in tensors if x.grad_fn is not None]
    seen = set(queue)
    while queue and len(seen) < most:
        node = queue.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            leaves[id(leaf)] = leaf
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        queue += following
    return leaves


def check_closure(closure: Any, optimizer: object) -> None:
    """Refuse a loss given instead of a closure.

    Raises:
        TypeError: With what to type.
    """
    if not callable(closure):
        name = type(optimizer).__name__
        raise TypeError(
            f"{name}.step expects a function that computes the loss, or nothing, got "
            f"{given(closure)}. Write optimizer.zero_grad(), loss.backward(), optimizer.step(). "
            f"Only a differentiable optimizer (torchopt.Meta{name}) steps by step(loss)."
        )
