"""Counters that are made for the next update: the rule gets them as they were before its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapting import assert_derivative
from conftest import nonzero
from fusing import needs_library
from tolerances import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import vmap

import torchopt
from torchopt import Counter


@torchopt.transformation
class Late(torchopt.ElementwiseTransformation):
    """Gradients times a rate that grows after each step, and a sum that grows before."""

    growth: Any = torchopt.hyper(1.5, gt=0)

    counters = (Counter("rate", 1.0, ahead=True), Counter("total", 0.0))

    def count(self, t: Any, *, rate: Any, total: Any, growth: Any) -> dict[str, Any]:
        return {"rate": rate * growth, "total": total + growth}

    def rule(
        self, g: Tensor, p: Any, t: Any, slots: tuple, *, growth: Any, rate: Any, total: Any
    ) -> tuple[Tensor, tuple]:
        return g * rate / total, slots


def expected(g: Tensor, t: int, growth: float) -> Tensor:
    return g * growth ** (t - 1) / (growth * t)


def late_step() -> Any:
    return torchopt.chain(Late(2.0), torchopt.scale_by_learning_rate(1.0))


def labels(params: Any) -> Any:
    return dict.fromkeys(params, "a") if isinstance(params, dict) else ["a"] * len(params)


def bare(tx: Any) -> Any:
    return tx


#: Everything that passes counters on.
WHERE = {
    "bare": bare,
    "chain": lambda tx: torchopt.chain(torchopt.scale(1.0), tx),
    "masked": lambda tx: torchopt.masked(tx, True),
    "partition": lambda tx: torchopt.partition({"a": tx}, labels),
    "named": lambda tx: torchopt.named_chain(("a", tx)),
    "injected": torchopt.inject_hyperparams,
    "every": lambda tx: torchopt.MultiSteps(tx, 1),
    "finite": lambda tx: torchopt.apply_if_finite(tx, 3),
    "twice": lambda tx: torchopt.masked(torchopt.partition({"a": tx}, labels), True),
}


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "pure"])
@pytest.mark.parametrize("where", WHERE)
def test_the_functional_face(where: str, inplace: bool, setting: bool | None) -> None:
    tx = WHERE[where](Late(1.5)).with_accelerated_op(setting)
    params = {"a": nonzero(3), "b": nonzero(2)}
    state = tx.init(params)
    for t in range(1, 5):
        grads = {"a": nonzero(3), "b": nonzero(2)}
        given = {n: g.clone() for n, g in grads.items()}
        updates, state = tx.update(given, state, params, inplace=inplace)
        assert_close(updates, {n: expected(g, t, 1.5) for n, g in grads.items()})


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
@pytest.mark.parametrize("where", WHERE)
def test_the_other_faces(where: str, setting: bool | None) -> None:
    tx = torchopt.chain(
        WHERE[where](Late(1.5)), torchopt.scale_by_learning_rate(1.0)
    ).with_accelerated_op(setting)
    p = nonzero(3)
    own, net = nn.Parameter(p.clone()), nn.ParameterDict({"p": p.clone()})
    optimizer, inner = torchopt.Optimizer([own], tx), torchopt.MetaOptimizer(net, tx)
    for t in range(1, 5):
        g = nonzero(3)
        own.grad = g.clone()
        optimizer.step()
        inner.step((net["p"] * g).sum())
        p = p - expected(g, t, 1.5)
        assert_close(own.detach(), p)
        assert_close(net["p"].detach(), p)


def test_what_is_kept_is_for_the_next_step() -> None:
    tx, own = late_step(), nn.Parameter(nonzero(3))
    optimizer, params = torchopt.Optimizer([own], tx), [own.detach().clone()]
    other = torchopt.Optimizer([own], tx)
    state = tx.init(params)
    assert (float(state.rate), float(state.total)) == (1.0, 0.0)
    for t in range(1, 5):
        own.grad = nonzero(3)
        optimizer.step()
        _, state = tx.update(params, state, params, inplace=False)
        assert (float(state.rate), float(state.total)) == (2.0**t, 2.0 * t)
        assert (optimizer.state[own]["rate"], optimizer.state[own]["total"]) == (2.0**t, 2.0 * t)
        other.load_state_dict(optimizer.state_dict())
        assert other.state[own]["rate"] == 2.0**t


@needs_library
def test_a_kernel_that_steps_in_place_keeps_it_too() -> None:
    optimizer = torchopt.Optimizer([own := nn.Parameter(nonzero(3))], late_step())
    p = own.detach().clone()
    for t in range(1, 5):
        own.grad = nonzero(3)
        optimizer.step()
        p = p - expected(own.grad, t, 2.0)
        assert_close(own.detach(), p)
        assert optimizer.state[own]["rate"] == 2.0**t
    (prepared,) = optimizer._stepper.prepared
    assert prepared.numbers == {"rate": 16.0, "total": 8.0}


def test_a_parameter_without_a_gradient_keeps_its_own() -> None:
    tx, params = Late(2.0), {"a": nonzero(3), "b": nonzero(3)}
    state = tx.init(params)
    for names in ("ab", "a", "a", "b"):
        grads = {n: params[n] if n in names else None for n in params}
        updates, state = tx.update(grads, state, params, inplace=False)
    assert state.rate == {"a": 8.0, "b": 4.0}
    assert_close(updates["b"], expected(params["b"], 2, 2.0))


def test_a_compiled_update_and_one_of_a_batch() -> None:
    torch._dynamo.reset()
    tx, params = Late(1.5), {"p": nonzero(2, 3), "q": nonzero(2, 2)}
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def update(g: Any, state: Any, p: Any) -> Any:
        return tx.update(g, state, p, inplace=False)

    state, mapped, graphs = tx.init(params), vmap(tx.init)(params), []
    for t in range(1, 6):
        grads = {"p": nonzero(2, 3), "q": nonzero(2, 2)}
        updates, state = update(grads, state, params)
        each, mapped = vmap(lambda g, s, p: tx.update(g, s, p, inplace=False))(
            grads, mapped, params
        )
        assert_close(updates["p"], expected(grads["p"], t, 1.5))
        assert_close(each["p"], expected(grads["p"], t, 1.5))
        graphs.append(counter.frame_count)
    assert graphs[2:] == graphs[1:2] * 3
    torch._dynamo.reset()


@torchopt.transformation
class OfStep(torchopt.ElementwiseTransformation):
    """Gradients times a number that is made from the step count alone."""

    counters = (Counter("rate", 1.0, ahead=True),)

    def count(self, t: Any, *, rate: Any) -> dict[str, Any]:
        return {"rate": 1 / (1 + t)}

    def rule(self, g: Tensor, p: Any, t: Any, slots: tuple, *, rate: Any) -> tuple[Tensor, tuple]:
        return g * rate, slots


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_number_that_forgets_the_old_one_is_no_constant_when_compiled(backend: str) -> None:
    torch._dynamo.reset()
    tx, p, counter = OfStep(), nonzero(3), CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def update(g: Tensor, state: Any) -> Any:
        return tx.update(g, state, g, inplace=False)

    state, graphs = tx.init(p), []
    for t in range(1, 6):
        u, state = update(p, state)
        assert_close(u, p / t)
        graphs.append(counter.frame_count)
    assert graphs[2:] == graphs[1:2] * 3
    torch._dynamo.reset()


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("per", ["all", "entry"])
def test_a_learned_number_has_its_derivative_through_the_kept_one(per: str) -> None:
    net = nn.ParameterDict({"p": nonzero(3)})
    growth = torch.tensor(1.5) if per == "all" else 1.5 + torch.rand(3)
    growth.requires_grad_()

    def outer() -> Tensor:
        tx = torchopt.chain(Late(growth), torchopt.scale_by_learning_rate(0.1))
        with torchopt.inner_loop(net, tx) as inner:
            for _ in range(4):
                inner.step((net["p"] ** 3).sum())
            return (net["p"] ** 2).sum()

    assert_derivative(outer, [growth])
