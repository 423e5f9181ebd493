"""Run code that knows numbers only, from inside of any levels of ``torch.func``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torchopt.base.levels import any_level
from torchopt.diff.pullback import Tensors


Call = Callable[..., Tensors]


class _Run(Function):
    """A function of tensors, called below all levels; its results have no derivative."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> Tensors:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(call(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *tensors: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        result: Any = _Run.apply(_Batched(call, in_dims[1:], info.batch_size), *tensors)
        return result, tuple(0 for _ in result)


@dataclasses.dataclass(frozen=True)
class _Batched:
    """A function called with batches."""

    call: Call
    dims: tuple[int | None, ...]
    size: int

    def __call__(self, *tensors: Tensor) -> Tensors:
        try:
            return torch.func.vmap(self.call, self.dims, randomness="different")(*tensors)
        except RuntimeError:
            # Loops that end by a condition, and what asks for numbers or sets requires_grad, take
            # one member at a time. An error that has another reason comes up there again.
            return self.one_by_one(tensors)

    def one_by_one(self, tensors: Sequence[Tensor]) -> Tensors:
        """Call it once for each member."""
        results = []
        for k in range(self.size):
            member = [x if d is None else x.select(d, k) for x, d in zip(tensors, self.dims)]
            results.append(self.call(*member))
        return tuple(torch.stack(column) for column in zip(*results))


def run(call: Call, tensors: Sequence[Tensor]) -> Tensors:
    """Call a function with the numbers in ``tensors``, and return its results as constants.

    Under ``vmap`` it is called with batches if it can, else once for each member.
    """
    constants = [x.detach() for x in tensors]
    with torch.no_grad():
        if not any_level():
            return tuple(x.detach() for x in call(*constants))
        return _Run.apply(call, *constants)  # pyright: ignore[reportReturnType]
