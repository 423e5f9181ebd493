"""Functions of tensors whose derivatives are computed by replaying, at every order.

One node of the graph (:class:`Isolated`) evaluates a program, and remembers no more than its
inputs. Its derivative is another program, which is a node again where it is to be differentiated.
So carries that are kept between the sweeps are values only and never part of a graph: were they,
second derivatives would be wrong without a word.

A node's inputs are cut from the graph before a program is run, and what the program is
differentiated by are new leaves. Hence it does not matter that a carry was itself computed from a
tensor that the step closes over: the derivative by that tensor is that of this program alone.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base.batched_grads import has_batches, over_batches
from torchopt.base.torch_internals import unwrap_if_dead
from torchopt.diff.replay.job import is_smooth
from torchopt.diff.replay.random_state import undisturbed
from torchopt.diff.replay.segment import without_hooks


class Isolated(torch.autograd.Function):
    """The node of the graph that a program is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(program: Program, *tensors: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Evaluate a program."""
        return tuple(program.values([t.detach() for t in tensors]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Remember the inputs."""
        program, *tensors = inputs
        ctx.program = program
        # a result that nothing depends on has no gradient, and not zero: zero times nan is nan
        ctx.set_materialize_grads(False)
        constant = zip(output, program.constant())
        ctx.mark_non_differentiable(*(t for t, is_constant in constant if is_constant))
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Evaluate the derivative; as a node, if it is to be differentiated."""
        program: Program = ctx.program
        derivative = program.derivative([c is not None for c in cotangents])
        inputs = _alive([*ctx.saved_tensors, *(c for c in cotangents if c is not None)])
        with undisturbed(program.job.devices):
            if torch.is_grad_enabled():
                grads = apply(derivative, inputs)
            else:
                grads = derivative.values(inputs)
        rest = iter(grads)
        return None, *(next(rest) if d else None for d in program.differs())

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Evaluate the derivative along a direction."""
        program: Program = ctx.program
        pushed = Pushed(program, [t is not None for t in tangents])
        with undisturbed(program.job.devices):
            along = (t for t in tangents if t is not None)
            results = apply(pushed, _alive([*ctx.saved_tensors, *along]))
        rest = iter(results)
        return tuple(next(rest) if smooth else None for smooth in pushed.smooth)


def _alive(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors without the wraps of levels of torch.func that have ended.

    Operators of torch take them off, but levels that are opened inside of a program do not.
    """
    return [unwrap_if_dead(t) for t in tensors]


class OneByOne(Isolated):
    """The node of a program that was made outside of all levels of torch.func.

    Where a caller maps over cotangents (``vmap``), and will differentiate the result, each of them
    gets a node of its own.
    """

    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: Any, program: Program, *tensors: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Evaluate a program for each of a batch."""
        pairs = list(zip(tensors, in_dims[1:]))
        rows = [
            apply(program, [t if d is None else t.select(d, i) for t, d in pairs])
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(column) for column in zip(*rows)), 0


def apply(program: Program, tensors: Sequence[Tensor]) -> list[Any]:
    """Evaluate a program as a node."""
    if has_batches(tensors):
        return over_batches(lambda *given: apply(program, given), tensors)
    node = Isolated if program.job.functional else OneByOne
    return list(node.apply(program, *tensors))  # pyright: ignore[reportArgumentType]


class Program(abc.ABC):
    """A function of a flat list of tensors."""

    job: Any  # a Job, or a Scope

    @abc.abstractmethod
    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it; nothing is recorded."""

    @abc.abstractmethod
    def recorded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it where a graph is recorded."""

    @abc.abstractmethod
    def differs(self) -> list[bool]:
        """Return by which of its inputs it may be differentiated."""

    def derivative(self, present: list[bool]) -> Program:
        """Return the program of the inputs and of those cotangents that are there."""
        return Derivative(self, present)

    def constant(self) -> list[bool]:
        """Return which results depend on nothing that is differentiated; none, where not known."""
        return []


class Derivative(Program):
    """The derivative of any program, as one of its inputs and of cotangents."""

    def __init__(self, program: Program, present: list[bool]) -> None:
        self.job, self.program, self.present = program.job, program, present

    def differs(self) -> list[bool]:
        """Return by what it may be differentiated."""
        return [*self.program.differs(), *(True for p in self.present if p)]

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it."""
        return self._evaluated(tensors, create_graph=False)

    def recorded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it where a graph is recorded."""
        return self._evaluated(tensors, create_graph=True)

    def _evaluated(self, tensors: Sequence[Tensor], create_graph: bool) -> list[Tensor]:
        differs = self.program.differs()
        inputs, cotangents = tensors[: len(differs)], tensors[len(differs) :]
        if self.job.functional:
            return self._functional(inputs, cotangents)
        rest = iter(cotangents)
        seeds = [next(rest) if p else None for p in self.present]
        at = self._at_consts()
        with torch.enable_grad():
            given = [
                self.job.consts[at[i]]
                if i in at
                else (t.view_as(t) if t.requires_grad and create_graph else _leaf(t, d))
                for i, (t, d) in enumerate(zip(inputs, differs))
            ]
            outputs = self.program.recorded(given)
        pairs = [
            (output, seed)
            for output, seed in zip(outputs, seeds)
            if seed is not None and output.requires_grad
        ]
        by = [t for t, d in zip(given, differs) if d]
        if not pairs:
            return [torch.zeros_like(t) for t in by]
        with without_hooks(self.job.consts):
            grads = torch.autograd.grad(
                [output for output, _ in pairs],
                by,
                [seed for _, seed in pairs],
                create_graph=create_graph,
                retain_graph=create_graph or self.job.keeps_outside,
                allow_unused=True,
            )
        return [torch.zeros_like(t) if g is None else g for t, g in zip(by, grads)]

    def _functional(self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
        at = [i for i, d in enumerate(self.program.differs()) if d]

        def outputs(*by: Tensor) -> tuple[Tensor, ...]:
            here = list(inputs)
            for i, tensor in zip(at, by):
                here[i] = tensor
            results = self.program.recorded(here)
            return tuple(r for r, p in zip(results, self.present) if p)

        pull = torch.func.vjp(outputs, *(inputs[i] for i in at))[1]
        return list(pull(tuple(cotangents)))

    def _at_consts(self) -> dict[int, int]:
        """Return where those tensors are that a step reads as they stand."""
        if self.job.replaces:
            return {}
        first = len(self.job.carry_at) + len(self.job.xs_at)
        return {first + i: i for i in range(len(self.job.consts))}


class Pushed(Program):
    """The derivative of any program along a direction, under torch.func."""

    def __init__(self, program: Program, present: list[bool]) -> None:
        self.job, self.program, self.present = program.job, program, present
        self.smooth: list[bool] = []

    def differs(self) -> list[bool]:
        """Return by what it may be differentiated."""
        return [*self.program.differs(), *(True for p in self.present if p)]

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it."""
        return self.recorded(tensors)

    def recorded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it where a graph is recorded."""
        n = len(self.present)
        inputs, tangents = tensors[:n], tensors[n:]
        at = [i for i, p in enumerate(self.present) if p]

        def outputs(*along: Tensor) -> tuple[Tensor, ...]:
            here = list(inputs)
            for i, tensor in zip(at, along):
                here[i] = tensor
            results = self.program.recorded(here)
            self.smooth = [is_smooth(r) for r in results]
            return tuple(r for r, smooth in zip(results, self.smooth) if smooth)

        primals = tuple(inputs[i] for i in at)
        return list(torch.func.jvp(outputs, primals, tuple(tangents))[1])


def _leaf(tensor: Tensor, differs: bool) -> Tensor:
    return tensor.detach().requires_grad_(differs)
