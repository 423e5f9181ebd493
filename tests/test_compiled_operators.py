"""Compiled calls that require kernels, which are the operators ``torch.ops.torchopt`` there."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, any_case, every, named, rows
from fusing import SHAPES, data, kernel_calls_fixture, needs_library  # noqa: F401
from pointwise import user_optimizer
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import torchopt
from torchopt.base import tree
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.generate import bytecode
from torchopt.kernels.library import operators as operators  # registers them


pytestmark = needs_library

ADAM = named("adam").tx


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED: dict[str, Callable[[bool], Any]] = {
    "schedule": lambda required: torchopt.adam(
        torchopt.schedules.linear(0.1, 0.0, 40), use_accelerated_op=required
    ),
    "rows": lambda required: torchopt.sgd(
        {"0": 0.1, "1": 0.2, "2": 0.2}, momentum=0.9, use_accelerated_op=required
    ),
    "after-clipping": lambda required: torchopt.chain(
        torchopt.clip_grad_norm(0.5), torchopt.adam(0.1, use_accelerated_op=required)
    ),
    "two-optimizers": lambda required: torchopt.chain(
        torchopt.adam(0.1, use_accelerated_op=required),
        torchopt.sgd(0.1, momentum=0.9, use_accelerated_op=required),
    ),
    "rows-and-schedule-after-clipping": lambda required: torchopt.chain(
        torchopt.clip_grad_norm(0.5),
        torchopt.adam(torchopt.schedules.linear(0.1, 0.0, 40), use_accelerated_op=required),
        torchopt.sgd({"0": 0.1, "1": 0.2, "2": 0.2}, momentum=0.9, use_accelerated_op=required),
    ),
    # more slots than a kernel can have
    "two-kernels": lambda required: torchopt.chain(*[torchopt.trace(0.5)] * 64).with_accelerated_op(
        required
    ),
}
#: Compiled by ``make test-all`` only; ``make test`` has them together, and smaller ones.
ALONE = ("schedule", "rows", "after-clipping", "two-optimizers", "two-kernels")


def _required(case: Case, required: bool) -> Any:
    return case.tx(use_accelerated_op=required)


compiles = pytest.mark.skipif(
    not tree._COMPILER_KNOWS_OPTREE, reason="torch.compile takes kernels from torch 2.13 on"
)


def compiles_with_kernels(case: Case) -> bool:
    """Whether kernels serve inside of a compiled function, where counters are tensors."""
    return case.algorithm.fused and not case.kind.has_counters


def compiled_steps(
    tx: Any, dtype: torch.dtype, backend: str, steps: int = 5
) -> tuple[CompileCounterWithBackend, list[int]]:
    """Compare eager and compiled steps bit for bit; return the number of graphs after each."""
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def update(grads: Any, state: Any, params: Any) -> Any:
        return tx.update(grads, state, params, inplace=False)

    start, grads = data(dtype, steps)
    params = {str(k): p for k, p in enumerate(start)}
    state = twin = tx.init(params)
    graphs = []
    for own in grads:
        gradient = dict(zip(params, own))
        updates, state = update(gradient, state, params)
        expected, twin = tx.update(gradient, twin, params, inplace=False)
        assert all(torch.equal(updates[name], expected[name]) for name in params)
        for slot, column in twin.slots.items():
            assert all(torch.equal(state.slots[slot][name], x) for name, x in column.items())
        assert state.step == twin.step
        params = torchopt.apply_updates(params, expected, inplace=False)
        graphs.append(counter.frame_count)
    return counter, graphs


@compiles
@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "make",
    [
        *(
            pytest.param(functools.partial(_required, *row.values), id=row.id, marks=row.marks)
            for row in rows(compiles_with_kernels, each=any_case)
        ),
        *(
            pytest.param(make, id=name, marks=[pytest.mark.thorough] * (name in ALONE))
            for name, make in COMPILED.items()
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_compiled_calls_give_the_bits_of_eager_ones(make: Any, dtype: torch.dtype) -> None:
    """One graph for the first step and one for all later ones."""
    tx = make(True)
    if dtype == torch.bfloat16 and make is COMPILED["two-kernels"]:
        pytest.skip("two kernels in half precision are refused")
    _, graphs = compiled_steps(tx, dtype, "aot_eager")
    assert graphs[1:] == graphs[1:2] * 4
    assert graphs[-1] <= 3  # the compiler may begin one of them twice


@pytest.fixture(name="two_kernels")
def two_kernels_fixture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An optimizer of two kernels: a kernel has three inputs at most, or else 63 parts would do."""
    monkeypatch.setattr(bytecode, "MAX_STREAMS", 3)
    monkeypatch.setattr(backends, "_programs", {})
    return torchopt.chain(*[torchopt.trace(0.5)] * 3).with_accelerated_op(True)


@compiles
@pytest.mark.thorough
def test_compiled_calls_of_two_kernels(two_kernels: Any, kernel_calls: list[int]) -> None:
    g = [torch.ones(3)]
    two_kernels.update(g, two_kernels.init(g), inplace=False)
    assert len(kernel_calls) == 2
    _, graphs = compiled_steps(two_kernels, torch.float64, "aot_eager", steps=4)
    assert graphs[1:] == graphs[1:2] * 3
    assert graphs[-1] <= 3


@compiles
@pytest.mark.thorough
def test_compiled_calls_with_inductor() -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("the default backend needs a C++ compiler on the path")
    tx = ADAM(use_accelerated_op=True)
    _, graphs = compiled_steps(tx, torch.float32, "inductor")
    assert graphs[-1] <= 2


@compiles
def test_a_learning_rate_may_change() -> None:
    (g, *_), _ = data(torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    rate = [0.1]
    scheduled = torchopt.adam(lambda count: rate[0], use_accelerated_op=True)
    compiled = torch.compile(
        lambda g, s: scheduled.update(g, s, inplace=False), fullgraph=True, backend=counter
    )
    grads = {"w": g}
    state = scheduled.init(grads)
    _, state = scheduled.update(grads, state, inplace=False)
    for k in range(6):
        rate[0] = 0.1 / (k + 1)
        found, _ = compiled(grads, state)
        expected, _ = scheduled.update(grads, state, inplace=False)
        assert torch.equal(found["w"], expected["w"])
    assert counter.frame_count <= 2


def _by_autograd_of_compiled(steps: Any, compiles: Any, g: Tensor, p: Tensor, state: Any) -> Any:
    function = compiles(steps)
    inputs = [g.clone().requires_grad_(), p.clone().requires_grad_()]
    return torch.autograd.grad(function(*inputs, state), inputs)


#: How derivatives of compiled steps are taken: of the compiled function, or inside of it.
TAKEN: dict[str, Callable[..., Any]] = {
    "autograd": _by_autograd_of_compiled,
    "grad": lambda steps, compiles, g, p, s: compiles(grad(steps, argnums=(0, 1)))(g, p, s),
    "vmap-grad": lambda steps, compiles, g, p, s: compiles(
        vmap(grad(steps, argnums=(0, 1)), in_dims=(0, None, None))
    )(torch.stack([g, 2 * g]), p, s),
}


@compiles
@pytest.mark.sampled(3)
@every(compiles_with_kernels, each=any_case)
@pytest.mark.parametrize(
    "take",
    [
        pytest.param(take, id=name, marks=[pytest.mark.thorough] * (name == "grad"))
        for name, take in TAKEN.items()
    ],
)
def test_gradients_through_compiled_calls(case: Case, take: Any) -> None:
    tx = case.tx(use_accelerated_op=True)

    def steps(g: Tensor, p: Tensor, state: Any) -> Tensor:
        params = {"w": p}
        for _ in range(3):
            updates, state = tx.update({"w": g * params["w"]}, state, params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return params["w"].square().sum()

    (p, *_), ((g, *_),) = data(torch.float64, steps=1)
    # torch.func takes a state apart, and then its count is a tensor: each has one of its own
    compiles = torch.compile(fullgraph=True, backend="aot_eager")
    found = take(steps, compiles, g, p, tx.init({"w": p}))
    expected = take(steps, lambda function: function, g, p, tx.init({"w": p}))
    assert all(map(torch.equal, found, expected))
    assert all(x.abs().max() > 0 for x in expected)


@compiles
def test_what_cannot_be_compiled_with_kernels_is_refused_by_name(two_kernels: Any) -> None:
    g = [torch.ones(3)]
    tx = torchopt.adam(0.1, use_accelerated_op=True)
    half = [torch.ones(3, dtype=torch.bfloat16)]
    large = user_optimizer(lambda g, p, t, slots: (sum(g * (t + k) for k in range(1100)), slots))
    cases: list[tuple[Any, Any, Any, str]] = [
        (torchopt.adam(torch.tensor(0.1), use_accelerated_op=True), g, None, "is a tensor"),
        (tx, g, torchopt.OptState(torch.tensor(0), tx.init(g).slots), "count is a tensor"),
        (torchopt.nadam(use_accelerated_op=True), g, None, "mu_product.*is a tensor"),
        (large().with_accelerated_op(True), g, None, "at most 1024"),
        (torchopt.clip_grad_norm(1.0).with_accelerated_op(True), g, None, "not elementwise"),
        (two_kernels, half, None, "half precision"),
    ]
    for tx, grads, state, message in cases:
        torch._dynamo.reset()
        state = tx.init(grads) if state is None else state

        def update(g: Any, s: Any, tx: Any = tx) -> Any:
            return tx.update(g, s, inplace=False)

        with pytest.raises(Exception, match=f"use_accelerated_op=True requires.*{message}"):
            torch.compile(update, fullgraph=True, backend="aot_eager")(grads, state)


def test_kernels_in_a_compiler_that_is_too_old_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tree, "_COMPILER_KNOWS_OPTREE", False)
    tx, g = torchopt.adam(0.1, use_accelerated_op=True), [torch.ones(3)]
    compiled = torch.compile(lambda g, s: tx.update(g, s, inplace=False), fullgraph=True)
    message = "use_accelerated_op=True requires .* from torch 2.13 on; this is torch .* Pass None"
    with pytest.raises(Exception, match=message):
        compiled(g, tx.init(g))


def test_other_tracers_see_the_operator() -> None:
    tx = torchopt.adam(0.1, use_accelerated_op=True)
    (g, *_), ((h, *_), *_) = data(torch.float64)
    state = tx.init([g])

    def update(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        slots = dict(zip(state.slots, ([m], [v])))
        return tx.update([g], torchopt.OptState(3, slots), inplace=False)[0][0]

    for mode in ("real", "symbolic"):
        traced = make_fx(update, tracing_mode=mode)(g, g.clone(), g.abs())
        assert "torchopt.update.default" in traced.code
        assert torch.equal(traced(h, g, h.abs()), update(h, g, h.abs()))
    with FakeTensorMode() as fakes:
        fake = fakes.from_tensor(g)
        assert update(fake, fake, fake).shape == g.shape
