"""The fused kernels as operators of ``torch.library``, for ``torch.compile`` and other tracers.

Importing this module makes ``torch.ops.torchopt.update``, which computes a kernel, and
``torch.ops.torchopt.update_backward``, its backward pass. They serve every kernel: which one is
told by its text (``written.py``). In eager mode the engine does not use them, for a call through
the dispatcher costs more than a small update.

The tensors are a flat list, operand by operand (all gradients, then all parameters, ...), in the
order in which the kernel reads them; so are the results. ``values`` are rows of hyperparameters,
one after the other, each with a step count in ``steps``; ``live`` is a tensor that takes the place
of ``values`` where they are not known while tracing. ``rows`` says which row each parameter has.

The derivative of ``update`` is ``update_backward``; that of ``update_backward``, forward mode and
everything above are those of the same graph in plain torch. Under ``torch.func`` the dispatcher
comes here once for each level. What has no derivative (hyperparameters) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.base.batched_grads import over_batches
from torchopt.base.numerics import to_compute_dtype
from torchopt.base.torch_internals import (
    AutoDispatchBelowAutograd,
    SingleLevelFunction,
    after_autograd_keyset,
    enable_single_level_autograd_function,
    in_forward_mode,
)
from torchopt.kernels.generate.written import evaluate
from torchopt.kernels.library.operator_calls import (
    Call,
    columns_of,
    dtype_of,
    fake_update,
    fake_update_backward,
    inputs_of,
    update,
    update_backward,
)


_REST = "str graph, float[] values, Tensor? live, SymInt[] steps, int[]? rows"
_LIBRARY = torch.library.Library("torchopt", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(f"update(Tensor[] tensors, {_REST}) -> Tensor[]", tags=_TAGS)
_LIBRARY.define(
    f"update_backward(Tensor?[] bars, Tensor[] tensors, {_REST}, bool[] wanted) -> Tensor[]",
    tags=_TAGS,
)


# The same in plain torch, which every mode of differentiation knows -------------------------------


def _evaluated(call: Call, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    kernel = call.written.forward
    columns, like = inputs_of(call, tensors)
    numbers = call.numbers()
    results: list[dict[str, Tensor]] = []
    for k, row in enumerate(call.row_of_each(len(like))):
        own = {operand: to_compute_dtype(column[k]) for operand, column in columns.items()}
        results.append(evaluate(kernel, own, numbers[row]))
    return tuple(
        result[operand].to(dtype_of(operand, like[0].dtype))
        for operand in kernel.output_operands
        for result in results
    )


def _evaluated_backward(
    call: Call, bars: Sequence[Tensor | None], tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    outputs, vjp = torch.func.vjp(lambda *xs: _evaluated(call, xs), *tensors)  # pyright: ignore[reportAssignmentType]
    full = tuple(torch.zeros_like(o) if b is None else b for o, b in zip(outputs, bars))
    written = call.written
    columns = columns_of(written.forward.inputs, vjp(full))
    found = [x for operand in written.backward.output_operands for x in columns[operand]]
    return tuple(x for x, needed in zip(found, wanted) if needed)


# Derivatives --------------------------------------------------------------------------------------


# Nodes of one level of torch.func. ``torch.autograd.Function`` is this class and an ``apply`` that
# treats all levels at once; the dispatcher comes to an operator for each of them.
class _Update(SingleLevelFunction):
    """``apply(call, *tensors)``; the derivative is the backward kernel."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return _below(torch.ops.torchopt.update, list(tensors), *call.arguments())

    @staticmethod
    def backward(ctx: Any, *bars: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        call: Call = ctx.call
        written = call.written
        needs = columns_of(written.forward.inputs, ctx.needs_input_grad[1:])
        count = len(next(iter(needs.values())))
        derivatives: dict[str, list[Any]] = {s: [None] * count for s in needs}
        wanted = [need for s in written.backward.output_operands for need in needs[s]]
        if any(wanted) and any(bar is not None for bar in bars):
            own = list(ctx.saved_tensors), *call.arguments(), wanted

            def backward(*bars: Tensor | None) -> Sequence[Tensor]:
                return torch.ops.torchopt.update_backward(list(bars), *own)

            found = iter(over_batches(backward, bars))
            for operand in written.backward.output_operands:
                derivatives[operand] = [next(found) if need else None for need in needs[operand]]
        incoming = columns_of([f"bar_{s}" for s in written.forward.output_operands], bars)
        for operand, bar in written.passes.items():
            pairs = zip(incoming[bar], needs[operand])
            derivatives[operand] = [x if need else None for x, need in pairs]
        return (None, *(x for column in derivatives.values() for x in column))


class _UpdateBackward(SingleLevelFunction):
    """``apply(call, given, wanted, *bars, *tensors)``; the derivative is that of plain torch."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, call: Call, given: list[bool], wanted: list[bool], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.given, ctx.wanted = call, given, wanted
        ctx.save_for_backward(*tensors)
        bars, rest = _split(given, tensors)
        own = bars, rest, *call.arguments(), wanted
        return _below(torch.ops.torchopt.update_backward, *own)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return _evaluated_backward(ctx.call, *_split(ctx.given, tensors), ctx.wanted)

        _, vjp = torch.func.vjp(function, *ctx.saved_tensors)  # pyright: ignore[reportAssignmentType]
        return (None, None, None, *vjp(bars))


def _split(
    given: Sequence[bool], tensors: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Return incoming derivatives, ``None`` where there is none, and the other tensors."""
    rest = iter(tensors)
    return [next(rest) if there else None for there in given], list(rest)


def _below(operator: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute what one level of differentiation has recorded.

    ``Function.forward`` runs without grad mode, in which the levels of ``torch.func`` around this
    one would record nothing: derivatives of derivatives would be zero.
    """
    with torch.enable_grad(), AutoDispatchBelowAutograd():
        return tuple(operator(*arguments))


def _recorded(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _node(function: Any, *arguments: Any) -> list[Tensor]:
    """Record a node on the level that the dispatcher has come here for."""
    with enable_single_level_autograd_function():
        return list(function.apply(*arguments))


def _refuse_recorded_values(live: Tensor | None) -> None:
    if live is not None and (
        live.requires_grad or forward_ad.unpack_dual(live).tangent is not None
    ):
        raise RuntimeError(
            "The kernels of torchopt have no derivative by hyperparameters; compute the rules: "
            "use_accelerated_op=None or False."
        )


def _autograd_update(keys: Any, tensors: list[Tensor], *rest: Any) -> Sequence[Tensor]:
    call = Call(*rest)
    _refuse_recorded_values(call.live)
    if in_forward_mode():
        return list(_evaluated(call, tensors))
    if _recorded(tensors):
        return _node(_Update, call, *tensors)
    keys = keys & after_autograd_keyset
    with AutoDispatchBelowAutograd():
        return torch.ops.torchopt.update.default.redispatch(keys, tensors, *rest)


def _autograd_update_backward(
    keys: Any, bars: list[Tensor | None], tensors: list[Tensor], *rest: Any
) -> Sequence[Tensor]:
    *arguments, wanted = rest
    call = Call(*arguments)
    _refuse_recorded_values(call.live)
    if in_forward_mode():
        return list(_evaluated_backward(call, bars, tensors, wanted))
    if _recorded([*bars, *tensors]):
        given = [bar is not None for bar in bars]
        there = [bar for bar in bars if bar is not None]
        return _node(_UpdateBackward, call, given, wanted, *there, *tensors)
    keys = keys & after_autograd_keyset
    with AutoDispatchBelowAutograd():
        return torch.ops.torchopt.update_backward.default.redispatch(keys, bars, tensors, *rest)


# Batches ------------------------------------------------------------------------------------------


def _batched(size: int, dims: Any, tensors: Any) -> list[Any]:
    """Return tensors with the batch in front; one is given to those that have none."""
    return [
        None if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims or [None] * len(tensors))
    ]


def _vmap(operator: Any, lists: int) -> Callable[..., Any]:
    """Return the rule: kernels are entrywise, so a batch is a larger tensor."""

    def rule(info: Any, dims: Any, *arguments: Any) -> Any:
        call = Call(*arguments[lists : lists + 5])
        if dims[lists + 2] is not None:
            raise NotImplementedError("The kernels of torchopt take no batch of hyperparameters.")
        batched = [_batched(info.batch_size, dims[k], arguments[k]) for k in range(lists)]
        outputs = operator(*batched, *call.arguments(), *arguments[lists + 5 :])
        return outputs, [0] * len(outputs)

    return rule


def _register() -> None:
    ops = torch.ops.torchopt
    for name, real, fake, autograd, lists in (
        ("update", update, fake_update, _autograd_update, 1),
        ("update_backward", update_backward, fake_update_backward, _autograd_update_backward, 2),
    ):
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, real, key)
        torch.library.register_fake(f"torchopt::{name}", fake, lib=_LIBRARY)
        _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
        rule = _vmap(getattr(ops, name), lists)
        torch.library.register_vmap(f"torchopt::{name}", rule, lib=_LIBRARY)


_register()
