"""Runs of one optimizer on all faces; shared by the tests of the fused engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import nonzero
from torch import Tensor, nn

import torchopt
from torchopt.kernels.backends import cpu as native


Result = list[Tensor]
Shapes = tuple[tuple[int, ...], ...]
SHAPES: Shapes = ((3, 4), (5,), ())

needs_library = pytest.mark.skipif(
    isinstance(native.load(), native.UnavailableError), reason="the C library is not built"
)


@pytest.fixture(name="kernel_calls")
def kernel_calls_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list that grows with each call of a native kernel."""
    calls: list[int] = []
    original = native.KernelCall.run

    def counted(self: Any, numbers: Any) -> None:
        original(self, numbers)
        calls.append(1)

    monkeypatch.setattr(native.KernelCall, "run", counted)
    return calls


def run_kernel(library: native.Library, *arguments: Any) -> None:
    """Run a kernel once: the arguments of ``KernelCall``, and the numbers after the addresses."""
    places, numbers, rest = arguments[:7], arguments[7], arguments[8:]
    native.KernelCall(library, *places, *rest).run(numbers)


@pytest.fixture(name="sets")
def sets_fixture() -> Iterator[list[str]]:
    """The instruction sets that this machine has; what is selected of them is undone."""
    before, found = native.library().instruction_set, []
    for name in ("generic", "avx2", "avx512"):
        with contextlib.suppress(ValueError):
            native.library().select(name)
            found.append(name)
    native.library().select(before)
    assert "generic" in found
    yield found
    native.library().select(before)


def data(
    dtype: torch.dtype = torch.float64, steps: int = 5, shapes: Shapes = SHAPES, seed: int = 0
) -> tuple[Result, list[Result]]:
    """Parameters, and the gradients of some steps."""
    torch.manual_seed(seed)
    params = [nonzero(*shape).to(dtype) for shape in shapes]
    return params, [[nonzero(*shape).to(dtype) for shape in shapes] for _ in range(steps)]


def slots_of(columns: Any) -> Result:
    return [x for column in columns for x in column if x is not None]


def functional(tx: Any, params: Result, grads: list[Result], inplace: bool = False) -> Result:
    params = [p.clone() for p in params]
    state = tx.init(params)
    for own in grads:
        own = [g.clone() for g in own]
        updates, state = tx.update(own, state, params, inplace=inplace)
        params = torchopt.apply_updates(params, updates, inplace=inplace)
    return [*params, *slots_of(state.slots.values())]


def functional_at_once(tx: Any, params: Result, grads: list[Result]) -> Result:
    state = tx.init(params)
    for own in grads:
        params, state = tx.apply_gradients(own, state, params, inplace=False)
    return [*params, *slots_of(state.slots.values())]


def functional_default(tx: Any, params: Result, grads: list[Result]) -> Result:
    return functional(tx, params, grads, inplace=True)


def differentiable(tx: Any, params: Result, grads: list[Result]) -> Result:
    net = nn.ParameterList(p.clone() for p in params)
    optimizer = torchopt.MetaOptimizer(net, tx)
    for own in grads:  # the gradient of g * p is g
        optimizer.step(sum((p * g).sum() for p, g in zip(net, own)))
    (state,) = optimizer.extract_state()
    names = [str(k) for k in range(len(params))]
    slots = [[slot[name] for name in names if name in slot] for slot in state.slots.values()]
    return [x.detach() for x in (*net, *slots_of(slots))]


def object_oriented(tx: Any, params: Result, grads: list[Result]) -> Result:
    own = [nn.Parameter(p.clone()) for p in params]
    optimizer = torchopt.Optimizer(own, tx)
    for gs in grads:
        for p, g in zip(own, gs):
            p.grad = g.clone()
        optimizer.step()
    slots = [[optimizer.state[p].get(name) for p in own] for name in tx.slot_names()]
    return [x.detach() for x in (*own, *slots_of(slots))]


FACES: dict[str, Callable[[Any, Result, list[Result]], Result]] = {
    "functional": functional,
    "functional-default": functional_default,
    "functional-at-once": functional_at_once,
    "differentiable": differentiable,
    "object-oriented": object_oriented,
}


def copy_of(tree: Any) -> Any:
    """A tree with its tensors cloned."""
    return torch.utils._pytree.tree_map(
        lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tree
    )
