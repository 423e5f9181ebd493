"""Differentiate the gradients inside of a loop by forward mode over reverse mode."""

from __future__ import annotations

import contextvars
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.base import tree
from torchopt.base.torch_internals import (
    get_sequence_nr,
    peek_interpreter_stack,
    set_forward_grad_enabled,
)
from torchopt.base.values import describe
from torchopt.diff.replay import watch
from torchopt.diff.replay.job import is_smooth
from torchopt.diff.replay.loop import Loop
from torchopt.diff.replay.nodes import Derivative, Program, apply
from torchopt.diff.replay.random_state import Autocast, RandomState, cuda_devices
from torchopt.diff.replay.records import Scope
from torchopt.typing import PyTree


@dataclass(frozen=True)
class Mixed:
    r"""Record a loop whose inner gradients are differentiated by forward mode over reverse mode.

    .. math::
        \bar w = \nabla^2_{ww} \ell \; u, \quad \bar\theta = \nabla^2_{\theta w} \ell \; u, \qquad
        (\bar w, \bar\theta) = \left.\frac{d}{d\epsilon}\right|_{\epsilon = 0}
            \nabla_{(w, \theta)} \ell(w + \epsilon u, \theta)

    Each gradient that the step computes by :func:`torchopt.diff.grad_and_value` is one node of the
    graph, which remembers its inputs only and recomputes its derivative, as one directional
    derivative of a gradient. Derivatives by everything, at every order, are exact; of the second
    order on, reverse mode over reverse mode is used.

    What it saves is the graph of each inner gradient, as ``Checkpointed()`` does, for one more
    evaluation of the gradient; unlike that it does not take steps again, so what surrounds the
    gradient need not be repeatable. Expect nothing of the mode alone in eager PyTorch: the factors
    of the paper are those of a compiler that plans memory.

    Args:
        fallback: What to do about an operation that has no derivative in forward mode: ``"raise"``
            an error that names it, or differentiate that gradient in ``"reverse"`` mode.

    Raises:
        ValueError: If ``fallback`` is neither.
        RuntimeError: From ``unroll``: if the step never calls
            :func:`torchopt.diff.grad_and_value`; inside ``torch.func`` or ``torch.compile``. In
            the backward pass, by ``fallback="raise"``.

    Example:
        >>> import torch
        >>> from torchopt.diff import Mixed, grad_and_value, unroll
        >>> w0 = torch.tensor(1.0, requires_grad=True)
        >>> def step(w, _):
        ...     grads, loss = grad_and_value(lambda w: w**3)(w)
        ...     return w - 0.1 * grads, loss
        >>> w, losses = unroll(step, w0, length=1, adjoint=Mixed())
        >>> torch.autograd.grad(w, w0)  # 1 - 0.1 * 6 w
        (tensor(0.4000),)

    Reference:
        Kemaev et al., Scalable Meta-Learning via Mixed-Mode Differentiation, arXiv 2505.00793.
    """

    fallback: str = "raise"

    def __post_init__(self) -> None:
        if self.fallback not in ("raise", "reverse"):
            raise ValueError(f'fallback must be "raise" or "reverse", got {self.fallback!r}.')

    def run(self, loop: Loop) -> tuple[list[Any], list[Any]]:
        """Run the loop, with nodes for the gradients in it."""
        if not torch.is_grad_enabled():
            return loop.plain()
        if torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
            raise RuntimeError(
                "unroll(..., adjoint=Mixed()) is for torch.autograd in eager mode. Inside "
                "torch.func or torch.compile use Unrolled(); torch.func.jvp(torch.func.grad(...)) "
                "is forward mode over reverse mode there."
            )
        setting = _Setting(self)
        token = _setting.set(setting)
        try:
            result = loop.plain()
        finally:
            _setting.reset(token)
        if not setting.calls:
            raise RuntimeError(
                "Mixed() found no gradient in the step. Let it compute its gradients by "
                "torchopt.diff.grad_and_value(loss_fn)(params, ...), instead of "
                "torch.func.grad_and_value."
            )
        return result


@dataclass
class _Setting:
    mixed: Mixed
    calls: int = 0


_setting: contextvars.ContextVar[_Setting | None] = contextvars.ContextVar("mixed", default=None)


def grad_and_value(fn: Callable[..., Tensor]) -> Callable[..., tuple[PyTree, Tensor]]:
    """Return a function that computes the gradient of ``fn`` by its first argument, and its value.

    It is ``torch.func.grad_and_value``, but for a step of a loop with the adjoint
    :class:`torchopt.diff.Mixed`, where that says how it is differentiated.

    Args:
        fn: A function of a tree of tensors, and of anything else, that returns a scalar. It may
            close over tensors, which are differentiated too.

    Example:
        >>> import torch
        >>> from torchopt.diff import grad_and_value
        >>> grad_and_value(lambda w, x: (w * x).sum())(torch.ones(2), torch.tensor([3.0, 4.0]))
        (tensor([3., 4.]), tensor(7.))
    """

    def gradient(params: PyTree, *args: Any) -> tuple[PyTree, Tensor]:
        setting = _setting.get()
        if setting is None:
            return torch.func.grad_and_value(fn)(params, *args)
        setting.calls += 1
        return _node(fn, params, args, setting.mixed)

    return gradient


def _node(
    fn: Callable[..., Tensor], params: PyTree, args: tuple[Any, ...], mixed: Mixed
) -> tuple[PyTree, Tensor]:
    """Evaluate a gradient, and make it one node of the graph."""
    leaves, spec = tree.flatten((params, args))
    at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    tensors = [leaves[i] for i in at]
    number, param_spec = len(tree.flatten(params)[0]), tree.flatten(params)[1]
    if at[:number] != list(range(number)) or not all(is_smooth(t) for t in tensors[:number]):
        raise TypeError("grad_and_value needs a tree of floating-point tensors as first argument.")

    def loss_of(given: Sequence[Tensor]) -> Tensor:
        here = list(leaves)
        for i, tensor in zip(at, given):
            here[i] = tensor
        first, rest = tree.unflatten(spec, here)
        return fn(first, *rest)

    devices = cuda_devices(tensors)
    random, autocast = RandomState.now(devices), Autocast()
    given = [t.detach().requires_grad_(is_smooth(t)) for t in tensors]
    seen, start = watch.Watch(), get_sequence_nr()
    with torch.enable_grad(), seen:
        loss = loss_of(given)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError("grad_and_value needs a function that returns a scalar tensor.")
    own = {id(t) for t in given}
    outside = [
        t
        for t in seen.read.values()
        if t.requires_grad and id(t) not in own and _was_there(t, start)
    ]
    consts, alone = watch.reached([loss], given, outside)
    # one may have been computed from another: then its derivative must not go on to that
    replaces = len(consts) > 1 and any(t.grad_fn is not None for t in consts)
    at_tensors = list(range(len(tensors)))
    scope = Scope(consts, False, alone and not replaces, devices, at_tensors, [], replaces)
    grads = torch.autograd.grad(loss, given[:number], retain_graph=alone, allow_unused=True)
    known = [torch.zeros_like(t) if g is None else g for t, g in zip(given, grads)]
    program = _Gradient(scope, loss_of, number, [is_smooth(t) for t in tensors], mixed)
    program.known = [*known, loss.detach()]
    program.random, program.autocast = random, autocast
    *results, value = apply(program, [*tensors, *consts])
    return tree.unflatten(param_spec, results), value


def _was_there(tensor: Tensor, start: int) -> bool:
    """Whether a tensor is older than this node; what an unseen operation has made is not."""
    return tensor.grad_fn is None or tensor.grad_fn._sequence_nr() < start


class _Gradient(Program):
    """The gradient of a function by its first tensors, and its value."""

    def __init__(
        self,
        scope: Scope,
        loss_of: Callable[[Sequence[Tensor]], Tensor],
        number: int,
        smooth: list[bool],
        mixed: Mixed,
    ) -> None:
        self.job, self.loss_of, self.number = scope, loss_of, number
        self.smooth, self.mixed = smooth, mixed
        self.known: list[Tensor] = []
        self.random: RandomState
        self.autocast: Autocast

    def differs(self) -> list[bool]:
        """Return by what there are derivatives."""
        return [*self.smooth, *(True for _ in self.job.consts)]

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return what has been computed."""
        known, self.known = self.known, []
        return known

    def recorded(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Compute it with its graph."""
        given = list(tensors[: len(self.smooth)])
        loss = self.loss(given, tensors[len(given) :])
        by = given[: self.number]
        grads = torch.autograd.grad(loss, by, create_graph=True, allow_unused=True)
        return [*(torch.zeros_like(t) if g is None else g for t, g in zip(by, grads)), loss]

    def loss(self, given: Sequence[Tensor], consts: Sequence[Tensor]) -> Tensor:
        """Evaluate the function as it was first.

        Raises:
            RuntimeError: If it reads other tensors that require grad.
        """
        scope = self.job
        self.random.put_back()
        with self.autocast.again(), torch.enable_grad():
            if not scope.replaces:
                return self.loss_of(given)
            with watch.Substituted(scope.consts, consts):
                loss = self.loss_of(given)
        found = watch.reached([loss], [*given, *consts], scope.consts)[0]
        if unseen := [t for t in found if id(t) in set(map(id, scope.consts))]:
            raise RuntimeError(
                f"The loss reads a tensor ({describe(unseen[0])}) by a hand-written "
                "autograd.Function, and others that may have been computed from it. Give it to the "
                "loss as an argument: grad_and_value(loss_fn)(params, tensor)."
            )
        return loss

    def derivative(self, present: list[bool]) -> Program:
        """Return its derivative, by forward mode over reverse mode."""
        return _ForwardOverReverse(self, present)


class _ForwardOverReverse(Derivative):
    """The derivative of a gradient, as one directional derivative of the gradient by everything."""

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate it."""
        try:
            return self._along(tensors)
        except NotImplementedError as error:
            program: Any = self.program
            if program.mixed.fallback == "reverse":
                return super().values(tensors)
            found = re.search(r"forward AD with (\S+) that", str(error))
            raise RuntimeError(
                f"Mixed() cannot differentiate this gradient: {found[1] if found else error} has "
                'no derivative in forward mode. Use Mixed(fallback="reverse") or Checkpointed().'
            ) from error

    def _along(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        program: Any = self.program
        n, consts = len(program.smooth), self.job.consts
        rest = iter(tensors[n + len(consts) :])
        *along, by_value = [next(rest) if p else None for p in self.present]
        given = [t.detach().requires_grad_(s) for t, s in zip(tensors, program.smooth)]
        # a node computes with forward mode off, and would lose all tangents without a word
        with set_forward_grad_enabled(True), forward_ad.dual_level():
            with torch.enable_grad():  # on the way to their leaves, derivatives lose the tangent
                pairs = zip(given, along)
                moved = [t if u is None else forward_ad.make_dual(t, u) for t, u in pairs]
            given[: len(moved)] = moved
            if self.job.replaces:
                consts = [t.detach().requires_grad_() for t in consts]
            loss = program.loss(given, consts)
            by = [*(t for t, s in zip(given, program.smooth) if s), *consts]
            keep = self.job.keeps_outside
            grads = torch.autograd.grad(loss, by, retain_graph=keep, allow_unused=True)
            found = [(None, None) if g is None else forward_ad.unpack_dual(g) for g in grads]
        results = []
        for tensor, (plain, pushed) in zip(by, found):
            total = torch.zeros_like(tensor) if pushed is None else pushed
            if by_value is not None and plain is not None:
                total = total + by_value * plain
            results.append(total)
        return results
