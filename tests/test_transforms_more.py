"""Averaging, centering, clipping by units, and keeping parameters in sets, against Optax.

Numbers are those of Optax 0.2.8 (jax 0.10.2, JAX_ENABLE_X64=1): the updates of two calls with
``GRADS``, with ``PARAMS``; the call stands beside each. Optax's units lie in the last dimension, so
to ``adaptive_grad_clip`` it was given the transposed matrices.
"""

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
GRADS = [
    torch.tensor([[0.5, -1.2], [2.0, 0.3], [-0.7, 0.9]], dtype=F64),
    torch.tensor([[1.5, 0.2], [-0.4, 0.6], [0.1, -2.2]], dtype=F64),
]
PARAMS = torch.tensor([[0.2, 0.4], [-0.3, 1.0], [0.05, 0.6]], dtype=F64)

OPTAX: dict[str, tuple[Any, list[Any]]] = {
    "ema(0.7)": (
        torchopt.ema(0.7),
        [
            [[0.5, -1.2], [2.0, 0.3], [-0.7, 0.9000000000000001]],
            [
                [1.0882352941176472, -0.3764705882352941],
                [0.5882352941176471, 0.47647058823529415],
                [-0.22941176470588234, -0.923529411764706],
            ],
        ],
    ),
    "ema(0.7, debias=False)": (
        torchopt.ema(0.7, debias=False),
        [
            [[0.15, -0.36], [0.6, 0.09], [-0.21, 0.27]],
            [[0.555, -0.192], [0.3, 0.243], [-0.117, -0.471]],
        ],
    ),
    "centralize()": (
        torchopt.centralize(),
        [
            [[0.85, -0.85], [0.85, -0.85], [-0.8, 0.8]],
            [[0.65, -0.65], [-0.5, 0.5], [1.15, -1.15]],
        ],
    ),
    "clip_by_block_rms(0.8)": (
        torchopt.clip_by_block_rms(0.8),
        [
            [
                [0.36822984715932944, -0.8837516331823906],
                [1.4729193886373178, 0.22093790829559765],
                [-0.5155217860230612, 0.662813724886793],
            ],
            [
                [1.06204394297723, 0.14160585906363066],
                [-0.2832117181272613, 0.42481757719089197],
                [0.07080292953181533, -1.5576644496999374],
            ],
        ],
    ),
    "adaptive_grad_clip(0.5, 0.5)": (
        torchopt.adaptive_grad_clip(0.5, 0.5),
        [
            [
                [0.09615384615384615, -0.23076923076923073],
                [0.5162399320874574, 0.07743598981311861],
                [-0.18482059908504206, 0.23762648453791124],
            ],
            [
                [0.24780697517065867, 0.03304093002275449],
                [-0.28956200345721095, 0.43434300518581637],
                [0.013669516088841361, -0.30072935395450995],
            ],
        ],
    ),
    "keep_params_nonnegative()": (
        torchopt.keep_params_nonnegative(),
        [
            [[0.5, -0.4], [2.0, 0.3], [-0.05, 0.9]],
            [[1.5, 0.2], [0.3, 0.6], [0.1, -0.6]],
        ],
    ),
}


@pytest.mark.parametrize(("tx", "expected"), OPTAX.values(), ids=OPTAX.keys())
def test_values_are_those_of_optax(tx: Any, expected: list[Any]) -> None:
    found, _ = run(tx, PARAMS, GRADS)
    assert_close(found, [torch.tensor(u, dtype=F64) for u in expected], times=10)


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
