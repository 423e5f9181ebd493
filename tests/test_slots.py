"""What an optimizer remembers, declared as data: slots and counters of a user's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapting import assert_derivative
from conftest import nonzero, nonzero_like
from refusing import refused
from tolerances import assert_close
from torch import Tensor, nn

import torchopt
from torchopt import Slot


def of_rows(shape: torch.Size) -> tuple[int, ...]:
    return shape[:1]


def scaled(param: Tensor, *, scale: Any, **_: Any) -> Tensor:
    return param * scale


def is_matrix(shape: torch.Size, **_: Any) -> bool:
    return len(shape) == 2


@torchopt.transformation
class Kinds(torchopt.TensorTransformation):
    """One slot of each kind; the update is made of all of them."""

    scale: float = torchopt.hyper(0.5)

    slots = (
        "zero",
        Slot("number", start=0.25),
        Slot("anchor", start="param"),
        Slot("function", start=scaled),
        Slot("by_name", start=1.0, when="scale"),
        Slot("by_function", start=2.0, when=is_matrix),
        Slot("rows", start=1.5, shape=of_rows),
        Slot("wide", start=3.0, dtype=torch.float64),
    )

    def rule(self, g: Tensor, p: Any, t: Any, slots: tuple, *, scale: Any) -> tuple[Tensor, tuple]:
        zero, number, anchor, function, *rest, rows, wide = slots
        update = g * number + zero + anchor * function + rows.sum()
        update = update + sum(x for x in rest if x is not None) + wide
        return update, (zero + g, number * 2, anchor * 0.5, function + g, *rest, rows * 2, wide + 1)


NAMES = ["zero", "number", "anchor", "function", "by_name", "by_function", "rows", "wide"]


def start() -> dict[str, Tensor]:
    return {"w": nonzero(2, 3), "b": nonzero(3)}


def expected_start(p: Tensor, scale: float) -> list[Tensor | None]:
    full = lambda value: torch.full_like(p, value)  # noqa: E731
    return [
        full(0.0),
        full(0.25),
        p,
        p * scale,
        full(1.0) if scale else None,
        full(2.0) if p.dim() == 2 else None,
        p.new_full(p.shape[:1], 1.5),
        full(3.0).double(),
    ]


@pytest.mark.parametrize("scale", [0.5, 0.0, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_slots_start_as_they_are_declared(dtype: torch.dtype, scale: Any) -> None:
    params = {n: p.to(dtype) for n, p in start().items()}
    if scale is False:
        with pytest.raises(TypeError, match="scale must be a number"):
            Kinds(scale)
        return
    state = Kinds(scale).init(params)
    assert Kinds(scale).slot_names() == tuple(NAMES)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    for n, p in params.items():
        for name, value in zip(NAMES, expected_start(p.to(wide), scale)):
            found = state.slots[name][n] if name in state.slots else None
            assert (found is None) == (value is None), name
            if value is not None:
                assert found.dtype == value.dtype
                assert torch.equal(found, value), name
    assert ("by_name" in state.slots) == bool(scale)


def test_a_start_that_is_the_parameter_is_connected_and_not_the_parameter() -> None:
    p = nonzero(2, 3).requires_grad_()
    state = Kinds().init([p])
    anchor = state.anchor[0]
    assert anchor is not p
    assert anchor.data_ptr() != p.data_ptr()
    (slope,) = torch.autograd.grad((anchor * 3 + state.function[0]).sum(), p)
    assert_close(slope, torch.full_like(p, 3.5))


@pytest.mark.usefixtures("float64_by_default")
def test_derivatives_reach_the_start_on_every_face() -> None:
    tx = torchopt.chain(Kinds(), torchopt.scale(-0.1))
    flat = [p.clone().requires_grad_() for p in start().values()]

    def functional() -> Tensor:
        params = dict(zip("wb", flat))
        state = tx.init(params)
        for _ in range(3):
            grads = {n: p**2 for n, p in params.items()}
            params, state = tx.apply_gradients(grads, state, params, inplace=False)
        return torch.stack([(p**2).sum() for p in params.values()]).sum()

    net = nn.ParameterDict(dict(zip("wb", flat)))

    def differentiable() -> Tensor:
        with torchopt.inner_loop(net, tx) as inner:
            for _ in range(3):
                inner.step(torch.stack([(p**3 / 3).sum() for p in net.values()]).sum())
            return torch.stack([(p**2).sum() for p in net.values()]).sum()

    assert_derivative(functional, flat)
    assert_derivative(differentiable, list(net.values()))
    assert_close(differentiable().detach(), functional().detach())


def test_the_faces_agree() -> None:
    tx = torchopt.chain(Kinds(), torchopt.scale(-0.1))
    params = start()
    own = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    net = nn.ParameterDict({n: p.clone() for n, p in params.items()})
    optimizer, inner = torchopt.Optimizer(own.items(), tx), torchopt.MetaOptimizer(net, tx)
    state = tx.init(params)
    for _ in range(3):
        grads = nonzero_like(params)
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
        for n, p in own.items():
            p.grad = grads[n].clone()
        optimizer.step()
        inner.step(torch.stack([(net[n] * g).sum() for n, g in grads.items()]).sum())
    (other,) = inner.extract_state()
    for n, p in params.items():
        assert_close(own[n].detach(), p)
        assert_close(net[n].detach(), p)
        for name, column in state.slots.items():
            assert_close(other.slots[name][n], column[n], what=name)
            if column[n] is None:
                assert optimizer.state[own[n]].get(name) is None
            else:
                assert_close(optimizer.state[own[n]][name], column[n], what=name)


@pytest.mark.parametrize("face", ["object", "differentiable"])
def test_a_loaded_slot_of_another_shape_is_refused(face: str) -> None:
    own = nn.ParameterDict({n: p.clone() for n, p in start().items()})
    tx = torchopt.chain(Kinds(), torchopt.scale(-0.1))
    if face == "object":
        optimizer: Any = torchopt.Optimizer(own.parameters(), tx)
        for p in own.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    else:
        optimizer = torchopt.MetaOptimizer(own, tx)
        optimizer.step(torch.stack([p.sum() for p in own.values()]).sum())
    saved = optimizer.state_dict()
    saved["state"][1]["rows"] = torch.ones(3)
    with refused(ValueError, r"rows.*shape \(3,\).*shape \(2,\)", *own.values()):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("name", ["init_slots", "optional_slots", "constant_slots"])
def test_what_slots_were_declared_by_before_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"Old defines {name}; slots are declared .*torchopt.Slot"):
        type("Old", (torchopt.ElementwiseTransformation,), {name: ("x",)})
