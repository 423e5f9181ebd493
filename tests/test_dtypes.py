"""Purity and dtypes: pure calls change no input, no dtype drifts, half precision stays sane."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    F64,
    Case,
    every,
    every_case,
    every_entrywise_case,
    every_meta_case,
    every_torch_case,
)
from conftest import nonzero
from test_gradcheck import TRANSFORMS
from tolerances import GRADCHECK, all_finite, assert_close
from torch import Tensor, nn

import torchopt


HALVES = (torch.bfloat16, torch.float16)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])


def tensors_of(*trees: Any) -> list[Tensor]:
    """Return the tensors of trees; of a state the slots, for counts have a dtype of their own."""
    flat = torch.utils._pytree.tree_leaves
    leaves = [x for t in trees for x in flat(t, is_leaf=lambda x: isinstance(x, torchopt.OptState))]
    leaves = [y for x in leaves for y in flat(x.slots if hasattr(x, "slots") else x)]
    return [x for x in leaves if isinstance(x, Tensor)]


def storages(*trees: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors_of(*trees)}


# Purity -------------------------------------------------------------------------------------------


def assert_pure(
    tx: torchopt.GradientTransformation,
    hyper: Any,
    record: bool,
    fresh: bool = False,
    constant: tuple[str, ...] = (),
) -> None:
    """Assert that three pure steps change no input, and that new slots do not alias gradients.

    With ``fresh`` no result shares memory with any input, but the slots that are ``constant``.
    """
    params = {"w": nonzero(2), "b": nonzero(1, 1)}
    state = tx.init(params)
    for _ in range(3):
        grads = {key: nonzero(*p.shape, requires_grad=record) for key, p in params.items()}
        inputs = tensors_of(params, grads, state, hyper)
        versions = [tensor._version for tensor in inputs]
        values = [tensor.detach().clone() for tensor in inputs]
        updates, new_state = tx.update(grads, state, params, inplace=False)
        new_params = torchopt.apply_updates(params, updates, inplace=False)
        assert [tensor._version for tensor in inputs] == versions
        assert all((tensor == value).all() for tensor, value in zip(inputs, values))
        assert new_state is not state
        assert storages(new_params).isdisjoint(storages(inputs))
        # a gradient buffer that is reused after the call must not change the state
        assert storages(new_state).isdisjoint(storages(grads, params, hyper))
        if fresh:
            new = [slot for name, slot in new_state.slots.items() if name not in constant]
            assert storages(updates, new).isdisjoint(storages(inputs))
        assert new_state.step == state.step + 1
        params, state = new_params, new_state


@pytest.mark.parametrize("record", [False, True], ids=["plain", "recorded"])
@every_case
def test_pure_algorithms(case: Case, record: bool) -> None:
    hyper = case.tensors(requires_grad=record)
    constant = case.algorithm.constant
    assert_pure(case.tx(), {}, record, fresh=True, constant=constant)
    assert_pure(case.tx(hyper), hyper, record, fresh=True, constant=constant)


@pytest.mark.parametrize("record", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_pure_transforms(name: str, record: bool) -> None:
    build, values = TRANSFORMS[name]
    hyper = {k: torch.as_tensor(v, **F64).requires_grad_(record) for k, v in values.items()}
    assert_pure(build(hyper), hyper, record)


@every_meta_case
def test_differentiable_face_is_pure(case: Case) -> None:
    net = nn.Linear(3, 2, **F64)
    optimizer = case.meta(net, **case.arguments(case.tensors(requires_grad=True)))
    x = nonzero(4, 3)
    for _ in range(3):
        before = [*net.parameters(), *tensors_of(optimizer.extract_state())]
        versions = [tensor._version for tensor in before]
        values = [tensor.detach().clone() for tensor in before]
        optimizer.step(net(x).square().mean())
        assert [tensor._version for tensor in before] == versions
        assert all((tensor == value).all() for tensor, value in zip(before, values))
        assert all(new is not old for new, old in zip(net.parameters(), before))


# float32 and float64 ------------------------------------------------------------------------------

FULL = (torch.float32, torch.float64)


@pytest.mark.sampled(3, each=2)
@pytest.mark.parametrize("hyper_dtype", [None, *FULL, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [*FULL, *HALVES], ids=str)
@every_case
def test_no_dtype_drifts(case: Case, dtype: torch.dtype, hyper_dtype: torch.dtype | None) -> None:
    """Updates and parameters keep the parameter's dtype, slots too (float32 for half precision)."""
    params = {"vector": nonzero(3, dtype=dtype), "scalar": nonzero(dtype=dtype)}
    shapes = (torch.Size, *case.algorithm.shapes.values())
    known = {torch.Size(shape(p.shape)) for shape in shapes for p in params.values()}
    by_element = {}
    if hyper_dtype is not None:  # 0-d for the scalar, one per element for the vector
        by_element = {
            name: {
                "vector": torch.full((3,), case.value(name), dtype=hyper_dtype),
                "scalar": torch.tensor(case.value(name), dtype=hyper_dtype),
            }
            for name in case.tunable_by_entry
            if hyper_dtype not in HALVES or name == "lr"  # 1 - 0.95 ** t needs more digits
        }
    shared = {name: values["scalar"] for name, values in by_element.items()}
    unfused = {"use_accelerated_op": False}
    alone = [case.tx({name: values}, **unfused) for name, values in by_element.items()]
    for tx in (case.tx(by_element), case.tx(shared), case.tx(by_element, **unfused), *alone):
        state, p = tx.init(params), params
        for step in range(2 + case.algorithm.rests):
            grads = {key: nonzero(*value.shape, dtype=dtype) for key, value in p.items()}
            updates, state = tx.update(grads, state, p, inplace=False)
            p = torchopt.apply_updates(p, updates, inplace=False)
            slot_dtype = torch.float32 if dtype in HALVES else dtype
            assert {u.dtype for u in updates.values()} == {dtype}
            assert {q.dtype for q in p.values()} == {dtype}
            assert {slot.dtype for slot in tensors_of(state)} <= {slot_dtype}
            assert {slot.shape for slot in tensors_of(state)} <= known
            assert all_finite(*updates.values())
            moves = step >= case.algorithm.rests
            assert case.algorithm.may_rest or all((u != 0).all() == moves for u in updates.values())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [*FULL, *HALVES], ids=str)
@every_case
def test_no_dtype_drifts_in_the_object_faces(case: Case, dtype: torch.dtype) -> None:
    lr = torch.tensor(case.value("lr"), **F64)
    for shape in ((3,), ()):
        p = nn.Parameter(nonzero(*shape, dtype=dtype))
        before = p.detach().clone()
        optimizer = case.cls([p], **case.arguments({"lr": lr}))
        module = nn.ParameterDict({"p": p.detach().clone()})
        meta = case.meta(module, **case.arguments({"lr": lr}))
        for _ in range(3):  # an odd number of equal steps does not cancel
            p.grad = nonzero(*shape, dtype=dtype)
            optimizer.step()
            meta.step(module["p"].square().sum())
        assert p.dtype == module["p"].dtype == dtype
        assert (p != before).all()
        assert (module["p"] != before).all()
        slots = [optimizer.state[p].get(name) for name in optimizer.transformation.slot_names()]
        slots = [x for x in slots if x is not None] + tensors_of(meta.extract_state())
        assert {slot.dtype for slot in slots} <= {torch.float32 if dtype in HALVES else dtype}


@every_entrywise_case
def test_scalars_are_computed_like_vectors(case: Case) -> None:
    """A 0-d parameter meets Python numbers and 0-d tensors without losing digits."""
    vector, gradients = nonzero(1), [nonzero(1) for _ in range(3)]
    for changed in ({}, case.tensors()):
        tx, results = case.tx(changed), []
        for shape in ((1,), ()):
            p = vector.view(shape)
            state = tx.init(p)
            for g in gradients:
                updates, state = tx.update(g.view(shape), state, p, inplace=False)
                p = torchopt.apply_updates(p, updates, inplace=False)
            results.append(p.view(1))
        assert results[1].dtype == torch.float64
        assert_close(results[1], results[0])


@every_case
def test_tensor_hyperparameters_give_the_values_of_numbers(case: Case) -> None:
    """Python numbers and float64 tensors take different code; the values agree."""
    p = nonzero(4)
    gradients = [nonzero(4) for _ in range(5)]
    results = []
    for tx in (case.tx(), case.tx(case.tensors())):
        q, state = p, tx.init(p)
        for g in gradients:
            updates, state = tx.update(g, state, q, inplace=False)
            q = torchopt.apply_updates(q, updates, inplace=False)
        results.append([q, *tensors_of(state)])
    assert_close(results[1], results[0])


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant-lr", "scheduled-lr"])
@pytest.mark.parametrize("step_dtype", [torch.int64, torch.float32], ids=["int64", "float32"])
@every_case
def test_step_count_as_tensor_is_exact(
    case: Case, step_dtype: torch.dtype, scheduled: bool
) -> None:
    """A count kept as a tensor (for CUDA graphs, ``vmap``) does not round float64 to float32."""
    lr = case.value("lr")
    schedule = torchopt.schedules.exponential_decay(lr, 0.7, transition_steps=3)
    tx = case.tx({"lr": schedule if scheduled else lr})
    p = nonzero(4)
    state, counted = tx.init(p), tx.init(p)
    counted.step = torch.tensor(0, dtype=step_dtype)
    for _ in range(5):
        g = nonzero(4)
        expected, state = tx.update(g, state, p, inplace=False)
        actual, counted = tx.update(g, counted, p, inplace=False)
        assert actual.dtype == torch.float64
        assert_close(actual, expected)
    assert counted.step == state.step == 5


# Half precision -----------------------------------------------------------------------------------


@every_half
@every_case
def test_half_is_float32_rounded(case: Case, dtype: torch.dtype) -> None:
    """Bit for bit: the float32 rule on the same gradients, its updates rounded once."""
    tx, p = case.tx(), nonzero(6, dtype=dtype)
    state, wide_state = tx.init(p), tx.init(p.float())
    for _ in range(10):
        g = nonzero(6, dtype=dtype)
        update, state = tx.update(g, state, p, inplace=False)
        wide_update, wide_state = tx.update(g.float(), wide_state, p.float(), inplace=False)
        assert (update == wide_update.to(dtype)).all()
        for slot, wide in zip(tensors_of(state), tensors_of(wide_state)):
            assert slot.dtype == torch.float32
            assert (slot == wide).all()
        p = torchopt.apply_updates(p, update, inplace=False)
    assert all_finite(p)


def half_trajectory(
    cls: Any, kwargs: dict[str, Any], start: Tensor, scale: float, steps: int
) -> Tensor:
    """Return the parameters after every step on a bowl whose gradients are of size ``scale``."""
    p = nn.Parameter(start.clone())
    optimizer = cls([p], **kwargs)
    trajectory = []
    for _ in range(steps):
        p.grad = ((p.detach().float() - 2.0) * scale).to(p.dtype)
        optimizer.step()
        trajectory.append(p.detach().clone())
    return torch.stack(trajectory)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["gradients-1", "gradients-1e-4"])
@every_half
@every_case
def test_half_trajectory(case: Case, dtype: torch.dtype, scale: float) -> None:
    """It stays within the roundings of the parameter, also where ``v`` underflows in float16."""
    steps, start = 10, nonzero(5, dtype=dtype)
    if scale < 1 and dtype == torch.float16:
        assert torch.tensor(scale, dtype=dtype).square() == 0
    half = half_trajectory(case.cls, case.kwargs, start, scale, steps)
    wide = half_trajectory(case.cls, case.kwargs, start.float(), scale, steps)
    assert half.dtype == dtype
    assert all_finite(half)
    rounding = torch.finfo(dtype).eps / 2
    # a rule that reads the parameter reads what is rounded: its step has a rounding as well
    rounding *= 2 if case.algorithm.needs_params else 1
    # and one that reads how far it is from the start, which is less, a larger one
    rounding *= 4 if case.algorithm.size == "all" else 1
    bound = 2 * rounding * torch.arange(1, steps + 1)[:, None] * wide.abs().clamp(min=0.5)
    assert ((half.float() - wide).abs() <= bound).all()
    if scale == 1.0 or case.scale_free:
        assert ((wide[-1] - start).abs() > 2 * bound[-1]).any()  # it went somewhere


@every_half
@every_torch_case
def test_half_against_torch_where_it_is_sane(case: Case, dtype: torch.dtype) -> None:
    """With gradients of size 1 ``torch.optim`` is finite in half precision, if less exact."""
    start = nonzero(5, dtype=dtype)
    kwargs = {**case.kwargs, **case.larger_eps(1e-3)}
    theirs = half_trajectory(case.torch_cls, kwargs, start, 1.0, 5)
    ours = half_trajectory(case.cls, kwargs, start, 1.0, 5)
    assert all_finite(theirs)
    movement = (theirs - start).float().abs().max()
    tolerance = {torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
    assert (ours.float() - theirs.float()).abs().max() <= tolerance * movement


@every_half
def test_half_adam_first_step_is_the_learning_rate(dtype: torch.dtype) -> None:
    """Down to gradients of 1e-6; ``torch.optim.Adam`` divides by zero here in float16."""
    for size in (1.0, 1e-2, 1e-4, 1e-6):
        p = nn.Parameter(torch.full((3,), 0.5, dtype=dtype))
        p.grad = torch.full_like(p, size)
        assert (p.grad > 0).all()
        g = p.grad.double()
        torchopt.Adam([p], lr=0.125, eps=1e-8).step()
        assert_close(p.detach(), 0.5 - 0.125 * g / (g + 1e-8), dtype)


@pytest.mark.sampled(1)
@every_half
@every_case
def test_half_meta_gradient(case: Case, dtype: torch.dtype) -> None:
    """Finite, and that of float32 up to the roundings of three steps."""
    gradients = {}
    x, start = nonzero(4, 3, dtype=dtype), nonzero(3, dtype=dtype)
    for computed in (dtype, torch.float32):
        net = nn.Linear(3, 1, bias=False, dtype=computed)
        with torch.no_grad():
            net.weight.copy_(start)
        lr = torch.tensor(case.value("lr"), requires_grad=True)
        inputs = [net.weight, lr]
        optimizer = case.meta(net, **case.arguments({"lr": lr}))
        for _ in range(3):
            optimizer.step((net(x.to(computed)).float() - 3.0).square().mean())
        outer = (net(x.to(computed)).float() - 3.0).square().mean()
        gradients[computed] = torch.autograd.grad(outer, inputs)
    half, wide = gradients[dtype], gradients[torch.float32]
    assert half[0].dtype == dtype
    assert half[1].dtype == torch.float32
    assert all_finite(*half)
    if case.algorithm.in_places:
        return  # which way an entry goes is decided by signs, and so by roundings
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.0125}[dtype]
    for actual, expected in zip(half, wide):
        assert (actual.float() - expected).abs().max() <= tolerance * expected.abs().max()


# Complex ------------------------------------------------------------------------------------------


def complex_run(optimizer: Any, parameter: Any, steps: int = 10) -> list[Tensor]:
    torch.manual_seed(5)
    target = nonzero(4, dtype=torch.complex128)
    results = []
    for _ in range(steps):
        loss = (parameter() - target).abs().square().sum() + parameter().real.sum()
        if isinstance(optimizer, torchopt.MetaOptimizer):
            optimizer.step(loss)
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append(parameter().detach().clone())
    return results


@every(lambda case: case.torch_cls and case.complex, beside_torch=True)
def test_complex_parameters(case: Case) -> None:
    """What ``torch.optim`` gives: real and imaginary parts are updated as two numbers."""
    start = nonzero(4, dtype=torch.complex128)
    expected_p = nn.Parameter(start.clone())
    theirs = case.torch_cls([expected_p], **case.kwargs)
    expected = complex_run(theirs, lambda: expected_p)
    p = nn.Parameter(start.clone())
    ours = case.cls([p], **case.kwargs)
    assert_close(complex_run(ours, lambda: p), expected)
    for name, value in ours.state[p].items():
        if name != "step":
            expected_value = torch.as_tensor(theirs.state[expected_p][name])
            assert_close(torch.as_tensor(value, dtype=expected_value.dtype), expected_value)
    net = nn.ParameterDict({"p": start.clone()})
    meta = case.meta(net, **case.kwargs)
    assert_close(complex_run(meta, lambda: net["p"]), expected)
    (state,) = meta.extract_state()
    assert all(slot.is_complex() for slot in tensors_of(state.slots))


@every(lambda case: not case.complex)
def test_complex_gradients_are_refused_by_name(case: Case) -> None:
    p, tx = {"w": nonzero(2, 3, dtype=torch.complex128)}, case.tx()
    with pytest.raises(TypeError, match=r"'w'.*complex"):
        tx.update(p, tx.init(p), p, inplace=False)
    parameter = nn.Parameter(p["w"].clone())
    parameter.grad = p["w"].clone()
    with pytest.raises(TypeError, match="complex"):
        case.cls([("w", parameter)], **case.kwargs).step()
    net = nn.ParameterDict(p)
    with pytest.raises(TypeError, match=r"'w'.*complex"):
        case.meta(net, **case.kwargs).step(net["w"].abs().square().sum())
    assert torch.equal(parameter, p["w"])


@every_entrywise_case
def test_complex_functional_is_two_real_numbers(case: Case) -> None:
    tx, p = case.tx(), nonzero(4, dtype=torch.complex128)
    q = torch.view_as_real(p)
    state, real_state = tx.init(p), tx.init(q)
    for _ in range(4):
        g = nonzero(4, dtype=torch.complex128)
        update, state = tx.update(g, state, p, inplace=False)
        real_update, real_state = tx.update(torch.view_as_real(g), real_state, q, inplace=False)
        assert update.dtype == torch.complex128
        assert (torch.view_as_real(update) == real_update).all()
        assert all(slot.is_complex() and slot.shape == (4,) for slot in tensors_of(state))
        p, q = p + update, q + real_update


@every_entrywise_case
def test_complex_gradcheck(case: Case) -> None:
    tx, p = case.smooth(), nonzero(2, dtype=torch.complex128)
    _, state = tx.update(nonzero(2, dtype=torch.complex128), tx.init(p), p, inplace=False)

    def update(g: Tensor, p: Tensor) -> Tensor:
        return tx.update(g, state, p, inplace=False)[0]

    g = nonzero(2, dtype=torch.complex128).requires_grad_()
    assert torch.autograd.gradcheck(update, (g, p.requires_grad_()), **GRADCHECK)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_complex_clip_grad_norm(order: float) -> None:
    """The norm is that of the moduli, as ``torch.nn.utils.clip_grad_norm_`` takes it."""
    p, q = nn.Parameter(nonzero(3, dtype=torch.complex128)), nn.Parameter(nonzero(2))
    grads = [nonzero(3, dtype=torch.complex128), nonzero(2)]
    tx = torchopt.clip_grad_norm(0.3, order)
    updates, _ = tx.update(grads, tx.init(grads), inplace=False)
    p.grad, q.grad = (gradient.clone() for gradient in grads)
    torch.nn.utils.clip_grad_norm_([p, q], 0.3, order)
    assert_close(updates, [p.grad, q.grad])
