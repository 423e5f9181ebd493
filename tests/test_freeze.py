"""Frozen parameters stay what they are, whatever their gradients hold: set_to_zero and freeze."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F64, Case, every_independent_case, every_torch_case
from conftest import nonzero
from pointwise import evaluate_kernel, program_of
from tolerances import META_GRADIENT, assert_close
from torch import Tensor, nn

import torchopt
from torchopt.base.numerics import over_root


BODY = {"body": True, "head": False}
#: What a gradient of the body may hold.
SPOILT = (float("nan"), float("inf"), -float("inf"))
#: Ways to let no update through.
STOPS: dict[str, Callable[[], Any]] = {
    "freeze": lambda: torchopt.freeze(BODY),
    "function": lambda: torchopt.freeze(lambda params: {name: name == "body" for name in params}),
    "scale": lambda: torchopt.masked(torchopt.scale(0.0), BODY),
    "schedule": lambda: torchopt.masked(torchopt.scale_by_schedule(lambda count: 0), BODY),
}
every_stop = pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS.keys())


def make_params() -> dict[str, Tensor]:
    return {"body": nonzero(3), "head": nonzero(2)}


def make_grads(spoilt: float = float("nan")) -> dict[str, Tensor]:
    body = nonzero(3)
    body[1] = spoilt
    return {"body": body, "head": nonzero(2)}


class Net(nn.Module):
    """A network whose body has a gradient that is not finite: the slope of a root at zero."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.body = nn.Parameter(params["body"].clone())
        self.head = nn.Parameter(params["head"].clone())

    def loss(self) -> Tensor:
        smooth = (self.head * torch.arange(1.0, 3.0, **F64)).sum().sin() + self.head.square().sum()
        zero = self.body - self.body.detach()
        return smooth + zero.square().sqrt().sum() + self.body.sum() * self.head.prod()


# The three faces ----------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@every_stop
@every_independent_case
@pytest.mark.parametrize("spoilt", SPOILT, ids=str)
def test_the_functional_face(case: Case, stop: Any, spoilt: float) -> None:
    params = make_params()
    tx = torchopt.chain(case.tx(), stop())
    state, alone = tx.init(params), case.tx().init({"head": params["head"]})
    start, head = params["body"], {"head": params["head"]}
    for _ in range(3):
        grads = make_grads(spoilt)
        head_grads = {"head": grads["head"].clone()}
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
        head, alone = case.tx().apply_gradients(head_grads, alone, head, inplace=False)
        assert torch.equal(params["body"], start)
        assert_close(params["head"], head["head"])


@pytest.mark.sampled(3)
@every_stop
@every_independent_case
def test_the_differentiable_face(case: Case, stop: Any) -> None:
    net = Net(make_params())
    other = Net({"body": net.body.detach(), "head": net.head.detach()})
    other.body.requires_grad_(False)
    start = net.body
    frozen = torchopt.MetaOptimizer(net, torchopt.chain(case.tx(), stop()))
    alone = torchopt.MetaOptimizer(other, case.tx())
    for _ in range(2):
        assert not torch.autograd.grad(net.loss(), net.body)[0].isfinite().any()
        frozen.step(net.loss())
        alone.step(other.loss())
    assert torch.equal(net.body, start)
    assert_close(net.head, other.head)


@every_torch_case
@pytest.mark.parametrize("stop", ["freeze", "scale"])
def test_the_object_oriented_face(case: Case, stop: str) -> None:
    assert case.torch_cls is not None
    params = make_params()
    ours = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    head = nn.Parameter(params["head"].clone())
    named = [("body", ours["body"]), ("head", ours["head"])]
    stops = {
        "freeze": torchopt.freeze([True, False]),
        "scale": torchopt.masked(torchopt.scale(0.0), [True, False]),
    }
    optimizer = torchopt.Optimizer(named, torchopt.chain(case.tx(), stops[stop]))
    reference = case.torch_cls([head], **case.kwargs)
    for _ in range(3):
        grads = make_grads()
        for name, p in ours.items():
            p.grad = grads[name].clone()
        head.grad = grads["head"].clone()
        optimizer.step()
        reference.step()
        assert torch.equal(ours["body"], params["body"])
        assert_close(ours["head"], head)


@pytest.mark.parametrize("spoilt", SPOILT, ids=str)
def test_what_comes_after_a_freeze_may_move_by_decay_only(spoilt: float) -> None:
    params = make_params()
    tx = torchopt.chain(torchopt.freeze(BODY), torchopt.adamw(0.1, weight_decay=0.2))
    state, start = tx.init(params), params["body"]
    for k in range(1, 4):
        params, state = tx.apply_gradients(make_grads(spoilt), state, params, inplace=False)
        assert_close(params["body"], start * (1 - 0.1 * 0.2) ** k)
    assert torch.equal(state.exp_avg["body"], torch.zeros(3, **F64))  # moments stay clean


def test_a_freeze_on_both_sides_keeps_a_norm_clean() -> None:
    params, grads = make_params(), make_grads()
    tx = torchopt.chain(
        torchopt.freeze(BODY),
        torchopt.clip_grad_norm(0.1),
        torchopt.adamw(0.1),
        torchopt.freeze(BODY),
    )
    new, _ = tx.apply_gradients(grads, tx.init(params), params, inplace=False)
    assert torch.equal(new["body"], params["body"])
    assert new["head"].isfinite().all()
    assert not torch.equal(new["head"], params["head"])


# Numbers that are 0 for a while -------------------------------------------------------------------


def test_the_factor_of_a_scale_is_live() -> None:
    p = nn.Parameter(nonzero(3))
    optimizer = torchopt.Optimizer([p], torchopt.chain(torchopt.sgd(0.1), torchopt.scale(0.0)))
    start, grad = p.detach().clone(), nonzero(3)
    for factor, moved in ((0.0, 0.0), (0.5, 0.5), (-0.0, 0.5), (0, 0.5), (2.0, 2.5)):
        optimizer.param_groups[0]["step_size"] = factor
        p.grad = grad.clone()
        if not factor:
            p.grad[0] = float("nan")
        optimizer.step()
        assert_close(p, start - moved * 0.1 * grad)


def test_a_schedule_that_passes_through_zero() -> None:
    tx = torchopt.scale_by_schedule(torchopt.schedules.linear(0.0, 1.0, transition_steps=2))
    state = tx.init([nonzero(3)])
    for factor in (0.0, 0.5, 1.0):
        grad = nonzero(3)
        (update,), state = tx.update([grad], state, inplace=False)
        assert_close(update, factor * grad)


def test_one_factor_for_each_parameter() -> None:
    grads = make_grads()
    tx = torchopt.scale({"body": 0.0, "head": 0.5})
    updates, _ = tx.update(grads, tx.init(grads), inplace=False)
    assert torch.equal(updates["body"], torch.zeros(3, **F64))
    assert_close(updates["head"], 0.5 * grads["head"])


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("accelerated", [None, False])
@pytest.mark.parametrize("ends", ["last", "both"])
@every_independent_case
def test_meta_gradients(case: Case, ends: str, accelerated: bool | None) -> None:
    """Against central differences of the head trained alone, beside a body that is constant."""
    params = make_params()
    lr = torch.tensor(case.value("lr"), requires_grad=True, **F64)
    stop, net = torchopt.freeze(BODY), Net(params)
    first = [stop] if ends == "both" else []
    tx = torchopt.chain(*first, case.tx({"lr": lr}), stop).with_accelerated_op(accelerated)
    start = net.body, net.head
    inner = torchopt.MetaOptimizer(net, tx)

    def final(net: Net) -> Tensor:
        return (net.head**3).sum() + (net.body**2 * net.head.sum()).sum()

    def trained(body: float = 0.0, head: float = 0.0, rate: float = 0.0) -> float:
        unit = torch.eye(1, 3, **F64)[0]
        other = Net(
            {"body": params["body"] + body * unit, "head": params["head"] + head * unit[:2]}
        )
        other.body.requires_grad_(False)
        alone = torchopt.MetaOptimizer(other, case.tx({"lr": lr.item() + rate}))
        for _ in range(2):
            alone.step(other.loss())
        return final(other).item()

    for _ in range(2):
        inner.step(net.loss())
    by_body, by_head, by_lr = torch.autograd.grad(final(net), [*start, lr])
    assert by_body.isfinite().all()
    h = 1e-5
    for name, slope in (("body", by_body[0]), ("head", by_head[0]), ("rate", by_lr)):
        difference = (trained(**{name: h}) - trained(**{name: -h})) / (2 * h)
        assert abs(slope.item() - difference) <= META_GRADIENT * max(1.0, abs(difference)), name


@torchopt.transformation
class OverItsRoot(torchopt.TensorTransformation):
    """A rule of whole tensors, after which a kernel takes all parameters as one node."""

    def rule(self, g: Tensor, p: Any, t: Any, slots: tuple) -> tuple[Tensor, tuple]:
        return over_root(g, g.square(), 1.0, 0.1), slots


def test_a_rule_of_whole_tensors_says_nothing_of_what_is_frozen() -> None:
    """No gradient comes back to it, and it must not go on with one of zeros: 0 * nan is nan."""
    net = Net(make_params())
    start = net.body
    rate = torchopt.scale_by_learning_rate(0.1)
    inner = torchopt.MetaOptimizer(
        net, torchopt.chain(OverItsRoot(), rate, torchopt.scale(0.5), torchopt.freeze(BODY))
    )
    for _ in range(2):
        inner.step(net.loss())
    (by_body,) = torch.autograd.grad((net.head**3).sum() + net.body.square().sum(), start)
    assert by_body.isfinite().all()


@every_stop
def test_no_derivative_passes(stop: Any) -> None:
    grads = {name: g.requires_grad_() for name, g in make_grads().items()}
    tx = torchopt.chain(torchopt.adam(0.1, use_accelerated_op=False), stop())
    updates, _ = tx.update(grads, tx.init(grads), inplace=False)
    found = torch.autograd.grad(updates["head"].sum(), list(grads.values()), allow_unused=True)
    assert found[0] is None
    assert not updates["body"].requires_grad
    assert found[1] is not None
    assert found[1].isfinite().all()


def test_functional_transforms() -> None:
    def moved(g: Tensor) -> Tensor:
        tx = torchopt.set_to_zero()
        return tx.update(g, tx.init(g), inplace=False)[0].sum()

    g = torch.tensor([float("nan"), 2.0], **F64)
    assert torch.equal(torch.func.grad(moved)(g), torch.zeros(2, **F64))
    value, slope = torch.func.jvp(moved, (g,), (torch.ones(2, **F64),))
    assert value == 0
    assert slope == 0
    batch = torch.func.vmap(torch.func.grad(moved))(g.expand(3, 2))
    assert torch.equal(batch, torch.zeros(3, 2, **F64))
    assert torch.equal(torch.compile(moved, backend="eager", fullgraph=True)(g), moved(g))


# Kinds of tensors and kernels ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64], ids=str
)
def test_dtypes(dtype: torch.dtype) -> None:
    params = {"body": torch.ones(2, dtype=dtype), "head": torch.ones(2, dtype=dtype)}
    grads = {
        "body": torch.full((2,), float("nan"), dtype=dtype),
        "head": torch.ones_like(params["head"]),
    }
    tx = torchopt.chain(torchopt.adamw(0.1), torchopt.freeze(BODY))
    updates, _ = tx.update(grads, tx.init(params), params, inplace=False)
    assert updates["body"].dtype == dtype
    assert torch.equal(updates["body"], torch.zeros(2, dtype=dtype))


def test_sparse_gradients() -> None:
    layer = nn.Embedding(4, 2, sparse=True)
    start = layer.weight.detach().clone()
    tx = torchopt.chain(torchopt.sgd(0.1), torchopt.freeze(True))
    optimizer = torchopt.Optimizer(layer.parameters(), tx)
    layer(torch.tensor([1, 3])).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, start)
    adam = torchopt.Optimizer(layer.parameters(), torchopt.masked(torchopt.adam(0.1), True))
    with pytest.raises(TypeError, match="Masked has no sparse rule"):
        adam.step()


@pytest.mark.skipif(not torchopt.accelerated_op_available(), reason="no kernels are loaded")
def test_kernels_may_be_required_beside_it() -> None:
    params, grads = make_params(), make_grads()
    for stop in (torchopt.freeze(BODY), torchopt.set_to_zero()):
        tx = torchopt.chain(torchopt.adamw(0.1), stop).with_accelerated_op(True)
        updates, _ = tx.update(grads, tx.init(params), params, inplace=False)
        assert torch.equal(updates["body"], torch.zeros(3, **F64))
        fused_part = torchopt.kernels.why(tx, params, params=params)
        assert all("SetToZero" in line or "Masked" in line for line in fused_part)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("mode", ["update", "apply"])
def test_a_kernel_that_writes_zeros(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchopt.kernels.backends import gpu as triton_backend

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    program = program_of(torchopt.chain(torchopt.sgd(0.1, momentum=0.9), torchopt.set_to_zero()))
    kernel = program.kernels[mode]
    operands = {s: nonzero(1500) for s in kernel.inputs}
    operands["g"][0] = float("nan")
    outputs: dict[str, Any] = {s: [torch.full((1500,), 7.0, **F64)] for s in kernel.outputs}
    numbers = [0.1 + k for k in range(len(kernel.numbers))]
    numbers[kernel.numbers.index("0.0")] = 0.0
    given: dict[str, Any] = {s: [x] for s, x in operands.items()}
    triton_backend.run(kernel, given, outputs, [operands["g"]], [tuple(numbers)], None)
    expected = evaluate_kernel(kernel, operands, numbers)
    assert torch.equal(
        outputs["u"][0], operands["p"] if mode == "apply" else torch.zeros(1500, **F64)
    )
    assert torch.equal(outputs["s0"][0][1:], expected["s0"][1:])
