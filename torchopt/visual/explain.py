"""Say in words how a loss depends on a tensor, or why it does not."""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.visual.choices import choices
from torchopt.visual.elsewhere import outside_of_the_block, passed_by
from torchopt.visual.flow import (
    between,
    first_infinite,
    killers,
    passages,
    why_infinite,
    why_zero,
    word_of,
)
from torchopt.visual.graph import Extraction, extract, output_of
from torchopt.visual.names import named_tensors
from torchopt.visual.operations import OVERWRITTEN, dtype_name, saved_tensors
from torchopt.visual.partial import missing, verdict
from torchopt.visual.unreached import reached_leaves, reasons
from torchopt.visual.walk import walk
from torchopt.visual.words import first_of, place, steps_listed, wrapped


def explain(loss: Tensor, param: Tensor | str, params: Any = None) -> str:
    """Say why a gradient is ``None``, zero or not finite, or by which paths it arrives.

    Nothing changes: no ``grad`` is filled and no graph freed. One or two backward passes are run,
    and hooks that you have registered on tensors run with them.

    Args:
        loss: A scalar, such as an outer loss; before its graph is freed by ``backward()``.
        param: A tensor, such as a meta-parameter, an initial weight ``start["0.weight"]`` or a fast
            weight; or its name in ``params``.
        params: Names for tensors, as :func:`torchopt.visual.make_dot` takes them.

    Returns:
        A few lines to print, wrapped at 90 columns. The first one says that the gradient arrives;
        that it arrives, but only in part (with the place, or the condition where the graph alone
        does not tell); or that it is zero, ``None`` or not finite. The others tell where and why,
        as far as the graph does.

    Raises:
        TypeError: If ``loss`` or ``param`` is of another kind.
        ValueError: If ``loss`` is no scalar, or there is no tensor of that name.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> inner = torchopt.MetaSGD(net, lr=lr.item())
        >>> inner.step(net(torch.ones(3, 2)).square().mean())
        >>> loss = net(torch.ones(3, 2)).square().mean()
        >>> print(torchopt.visual.explain(loss, "lr", {"lr": lr}).splitlines()[0])
        'lr' (shape (), float32): its gradient is None: it is not in the graph of the loss.
    """
    named = named_tensors(params)
    tensor = _tensor_of(param, named)
    _check_loss(loss)
    names = [name for name, other in named if other is tensor]
    what = f"{' = '.join(map(repr, names)) or 'The tensor'} {_kind(tensor)}"
    barred = _no_gradient_at_all(loss, tensor)
    if barred is not None:
        return wrapped([f"{what}: {barred}"])
    if loss is tensor:
        return wrapped([f"{what}: it is the loss itself; its gradient is 1."])
    # a name makes it a node of its own
    found = extract(loss, named if names else [*named, ("the tensor", tensor)])
    output = _position(found, tensor)
    if output is None:
        lines = [
            f"{what}: its gradient is None: it is not in the graph of the loss.",
            *reasons(found, tensor, named),
            *reached_leaves(found),
        ]
        return wrapped(lines)
    lines = [
        *_reached(what, loss, tensor, found, output),
        *outside_of_the_block(found),
        *passed_by(found, tensor),
        *choices(found, tensor, named),
    ]
    return wrapped(lines)


def _tensor_of(param: Any, named: list[tuple[str, Tensor]]) -> Tensor:
    if isinstance(param, Tensor):
        return param
    if not isinstance(param, str):
        raise TypeError(
            f"param must be a tensor or the name of one in params, got {type(param).__name__}."
        )
    for name, tensor in named:
        if name == param:
            return tensor
    known = ", ".join(repr(name) for name, _ in named[:10])
    raise ValueError(
        f"params has no tensor of the name {param!r}; it has {known or 'none at all'}"
        f"{', ...' if len(named) > 10 else ''}."
    )


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor, got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(
            f"loss must be a scalar, got shape {tuple(loss.shape)}; take its mean() or sum()."
        )


def _kind(tensor: Tensor) -> str:
    return f"(shape {tuple(tensor.shape)}, {dtype_name(tensor)})"


def _no_gradient_at_all(loss: Tensor, tensor: Tensor) -> str | None:
    """Return why there can be no gradient, by what the two tensors are."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return (
            "it has no gradient: nothing flows through integers or booleans. Make it a "
            "floating-point tensor that requires grad and let the loss depend on it smoothly."
        )
    if not tensor.requires_grad:
        cure = (
            f"it is a frozen parameter{_steps_without_it(loss)}; call requires_grad_() on it"
            if isinstance(tensor, nn.Parameter)
            else "it was made without requires_grad=True, detached, or computed under "
            "torch.no_grad() or from integers; call requires_grad_() on it, or compute it from "
            "what requires grad"
        )
        return (
            f"it has no gradient, because it does not require grad: {cure}, before the loss "
            "is computed."
        )
    if not (loss.is_floating_point() or loss.is_complex()):
        return (
            f"its gradient is None, because the loss has the type {dtype_name(loss)}: rounding, "
            "argmax, counting and comparing give integers, through which nothing flows."
        )
    if not loss.requires_grad:
        return (
            "its gradient is None, because the loss has no graph at all: it was computed under "
            "torch.no_grad(), detached (.detach(), .item(), torch.tensor(...)), computed from "
            "integers, or from nothing that requires grad. After inner steps under "
            "torch.no_grad() the weights are leaves, and the loss should still have a graph."
        )
    return None


def _steps_without_it(loss: Tensor) -> str:
    """Return which steps have left a frozen parameter as it is."""
    steps = walk([loss.grad_fn]).steps if loss.grad_fn is not None else []
    return f", which {steps_listed(steps)} left as it was" if steps else ""


def _position(found: Extraction, tensor: Tensor) -> tuple[int, int] | None:
    """Return the autograd node and output number of a tensor that the loss depends on."""
    if tensor.grad_fn is None:
        for position, node in enumerate(found.walk.nodes):
            if getattr(node, "variable", None) is tensor:
                return position, 0
        return None
    output = output_of(found.walk, tensor)
    roots = [unit.output for unit in found.units if unit.kind == "result"]
    used = output in roots or any(output in sources for sources in found.walk.inputs)
    return output if used else None


def _reached(
    what: str, loss: Tensor, tensor: Tensor, found: Extraction, output: tuple[int, int]
) -> list[str]:
    try:
        (gradient,) = torch.autograd.grad(loss, [tensor], retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        return _failed(what, found, error)
    word = word_of(gradient)
    on_path = between(found, output)
    cuts = missing(found, tensor, output, on_path, loss)
    cut_lines = first_of([cut.line for cut in cuts], "cuts")
    if word == "finite":
        return [
            f"{what}: {verdict(cuts)}; {_size(gradient)}.",
            *cut_lines,
            *_paths(found, output),
        ]
    seen = passages(loss, tensor, found, on_path, output)
    if word == "infinite":
        culprit = first_infinite(seen)
        lines = [f"{what}: its gradient arrives, but is not finite (nan or infinite)."]
        if culprit is not None:
            lines.append(
                f"* It becomes so at {place(found, culprit)}: {why_infinite(found, culprit)}."
            )
        return [*lines, *cut_lines, *_paths(found, output)]
    value = "exactly zero" if word == "zero" else "None"
    return [
        f"{what}: its gradient is {value}, although it is in the graph of the loss.",
        *_where_it_ends(found, killers(seen)),
        *cut_lines,
        *_paths(found, output),
    ]


def _failed(what: str, found: Extraction, error: RuntimeError) -> list[str]:
    """Explain a backward pass that raises."""
    message = str(error).split(" Hint:")[0]
    if "modified by an inplace operation" in message:
        lines = [
            f"{what}: the backward pass fails: a tensor that it needs was overwritten in place."
        ]
        for position, node in enumerate(found.walk.nodes):
            spoilt = [name for name, saved in saved_tensors(node) if saved == OVERWRITTEN]
            if spoilt:
                lines.append(
                    f"* {place(found, position)} has saved {', '.join(spoilt)}, which has "
                    "been overwritten since."
                )
        lines.append(
            "* Replace the in-place operation (x += y, x.add_(y), x[i] = y, or optimizer.step() "
            "between loss and backward) by one that makes a new tensor (x = x + y), or clone first."
        )
        return [*lines, f"* PyTorch says: {message}"]
    if "backward through the graph a second time" in message or "already been freed" in message:
        return [
            f"{what}: the graph of the loss has been freed by an earlier backward pass.",
            "* Call explain before backward(), or pass retain_graph=True to it.",
        ]
    return [f"{what}: the backward pass fails. PyTorch says: {message}"]


def _size(gradient: Tensor) -> str:
    values = gradient.detach()
    values = values.to_dense() if values.is_sparse else values
    zeros = int((values == 0).sum())
    size = f"its norm is {float(values.abs().square().sum().sqrt()):.3g}"
    return size + (f", {zeros} of its {values.numel()} entries are zero" if zeros else "")


def _where_it_ends(found: Extraction, ends: list[int]) -> list[str]:
    if not ends:
        return [
            "* No single operation is to blame: contributions cancel exactly (as in x - x), or the "
            "gradient becomes too small for its precision."
        ]
    counted = collections.Counter(f"{place(found, end)}: {why_zero(found, end)}" for end in ends)
    lines = [
        f"* The gradient ends at {text}{f' ({count} times)' if count > 1 else ''}."
        for text, count in counted.most_common(8)
    ]
    rest = len(counted) - 8
    return lines if rest < 1 else [*lines, f"* ... and at {rest} more operations."]


def _paths(found: Extraction, output: tuple[int, int]) -> list[str]:
    """Tell by how many paths the tensor reaches the loss, the shortest one, and where it enters."""
    nodes, edges = found.graph.nodes, found.graph.edges
    start = next(
        (key for key, unit in enumerate(found.units) if unit.output == output and unit.names),
        found.node_of[output[0]],
    )
    users: dict[int, list[int]] = collections.defaultdict(list)
    for source, user in edges:
        users[source].append(user)
    counts, distance = [0] * len(nodes), {}
    for key in range(len(nodes) - 1, -1, -1):  # an order of computation, read backwards
        if nodes[key].kind == "result":
            counts[key], distance[key] = 1, (0, None)
        for user in users[key]:
            counts[key] = min(counts[key] + counts[user], _MANY + 1)
            if user in distance and (
                key not in distance or distance[user][0] < distance[key][0] - 1
            ):
                distance[key] = (distance[user][0] + 1, user)
    path, key = [], start
    while key is not None:
        path.append(nodes[key].label.split("\n")[0])
        key = distance[key][1]
    if len(path) > 14:
        path = [*path[:7], "...", *path[-6:]]
    steps = [nodes[user].label for user in users[start] if nodes[user].kind == "step"]
    lines = [f"* Paths to the loss: {_count(counts[start])}. The shortest: {' -> '.join(path)}."]
    if steps:
        more = f" and {len(steps) - 6} more" if len(steps) > 6 else ""
        lines.append(f"* It enters {', '.join(steps[:6])}{more} directly.")
    return lines


#: More paths than these are not counted: their number grows like a power of that of the steps.
_MANY = 1_000


def _count(count: int) -> str:
    return str(count) if count <= _MANY else f"more than {_MANY:,}"
