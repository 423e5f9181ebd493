"""What becomes of a gradient on its way back from a loss to a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.visual.graph import Extraction
from torchopt.visual.operations import is_function_of_others, operation_label, saved_tensors


@dataclass
class Passage:
    """What one autograd node received and handed on, backwards.

    Attributes:
        position: The node, in ``Walk.nodes``.
        received: What its outputs received: ``"none"``, ``"zero"``, ``"finite"`` or ``"infinite"``
            (nan too).
        handed: The same for what it handed on to those of its inputs that lead to the tensor.
    """

    position: int
    received: str
    handed: set[str]


def between(found: Extraction, output: tuple[int, int]) -> set[int]:
    """Return the autograd nodes on paths from a tensor, as node and output number, to the loss."""
    users: list[list[int]] = [[] for _ in found.walk.nodes]
    reached: set[int] = set()
    stack = []
    for position, sources in enumerate(found.walk.inputs):
        if output in sources:
            stack.append(position)
        for source, _ in sources:
            if source is not None:
                users[source].append(position)
    while stack:
        position = stack.pop()
        if position not in reached:
            reached.add(position)
            stack += users[position]
    return reached


def passages(
    loss: Tensor,
    tensor: Tensor,
    found: Extraction,
    on_path: set[int],
    output: tuple[int, int],
    watched: Iterable[int] | None = None,
) -> list[Passage]:
    """Run one backward pass and return what passed each node, in the order of the pass.

    ``watched`` are the nodes to look at, all that are ``on_path`` unless it is given. Nothing is
    kept but one word for each edge; hooks are taken away again.
    """
    seen: list[Passage] = []
    handles = []

    def watch(position: int) -> None:
        def hook(handed: Sequence[Tensor | None], received: Sequence[Tensor | None]) -> None:
            words = {
                word_of(x)
                for x, source in zip(handed, found.walk.inputs[position])
                if source[0] in on_path or source == output
            }
            seen.append(Passage(position, _worst({word_of(x) for x in received}), words))

        handles.append(found.walk.nodes[position].register_hook(hook))

    try:
        for position in on_path if watched is None else watched:
            watch(position)
        torch.autograd.grad(loss, [tensor], retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def word_of(gradient: Tensor | None) -> str:
    """Return ``"none"``, ``"zero"``, ``"finite"`` or ``"infinite"`` (nan too)."""
    if gradient is None:
        return "none"
    values = gradient.detach()
    values = values._values() if values.is_sparse else values
    if not bool(torch.isfinite(values).all()):
        return "infinite"
    return "finite" if bool((values != 0).any()) else "zero"


def _worst(words: set[str]) -> str:
    for word in ("infinite", "finite", "zero"):
        if word in words:
            return word
    return "none"


def killers(seen: list[Passage]) -> list[int]:
    """Return the nodes that received a gradient and handed none or zero on towards the tensor."""
    return [p.position for p in seen if p.received == "finite" and p.handed <= {"none", "zero"}]


def undefined(
    loss: Tensor, tensor: Tensor, found: Extraction, on_path: set[int], output: tuple[int, int]
) -> list[int]:
    """Return functions written by others that hand on ``None`` where they received a gradient.

    Operations of torch do so only where the derivative is zero. Without such functions on the
    paths no backward pass is run.
    """
    watched = [p for p in sorted(on_path) if is_function_of_others(found.walk.nodes[p])]
    if not watched:
        return []
    seen = passages(loss, tensor, found, on_path, output, watched)
    return [p.position for p in seen if p.received != "none" and "none" in p.handed]


def first_infinite(seen: list[Passage]) -> int | None:
    """Return the first node in the backward pass that made a finite gradient infinite or nan."""
    return next(
        (p.position for p in seen if p.received != "infinite" and "infinite" in p.handed), None
    )


#: Why an operation hands on zero, by its label.
_ZERO = {
    "its input is nowhere positive (a dead unit)": ("Relu", "Threshold", "Relu6", "Elu"),
    "its input lies outside of the bounds everywhere": (
        *("Clamp", "ClampMin", "ClampMax", "Hardtanh", "Hardsigmoid", "HardtanhBackward"),
    ),
    "a step function, whose slope is zero everywhere (the same as a path through integers)": (
        *("Round", "Floor", "Ceil", "Sign", "Trunc", "Sgn", "Heaviside"),
    ),
    "the tensor was overwritten in place with numbers there": ("Zero", "Fill"),
    "an in-place write has replaced the entries that lead to the tensor": (
        *("CopySlices", "Copy", "MaskedFill", "IndexFill", "IndexCopy", "Scatter", "IndexPut"),
    ),
    "it takes the other branch, or other entries, everywhere": (
        *("Where", "MaskedSelect", "Index", "IndexSelect", "Gather", "Select", "Slice", "Maximum"),
        *("Minimum", "Max", "Min", "Amax", "Amin"),
    ),
    "its input is zero, where its slope is zero": ("Pow", "Abs", "LinalgVectorNorm", "Norm"),
    "it has dropped all entries": ("NativeDropout", "Dropout"),
    "it is saturated: its slope is zero in this precision": ("Tanh", "Sigmoid", "Softmax"),
}
_INFINITE = {
    "the slope of a square root at zero is infinite": ("Sqrt", "Rsqrt"),
    "it divides by zero or by something very small": ("Div", "Reciprocal"),
    "the slope of a logarithm at zero is infinite": ("Log", "Log2", "Log10", "LogSoftmax"),
    "the slope of this power at zero is infinite": ("Pow",),
    "the slope of a norm at zero is not defined": ("Norm", "LinalgVectorNorm", "Std", "Var"),
}


def why_zero(found: Extraction, position: int) -> str:
    """Return why a node hands on no gradient, in words, as far as the graph tells."""
    if found.walk.step_of[position] >= 0:
        return (
            "a hyperparameter (such as a learning rate of 0), a sign, clipping or a second moment "
            "that is exactly zero makes its derivative zero there"
        )
    node = found.walk.nodes[position]
    label = operation_label(node.name())
    if label in ("Mul", "Mm", "Bmm", "Addmm", "Baddbmm", "Mv", "Dot", "Addcmul", "MulBackward"):
        zeros = [
            name
            for name, saved in saved_tensors(node)
            if isinstance(saved, Tensor) and not bool(saved.detach().any())
        ]
        if zeros:
            return f"it multiplies by zeros: its operand {zeros[0]} is zero everywhere"
        return "it multiplies by zeros wherever a gradient comes in"
    return _reason(_ZERO, label) or "its derivative is zero, or not defined, there"


def why_infinite(found: Extraction, position: int) -> str:
    """Return why a node makes a gradient infinite or nan, in words."""
    label = operation_label(found.walk.nodes[position].name())
    known = _reason(_INFINITE, label)
    return known or "an infinite slope, an overflow, or zero times infinity (look at its inputs)"


def _reason(table: dict[str, tuple[str, ...]], label: str) -> str | None:
    return next((reason for reason, labels in table.items() if label in labels), None)
