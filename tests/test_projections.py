"""Projections: against Optax, nearest points of sets, derivatives, and as a transformation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import GRADCHECK, assert_close
from torch.autograd import gradcheck, gradgradcheck

import torchopt
from torchopt import projections


F64 = torch.float64
X = {
    "a": torch.tensor([0.9, -0.4, 1.3], dtype=F64),
    "b": torch.tensor([[0.2, -1.1]], dtype=F64),
}
A = {
    "a": torch.tensor([1.0, 2.0, -1.0], dtype=F64),
    "b": torch.tensor([[0.5, -1.0]], dtype=F64),
}
L1 = [[0.3, 0.0, 0.7], [[0.0, -0.5]]]
L2 = [
    [0.6827243455226344, -0.3034330424545042, 0.9861573879771386],
    [[0.1517165212272521, -0.8344408667498865]],
]

#: The arguments after the tree, and what Optax 0.2.8 (jax 0.10.2, JAX_ENABLE_X64=1) gives for X;
#: hypercube, which it cannot do for trees, leaf by leaf.
OPTAX: dict[str, tuple[tuple[Any, ...], list[Any]]] = {
    "non_negative": ((), [[0.9, 0.0, 1.3], [[0.2, 0.0]]]),
    "box": ((-0.5, 0.7), [[0.7, -0.4, 0.7], [[0.2, -0.5]]]),
    "hypercube": ((0.8,), [[0.8, 0.0, 0.8], [[0.2, 0.0]]]),
    "linf_ball": ((0.8,), [[0.8, -0.4, 0.8], [[0.2, -0.8]]]),
    "simplex": ((1.5,), [[0.55, 0.0, 0.95], [[0.0, 0.0]]]),
    "l1_sphere": ((1.5,), L1),
    "l1_ball": ((1.5,), L1),
    "l2_sphere": ((1.5,), L2),
    "l2_ball": ((1.5,), L2),
    "hyperplane": (
        (A, 0.3),
        [
            [0.9413793103448276, -0.31724137931034485, 1.2586206896551724],
            [[0.2206896551724138, -1.1413793103448278]],
        ],
    ),
    "halfspace": ((A, 0.3), [[0.9, -0.4, 1.3], [[0.2, -1.1]]]),
}
every_projection = pytest.mark.parametrize("name", OPTAX)


def of(name: str) -> Any:
    return getattr(projections, f"projection_{name}")


@every_projection
def test_values_are_those_of_optax(name: str) -> None:
    arguments, (a, b) = OPTAX[name]
    expected = {"a": torch.tensor(a, dtype=F64), "b": torch.tensor(b, dtype=F64)}
    assert_close(of(name)(X, *arguments), expected, times=10)


@every_projection
def test_a_projection_of_a_projection_is_itself(name: str) -> None:
    arguments = OPTAX[name][0]
    once = of(name)(X, *arguments)
    again = of(name)(once, *arguments)
    assert all((again[key] - once[key]).abs().max() < 1e-14 for key in once)


@every_projection
def test_no_point_of_the_set_is_nearer(name: str) -> None:
    """The angle between the way to the projection and to any other point is not acute."""
    arguments = OPTAX[name][0]
    if "sphere" in name:
        pytest.skip("no convex set")
    flat = lambda tree: torch.cat([x.reshape(-1) for x in tree.values()])  # noqa: E731
    y = of(name)(X, *arguments)
    for _ in range(20):
        other = of(name)({"a": 3 * nonzero(3), "b": 3 * nonzero(1, 2)}, *arguments)
        assert torch.dot(flat(X) - flat(y), flat(other) - flat(y)) <= 1e-12


NUMBERS = {"box": (-0.5, 0.7), "hyperplane": (0.3,), "halfspace": (-3.0,), "non_negative": ()}


@pytest.mark.parametrize("where", ["outside", "inside"])
@every_projection
def test_derivatives_in_the_tree_and_in_the_numbers(name: str, where: str) -> None:
    scale = 1.5 if where == "outside" else 40.0
    if where == "inside" and name not in ("l1_ball", "l2_ball", "linf_ball", "hypercube"):
        scale = 2.0
    values = NUMBERS.get(name, (scale,))
    if name == "halfspace" and where == "inside":
        values = (9.0,)
    numbers = [torch.tensor(v, dtype=F64, requires_grad=True) for v in values]
    tensors = [x.clone().requires_grad_() for x in X.values()]

    def function(a: Any, b: Any, *numbers: Any) -> Any:
        further = (A, *numbers) if name in ("hyperplane", "halfspace") else numbers
        return tuple(of(name)({"a": a, "b": b}, *further).values())

    inputs = [*tensors, *numbers]
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, **GRADCHECK)
    assert gradgradcheck(function, inputs, **GRADCHECK)


@pytest.mark.parametrize("name", ["simplex", "l1_ball", "l1_sphere", "l2_ball", "l2_sphere"])
def test_zero_has_finite_derivatives(name: str) -> None:
    x = torch.zeros(3, dtype=F64, requires_grad=True)
    y = of(name)(x)
    (slope,) = torch.autograd.grad(y.square().sum() + y.sum(), x, create_graph=True)
    assert torch.isfinite(slope).all()
    if slope.requires_grad:
        assert torch.isfinite(torch.autograd.grad(slope.sum(), x)[0]).all()


def test_the_derivative_on_the_sphere_is_that_of_the_inside() -> None:
    x = torch.tensor([0.6, 0.8], dtype=F64)
    jacobian = torch.func.jacrev(lambda x: projections.projection_l2_ball(x, 1.0))(x)
    assert_close(jacobian, torch.eye(2, dtype=F64))


@every_projection
def test_batches_under_vmap(name: str) -> None:
    arguments = OPTAX[name][0]
    batch = {"a": 2 * nonzero(4, 3), "b": 2 * nonzero(4, 1, 2)}
    found = torch.func.vmap(lambda x: of(name)(x, *arguments))(batch)
    rows = [of(name)({k: v[i] for k, v in batch.items()}, *arguments) for i in range(4)]
    assert_close(found, {k: torch.stack([row[k] for row in rows]) for k in batch}, times=10)


@every_projection
def test_half_precision_and_absent_leaves(name: str) -> None:
    arguments = OPTAX[name][0]
    arguments = (
        ({**A, "c": None}, *arguments[1:]) if len(arguments) and arguments[0] is A else arguments
    )
    x = {k: v.to(torch.bfloat16) for k, v in X.items()} | {"c": None}
    y = of(name)(x, *arguments)
    assert y["c"] is None
    assert y["a"].dtype == torch.bfloat16
    expected = of(name)(X, *OPTAX[name][0])
    assert (y["a"].double() - expected["a"]).abs().max() < 0.02


def test_simplex_of_large_and_of_equal_entries() -> None:
    found = projections.projection_simplex(torch.full((3,), 1e9))
    assert_close(found, torch.full((3,), 1 / 3))
    found = projections.projection_simplex(torch.tensor([1e9, 1e9, 0.0]))
    assert found.tolist() == [0.5, 0.5, 0.0]


def test_bounds_as_trees() -> None:
    lower = {"a": torch.tensor([0.0, 0.0, 2.0], dtype=F64), "b": torch.zeros(1, 2, dtype=F64)}
    found = projections.projection_box(X, lower, 2.5)
    assert_close(found["a"], torch.tensor([0.9, 0.0, 2.0], dtype=F64))


BAD = {
    "scale": (lambda: projections.projection_simplex(X, 0.0), ValueError, "scale must be > 0, got"),
    "box": (lambda: projections.projection_box(X, 2, 1), ValueError, "lower must be <= upper"),
    "complex": (
        lambda: projections.projection_l2_ball([torch.ones(2, dtype=torch.complex64)]),
        TypeError,
        "projection_l2_ball expects real tensors, got dtype",
    ),
    "no-tensor": (lambda: projections.projection_l1_ball([3.0]), TypeError, "expects real tensors"),
    "normal": (lambda: projections.projection_hyperplane(X, [A], 1.0), ValueError, "a "),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# As a transformation ------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [False, True], ids=["together", "each"])
def test_project_keeps_parameters_in_the_set_in_every_face(each: bool) -> None:
    tx = torchopt.chain(
        torchopt.sgd(0.5, momentum=0.5),
        torchopt.project(projections.projection_simplex, each=each),
    )
    net = torch.nn.Linear(3, 2).double()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer, meta_net = torchopt.Optimizer(net.parameters(), tx), torch.nn.Linear(3, 2).double()
    meta_net.load_state_dict(start)
    meta = torchopt.MetaOptimizer(meta_net, tx)
    params, state = start, tx.init(start)
    for _ in range(3):
        grads = {name: nonzero(*p.shape) for name, p in start.items()}
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
        for name, p in net.named_parameters():
            p.grad = grads[name].clone()
        optimizer.step()
        meta.step(sum((p * grads[name]).sum() for name, p in meta_net.named_parameters()))
    totals = [p.sum() for p in params.values()]
    totals = totals if each else [sum(totals)]
    assert_close(torch.stack(totals), torch.ones(len(totals), dtype=F64), times=10)
    assert all((p > -1e-15).all() for p in params.values())
    assert_close(dict(net.named_parameters()), params, times=10)
    assert_close(dict(meta_net.named_parameters()), params, times=10)
