"""Averaging, centering, clipping by units, and keeping parameters in sets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import nonzero
from running import run
from tolerances import assert_close

import torchopt


F64 = torch.float64


# Rules --------------------------------------------------------------------------------------------


def test_centralize_leaves_vectors_and_takes_the_mean_of_each_output() -> None:
    g = {"w": nonzero(2, 3, 4), "b": nonzero(3), "s": nonzero()}
    (u,), _ = run(torchopt.centralize(), g, [g])
    assert u["w"].mean(dim=(1, 2)).abs().max() < 1e-15
    assert_close(u["w"][0, 0, 0], g["w"][0, 0, 0] - g["w"][0].mean(), times=10)
    assert torch.equal(u["b"], g["b"])
    assert torch.equal(u["s"], g["s"])


def test_clip_by_block_rms_of_zero_and_of_nothing() -> None:
    tx, zero = torchopt.clip_by_block_rms(1.0), torch.zeros(3, requires_grad=True)
    (u, empty), _ = tx.update([zero, torch.ones(0)], tx.init([zero, torch.ones(0)]), inplace=False)
    (slope,) = torch.autograd.grad(u.sum(), zero)
    assert torch.equal(slope, torch.ones(3))
    assert empty.shape == (0,)


@pytest.mark.parametrize("shape", [(), (4,), (1, 4), (2, 4), (2, 3, 4), (2, 3, 2, 2)], ids=str)
def test_adaptive_grad_clip_bounds_the_norm_of_each_output_unit(shape: Any) -> None:
    tx, p, g = torchopt.adaptive_grad_clip(0.25), nonzero(*shape), 9 * nonzero(*shape)
    (u,), _ = run(tx, p, [g])
    units = sum(size > 1 for size in shape) > 1
    rows = [x.reshape(shape[0], -1) if units else x.reshape(1, -1) for x in (u, p, g)]
    norms, weights, before = (row.norm(dim=1) for row in rows)
    assert (before > 0.25 * weights).all()
    assert_close(norms, 0.25 * weights, times=10)


def test_adaptive_grad_clip_over_dimensions_of_one_s_own() -> None:
    p, g = nonzero(2, 3, 4), 9 * nonzero(2, 3, 4)
    (u,), _ = run(torchopt.adaptive_grad_clip(0.25, dim=(0, 2)), p, [g])
    assert_close(u.norm(dim=(0, 2)), 0.25 * p.norm(dim=(0, 2)), times=10)


def test_adaptive_grad_clip_has_finite_derivatives_at_zero() -> None:
    """Optax's meta-gradient is nan there."""
    tx = torchopt.adaptive_grad_clip(0.5)
    g, p = (torch.zeros(2, 3, dtype=F64, requires_grad=True) for _ in range(2))
    u, _ = tx.update(g, tx.init(p), p, inplace=False)
    slope, other = torch.autograd.grad(u.sum(), (g, p), allow_unused=True, materialize_grads=True)
    assert torch.equal(slope, torch.ones_like(g))
    assert torch.equal(other, torch.zeros_like(p))


def test_zero_nans_leaves_infinities_and_has_no_derivative_at_nan() -> None:
    tx = torchopt.zero_nans()
    g = torch.tensor([math.nan, math.inf, -2.0], requires_grad=True)
    u, _ = tx.update(g, tx.init(g), inplace=False)
    assert u.tolist() == [0.0, math.inf, -2.0]
    assert torch.autograd.grad(u.sum(), g)[0].tolist() == [0.0, 1.0, 1.0]


def test_keep_params_nonnegative_ends_at_zero_exactly() -> None:
    tx = torchopt.chain(torchopt.sgd(0.7), torchopt.keep_params_nonnegative())
    p, state = torch.rand(50, dtype=F64), None
    for _ in range(8):
        p, state = tx.apply_gradients(nonzero(50), state or tx.init(p), p)
        assert (p >= 0).all()
    assert (p == 0).any()


@pytest.mark.parametrize("name", ["keep_params_nonnegative", "adaptive_grad_clip", "project"])
def test_parameters_are_asked_for(name: str) -> None:
    arguments = {"adaptive_grad_clip": (0.5,), "project": (torch.relu,)}.get(name, ())
    tx = getattr(torchopt, name)(*arguments)
    with pytest.raises(ValueError, match=f"{name} needs the parameters"):
        tx.update([torch.ones(1)], tx.init([torch.ones(1)]))


def test_selective_transform_does_not_look_at_what_is_frozen() -> None:
    frozen = {"w": True, "b": False}
    inner = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adamw(0.1))
    tx = torchopt.selective_transform(inner, freeze_mask=frozen)
    p = {"w": nonzero(2, 3), "b": nonzero(3)}
    grads = [{"w": torch.full((2, 3), math.nan, dtype=F64), "b": nonzero(3)} for _ in range(3)]
    found, state = run(tx, p, grads)
    expected, _ = run(inner, {"b": p["b"]}, [{"b": g["b"]} for g in grads])
    assert_close([u["b"] for u in found], [u["b"] for u in expected])
    assert all(torch.equal(u["w"], torch.zeros(2, 3, dtype=F64)) for u in found)
    assert state.exp_avg["w"] is None


def test_stateless_gives_trees_to_a_function() -> None:
    def swapped(updates: Any, params: Any) -> Any:
        return {"w": updates["w"] * params["b"], "b": updates["b"] * 0}

    g, p = ({"w": nonzero(3), "b": nonzero(3)} for _ in range(2))
    tx = torchopt.chain(torchopt.stateless(swapped), torchopt.scale(-1.0))
    (u,), _ = run(tx, p, [g])
    assert_close(u, {"w": -g["w"] * p["b"], "b": torch.zeros(3, dtype=F64)})
    alone = torchopt.stateless(swapped)
    assert_close(alone.update(g, alone.init(p), p)[0]["w"], g["w"] * p["b"])
    param = torch.nn.Parameter(p["w"].clone())

    def doubled(updates: Any, params: Any) -> Any:
        return [2 * updates[0] + params[0]]

    tx = torchopt.chain(torchopt.stateless(doubled), torchopt.sgd(1.0))
    optimizer = torchopt.Optimizer([param], tx)
    param.grad = g["w"].clone()
    optimizer.step()
    assert_close(param.detach(), -2 * g["w"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torchopt.stateless(3), "stateless expects a function"),  # pyright: ignore[reportArgumentType]
        (lambda: torchopt.stateless_with_tree_map(3), "expects a function of updates"),  # pyright: ignore[reportArgumentType]
        (lambda: torchopt.project(3), "project expects a function of tensors"),  # pyright: ignore[reportArgumentType]
    ],
    ids=["stateless", "stateless_with_tree_map", "project"],
)
def test_what_is_no_function_is_refused(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_project_expects_a_tensor_for_each() -> None:
    tx, p = torchopt.project(lambda new: new[:1]), [torch.ones(1), torch.ones(1)]
    with pytest.raises(TypeError, match="must return as many tensors as it is given, 2, got"):
        tx.update(p, tx.init(p), p)


@pytest.mark.parametrize("name", ["centralize", "clip_by_block_rms", "keep_params_nonnegative"])
def test_complex_parameters_are_refused(name: str) -> None:
    tx = getattr(torchopt, name)(*((1.0,) if name == "clip_by_block_rms" else ()))
    p = [torch.ones(2, dtype=torch.complex64)]
    with pytest.raises(TypeError, match="complex"):
        tx.update(p, tx.init(p), p)
