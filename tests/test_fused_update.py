"""The fused update equals the unfused one: every algorithm, dtype and face; and the switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from algorithms import Algorithm
from cases import Case, every_algorithm, every_fused_case, every_fused_kind
from conftest import nonzero
from fusing import (
    FACES,
    SHAPES,
    copy_of,
    data,
    functional,
    kernel_calls_fixture,  # noqa: F401
    needs_library,
    object_oriented,
)
from tolerances import assert_close
from torch import Tensor

import torchopt
from torchopt.kernels import why


pytestmark = needs_library
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
every_face = pytest.mark.parametrize("face", FACES)


def unfused(case: Case, **changed: Any) -> torchopt.GradientTransformation:
    return case.recipe(**{**case.kwargs, **changed}).with_accelerated_op(False)


def fused(case: Case, **changed: Any) -> torchopt.GradientTransformation:
    return case.recipe(**{**case.kwargs, **changed})


# Values -------------------------------------------------------------------------------------------


@pytest.mark.sampled(2, each=2)
@every_face
@every_dtype
@every_fused_case
def test_values(case: Case, dtype: torch.dtype, face: str, kernel_calls: list[int]) -> None:
    params, grads = data(dtype)
    expected = FACES[face](unfused(case), params, grads)
    assert not kernel_calls
    actual = FACES[face](fused(case), params, grads)
    assert len(kernel_calls) >= len(grads), "not every step was fused"
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert_close(actual, expected, dtype, times=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@every_fused_case
def test_faces_give_the_same_bits(case: Case, dtype: torch.dtype) -> None:
    params, grads = data(dtype)
    results = {name: face(fused(case), params, grads) for name, face in FACES.items()}
    for name, result in results.items():
        for actual, expected in zip(result, results["functional"]):
            assert torch.equal(actual, expected), name


@pytest.mark.sampled(2)
@every_face
@every_fused_case
def test_maximize(case: Case, face: str, kernel_calls: list[int]) -> None:
    params, grads = data()
    expected = FACES[face](unfused(case, maximize=True), params, grads)
    actual = FACES[face](fused(case, maximize=True), params, grads)
    assert_close(actual, expected)
    assert len(kernel_calls) >= len(grads), "not every step was fused"


@pytest.mark.sampled(2)
@every_dtype
@every_fused_kind
def test_many_parameters_of_many_sizes(case: Case, dtype: torch.dtype) -> None:
    shapes = ((70001,), (0,), (1,), (3, 0, 2), (255,), (257, 3), (), (2, 2, 2, 2))
    params, grads = data(dtype, steps=2, shapes=shapes)
    for face in FACES.values():
        expected = face(unfused(case), params, grads)
        assert_close(face(fused(case), params, grads), expected, dtype, times=4)


@every_fused_case
def test_small_gradients_in_half_precision(case: Case) -> None:
    """Where float16 arithmetic would underflow, the kernels compute in float32 as the rules do."""
    params, grads = data(torch.float16, steps=3)
    grads = [[g * 1e-4 for g in own] for own in grads]
    for face in FACES.values():
        actual = face(fused(case), params, grads)
        assert_close(actual, face(unfused(case), params, grads), torch.float16, times=4)


@every_fused_case
def test_zero_gradients(case: Case) -> None:
    params, grads = data(steps=3)
    grads = [[g * 0 for g in own] for own in grads]
    for face in FACES.values():
        actual = face(fused(case), params, grads)
        assert all(torch.isfinite(x).all() for x in actual)
        assert_close(actual, face(unfused(case), params, grads))


# First derivatives --------------------------------------------------------------------------------


def derivatives(tx: Any, dtype: torch.dtype, steps_before: int, zero: bool = False) -> list[Tensor]:
    """By gradients, parameters and slots, of a function of updates and new slots."""
    params, grads = data(dtype, steps=steps_before + 1)
    state = tx.init(params)
    for own in grads[:-1]:
        _, state = tx.update(own, state, params, inplace=False)
    if zero:
        grads[-1] = [g * 0 for g in grads[-1]]
        state.slots = {k: [x * 0 for x in v if x is not None] for k, v in state.slots.items()}
    state = copy_of(state)
    slots = [x for column in state.slots.values() for x in column if x is not None]
    inputs = [x.requires_grad_() for x in (*grads[-1], *params, *slots)]
    updates, new = tx.update(grads[-1], state, params, inplace=False)
    outputs = [*updates, *(x for c in new.slots.values() for x in c if x is not None)]
    if tx.plan.parts[0].use_accelerated_op is None:
        assert all("Fused" in x.grad_fn.name() for x in updates), updates[0].grad_fn
    total = sum((x.double() * nonzero(*x.shape)).sum() for x in outputs)
    found = torch.autograd.grad(total, inputs, materialize_grads=True)
    assert [x.dtype for x in found] == [x.dtype for x in inputs]
    # one vector of each kind: where terms cancel, what counts is their size, not that of the rest
    n = len(params)
    kinds = [found[k : k + n] for k in range(0, len(found), n)]
    return [torch.cat([x.flatten() for x in kind]) for kind in kinds]


@pytest.mark.sampled(2, each=2)
@pytest.mark.parametrize("steps_before", [0, 2], ids=["first-step", "third-step"])
@every_dtype
@every_fused_case
def test_derivatives(case: Case, dtype: torch.dtype, steps_before: int) -> None:
    expected = derivatives(unfused(case), dtype, steps_before)
    assert_close(derivatives(fused(case), dtype, steps_before), expected, times=4)


@every_fused_case
def test_derivatives_at_zero(case: Case) -> None:
    expected = derivatives(unfused(case), torch.float64, 2, zero=True)
    actual = derivatives(fused(case), torch.float64, 2, zero=True)
    assert all(torch.isfinite(x).all() for x in actual)
    assert_close(actual, expected)


@every_fused_case
def test_meta_gradient_through_the_differentiable_face(case: Case) -> None:
    found = []
    for tx in (fused(case), unfused(case)):
        params, _ = data(shapes=((2, 3), (3,)))
        net = torch.nn.ParameterList(params)
        start = list(net)
        optimizer = torchopt.MetaOptimizer(net, tx)
        for _ in range(3):
            optimizer.step(sum((p**3).sum() for p in net) + (net[0] @ net[1]).square().sum())
        (state,) = optimizer.extract_state()
        loss = sum(p.sin().sum() for p in net)
        loss = loss + sum(x.cos().sum() for slot in state.slots.values() for x in slot.values())
        found.append(torch.autograd.grad(loss, start))
    assert_close(found[0], found[1], times=4)


# The switch ---------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@every_face
@every_fused_case
def test_required_gives_the_same_bits(case: Case, face: str) -> None:
    params, grads = data(steps=3)
    expected = FACES[face](fused(case), params, grads)
    actual = FACES[face](fused(case, use_accelerated_op=True), params, grads)
    assert all(map(torch.equal, actual, expected))


@every_face
def test_never_means_never(face: str, kernel_calls: list[int]) -> None:
    params, grads = data(steps=3)
    FACES[face](torchopt.adam(0.1, use_accelerated_op=False), params, grads)
    assert not kernel_calls
    lines = why(torchopt.adam(0.1, use_accelerated_op=False), params, params=params)
    assert lines
    assert all("use_accelerated_op is False" in line for line in lines)


@every_algorithm
def test_other_values_are_refused(algorithm: Algorithm) -> None:
    for value in (1, 0, "True", "yes"):
        with pytest.raises(TypeError, match="None, True or False"):
            algorithm.recipe(0.1, use_accelerated_op=value)


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@every_fused_case
def test_nothing_stands_in_the_way(case: Case, maximize: bool) -> None:
    for dtype in DTYPES:
        params, grads = data(dtype, steps=2)
        tx = fused(case, maximize=maximize)
        state = tx.init(params)
        for own in grads:
            assert why(tx, own, state, params) == []
            _, state = tx.update(own, state, params, inplace=False)


def rate() -> Tensor:
    """A learning rate that kernels do not take."""
    return torch.tensor(0.1, dtype=torch.float64).as_subclass(type("Rate", (Tensor,), {}))


def test_asking_changes_nothing(kernel_calls: list[int]) -> None:
    tx = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam(0.1))
    params, (grads,) = data(steps=1)
    state = tx.init(params)
    before = copy_of([params, grads, state])
    (line, *rest) = why(tx, grads, state, params)
    assert "ClipGradNorm" in line
    assert all("ClipGradNorm" in other for other in rest)
    after = [params, grads, state]
    flat = torch.utils._pytree.tree_leaves
    assert all(map(torch.equal, flat(before[:2]), flat(after[:2])))
    assert state.step == 0
    # even where kernels are required, asking does not raise
    assert why(torchopt.adam(rate(), use_accelerated_op=True), params)
    with pytest.raises(TypeError, match="why"):
        why(torchopt.adam, params)


# Among others -------------------------------------------------------------------------------------

CHAINS: dict[str, Any] = {
    "clip first": lambda: torchopt.chain(torchopt.clip_grad_norm(0.5), torchopt.adam(0.1)),
    "clip between": lambda: torchopt.chain(
        torchopt.scale_by_adam(), torchopt.clip_grad_norm(0.5), torchopt.scale(-0.1)
    ),
    "clip last": lambda: torchopt.chain(torchopt.adam(0.1), torchopt.clip_grad_norm(0.05)),
    "masked": lambda: torchopt.masked(torchopt.adam(0.1), lambda p: [True, False, True][: len(p)]),
    "decay of some": lambda: torchopt.chain(
        torchopt.scale_by_adam(),
        torchopt.add_decayed_weights(0.1, mask=lambda p: [True, False, True][: len(p)]),
        torchopt.scale(-0.1),
    ),
    "schedule": lambda: torchopt.adam(torchopt.schedules.linear(0.1, 0.01, transition_steps=4)),
    "two": lambda: torchopt.chain(torchopt.trace(0.5), torchopt.adam(0.1)),
    "own part unfused": lambda: torchopt.chain(
        torchopt.scale_by_adam(), torchopt.scale(-0.1).with_accelerated_op(False)
    ),
    "by name": lambda: torchopt.adam([0.1, 0.2, 0.3]),
    "identity": lambda: torchopt.identity(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("face", ["functional", "functional-default", "object-oriented"])
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str, face: str, dtype: torch.dtype, kernel_calls: list[int]) -> None:
    params, grads = data(dtype)
    actual = FACES[face](CHAINS[name](), params, grads)
    assert bool(kernel_calls) == (name != "identity")
    expected = FACES[face](CHAINS[name]().with_accelerated_op(False), params, grads)
    assert_close(actual, expected, dtype, times=4)


def test_a_rate_without_kernel_falls_back_for_its_part_only(kernel_calls: list[int]) -> None:
    params, grads = data(steps=1)
    lines = why(torchopt.adam(rate()), grads[0], params=params)
    assert [line.split(" of ")[0] for line in lines] == ["ScaleByLearningRate"] * len(SHAPES)
    assert all(line.endswith("lr is a Rate, no plain tensor") for line in lines)
    found = []
    for setting in (None, False):
        kernel_calls.clear()
        lr = rate().requires_grad_()
        result = functional(torchopt.adam(lr).with_accelerated_op(setting), params, grads)
        assert bool(kernel_calls) == (setting is None)
        derivative = torch.autograd.grad(sum(p.sum() for p in result[:3]), lr)
        found.append([x.detach().as_subclass(Tensor) for x in (*result, *derivative)])
    assert_close(found[0], found[1])


def test_groups_with_their_own_numbers(kernel_calls: list[int]) -> None:
    """One kernel call takes parameters of all groups, each with its row of numbers."""
    params, grads = data()
    results = []
    for setting in (None, False):
        own = [torch.nn.Parameter(p.clone()) for p in params]
        groups = [
            {"params": own[:1], "lr": 0.3, "betas": (0.5, 0.6)},
            {"params": own[1:2], "weight_decay": 0.2, "eps": 0.1},
            {"params": own[2:], "maximize": True, "amsgrad": True},
        ]
        optimizer = torchopt.Adam(groups, lr=0.1, use_accelerated_op=setting)
        for gs in grads:
            for p, g in zip(own, gs):
                p.grad = g.clone()
            optimizer.step()
        state = [x for p in own for x in optimizer.state[p].values() if isinstance(x, Tensor)]
        results.append([*(p.detach() for p in own), *state])
    assert kernel_calls
    assert_close(results[0], results[1])


@every_fused_case
def test_parameters_that_lack_a_gradient_sometimes(case: Case) -> None:
    params, grads = data(steps=6)
    results = []
    for tx in (fused(case), unfused(case)):
        state, own = tx.init(params), list(params)
        for step, gs in enumerate(grads):
            given = [None if (step + k) % 3 == 0 else g for k, g in enumerate(gs)]
            updates, state = tx.update(given, state, own, inplace=False)
            own = torchopt.apply_updates(own, updates, inplace=False)
        results.append([*own, *(x for c in state.slots.values() for x in c if x is not None)])
    assert_close(results[0], results[1])


def test_live_changes_of_hyperparameters() -> None:
    """Every change of a number or a flag between steps takes effect at once."""
    changes = {
        torchopt.SGD: [{"momentum": 0.9}, {"nesterov": True}, {"momentum": 0.0, "nesterov": False}],
        torchopt.Adam: [{"lr": 0.5}, {"amsgrad": True}, {"weight_decay": 0.1}, {"maximize": True}],
        torchopt.RMSprop: [{"momentum": 0.9}, {"centered": True}, {"alpha": 0.5}, {"momentum": 0}],
    }
    for cls, sequence in changes.items():
        results = []
        for setting in (None, False):
            params, grads = data(steps=3 * (len(sequence) + 1))
            own = [torch.nn.Parameter(p) for p in params]
            optimizer = cls(own, lr=0.1, use_accelerated_op=setting)
            for step, gs in enumerate(grads):
                if step % 3 == 0 and step:
                    optimizer.param_groups[0].update(sequence[step // 3 - 1])
                for p, g in zip(own, gs):
                    p.grad = g
                optimizer.step()
            results.append([p.detach() for p in own])
        assert_close(results[0], results[1], what=cls.__name__)


def test_against_torch_optim() -> None:
    """One comparison that owes nothing to this library's rules."""
    params, grads = data(steps=6)
    own = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(own, lr=0.1, weight_decay=0.1, amsgrad=True)
    for gs in grads:
        for p, g in zip(own, gs):
            p.grad = g.clone()
        optimizer.step()
    tx = torchopt.adamw(0.1, weight_decay=0.1, amsgrad=True, use_accelerated_op=True)
    actual = object_oriented(tx, params, grads)[: len(params)]
    assert_close(actual, [p.detach() for p in own])


def test_required_of_a_part_that_has_no_kernel() -> None:
    """``True`` is never quietly ignored, not even for a part that no kernel could compute."""
    params, (grads,) = data(steps=1)
    tx = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam()).with_accelerated_op(True)
    with pytest.raises(RuntimeError, match="ClipGradNorm: it is not elementwise"):
        tx.update(grads, tx.init(params), params, inplace=False)
