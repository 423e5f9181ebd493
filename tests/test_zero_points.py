"""Meta-gradients where a gradient entry, a second moment or a norm is exactly zero.

There the square root has an infinite slope, and autograd computes ``0 * inf = nan``. Nothing may
be infinite or ``nan``, in reverse mode, forward mode, ``vmap`` and second order; and where the true
derivative is known it is that one.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F64, Case, every_entrywise_case, every_formula_case, every_meta_case
from conftest import nonzero
from tolerances import META_GRADIENT, VALUES, all_finite, assert_close
from torch import Tensor, nn

import torchopt
from torchopt.base.numerics import root


pytestmark = pytest.mark.complete


Function = Callable[[Tensor], Tensor]
NORMS = (0.5, 1.0, 1.5, 2.0, 3.0, math.inf)

#: The ways to differentiate a function of one vector once.
JACOBIANS: dict[str, Callable[[Function], Function]] = {
    "reverse": lambda f: lambda x: torch.autograd.functional.jacobian(f, x, strict=False),
    "func-reverse": torch.func.jacrev,
    "forward": torch.func.jacfwd,
    "vmap-of-grad": lambda f: (
        lambda x: torch.stack(
            [
                torch.vmap(torch.func.grad(lambda y, i=i: f(y)[i]))(torch.stack([x, x]))[1]
                for i in range(x.numel())
            ]
        )
    ),
}

#: The ways to differentiate a scalar function of one vector twice.
HESSIANS: dict[str, Callable[[Function], Function]] = {
    "reverse-reverse": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "forward-reverse": torch.func.hessian,
    "forward-forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "autograd": lambda f: lambda x: torch.autograd.functional.hessian(f, x),
}

every_jacobian = pytest.mark.parametrize("jacobian", JACOBIANS.values(), ids=JACOBIANS.keys())
every_hessian = pytest.mark.parametrize("hessian", HESSIANS.values(), ids=HESSIANS.keys())


def first_update(case: Case, p: Tensor) -> Function:
    """Return the first update of the parameter ``p`` as a function of its gradient."""
    tx = case.tx()

    def update(g: Tensor) -> Tensor:
        return tx.update(g, tx.init(p), p, inplace=False)[0]

    return update


def slope_at_zero(case: Case) -> float:
    """Return the derivative of the first update at a gradient (with decay) that is zero.

    ``g / (sqrt(c g^2 + r) + eps)`` has the derivative ``1 / (sqrt(r) + eps)`` there.
    """
    k = collections.defaultdict(float, case.kwargs)
    return -k["lr"] * case.algorithm.formula.slope(k)


# A gradient entry that is zero at the first step --------------------------------------------------


@every_jacobian
@every_formula_case
def test_slope_of_the_first_update(case: Case, jacobian: Any) -> None:
    """The derivative at a zero entry is the true one; all others are finite and not disturbed."""
    p, g = nonzero(4), nonzero(4)
    g[1] = p[1] = 0.0  # zero with weight decay, too
    slopes = jacobian(first_update(case, p))(g)
    assert all_finite(slopes)
    assert_close(slopes, torch.diag(slopes.diag()))
    assert_close(slopes[1, 1], torch.tensor(slope_at_zero(case), **F64))
    others = [0, 2, 3]
    alone = torch.func.jacfwd(first_update(case, p[others]))(g[others])
    # a slope of eps / g^2 is the small difference of terms as large as lr / |g|
    terms = case.value("lr") / g[others].abs().min()
    assert (slopes[others][:, others] - alone).abs().max() <= VALUES[torch.float64] * terms
    assert (slopes.diag() != 0).all()


@every_hessian
@every_formula_case
def test_curvature_of_the_first_update(case: Case, hessian: Any) -> None:
    """``g / (|g| + eps)`` bends down on one side and up on the other; at zero we say 0."""
    p, g = nonzero(4), nonzero(4)
    g[1] = p[1] = 0.0
    weights = nonzero(4)
    curvature = hessian(lambda x: weights @ first_update(case, p)(x))(g)
    assert all_finite(curvature)
    assert (curvature[1] == 0).all()
    assert (curvature[:, 1] == 0).all()
    if case.algorithm.linear:
        assert (curvature == 0).all()
    else:
        assert (curvature.diag()[[0, 2, 3]] != 0).all()


@every_formula_case
def test_third_order_of_the_first_update(case: Case) -> None:
    p, g = nonzero(3), nonzero(3)
    g[1] = p[1] = 0.0
    update, weights = first_update(case, p), nonzero(3)
    third = torch.func.jacrev(torch.func.hessian(lambda x: weights @ update(x)))(g)
    assert all_finite(third)
    k = collections.defaultdict(float, case.kwargs)
    expected = -k["lr"] * case.algorithm.formula.third(k) * weights[1]
    assert_close(third[1, 1, 1], torch.as_tensor(expected, **F64))


@every_formula_case
def test_slope_agrees_with_differences_over_the_zero(case: Case) -> None:
    """Symmetric differences across the zero, at a distance where eps rules."""
    p, g = nonzero(3), nonzero(3)
    g[1] = p[1] = 0.0
    update = first_update(case, p)
    h = 1e-4 * case.kwargs.get("eps", 1.0) * torch.tensor([0.0, 1.0, 0.0], **F64)
    measured = ((update(g + h) - update(g - h)) / (2 * h.sum()))[1]
    slope = torch.func.jacrev(update)(g)[1, 1]
    assert abs(measured / slope - 1) < 2e-4  # the distance over eps


# Several steps ------------------------------------------------------------------------------------


def unrolled(case: Case, zero: str, steps: int = 3) -> tuple[Function, Tensor]:
    """Return a scalar function of parameters, gradient factors and hyperparameters, and a point.

    ``zero`` says what is zero: one entry of the gradients at ``"first"`` step only, at ``"last"``
    only, ``"always"``, or ``"all"`` entries always.
    """
    size, names = 3, case.tunable
    where = {"first": [0], "last": [steps - 1], "always": range(steps), "all": range(steps)}[zero]
    factors = nonzero(steps, size)
    for step in where:
        factors[step, slice(None) if zero == "all" else 1] = 0.0
    p = nonzero(size)
    if zero == "all":
        p.zero_()
    else:
        p[1] = 0.0
    weights = nonzero(size)
    values = torch.stack(list(case.tensors().values()))

    def function(x: Tensor) -> Tensor:
        p, f, h = x.split([size, steps * size, len(names)])
        tx = case.tx(dict(zip(names, h)))
        state = tx.init(p)
        for factor in f.view(steps, size):
            updates, state = tx.update(factor * (1 + p.square()), state, p, inplace=False)
            p = torchopt.apply_updates(p, updates, inplace=False)
        return weights @ p

    return function, torch.cat([p, factors.flatten(), values])


ZEROS = ("first", "last", "always", "all")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("zero", ZEROS)
@every_entrywise_case
def test_unrolled_first_order(case: Case, zero: str) -> None:
    """Reverse, forward, batched: one finite answer for parameters, gradients, hyperparameters."""
    function, x = unrolled(case, zero)
    reverse = torch.func.grad(function)(x)
    assert all_finite(function(x), reverse)
    y = x.clone().requires_grad_()
    (classic,) = torch.autograd.grad(function(y), y)
    batch = torch.vmap(torch.func.grad(function))(torch.stack([x, x]))
    assert_close(classic, reverse)
    assert_close(torch.func.jacfwd(function)(x), reverse)
    assert_close(batch[0], reverse)
    assert_close(batch[1], reverse)
    assert (reverse[:3] != 0).all()  # the first parameters always matter


@pytest.mark.sampled(2, each=0, by="family")
@pytest.mark.parametrize("zero", ZEROS)
@every_entrywise_case
def test_unrolled_second_order(case: Case, zero: str) -> None:
    function, x = unrolled(case, zero)
    reverse = torch.func.jacrev(torch.func.jacrev(function))(x)
    assert all_finite(reverse)
    assert_close(torch.func.hessian(function)(x), reverse, times=100)
    assert_close(torch.func.jacfwd(torch.func.jacfwd(function))(x), reverse, times=100)


@pytest.mark.parametrize("zero", ["always", "all"])
@every_meta_case
def test_differentiable_face(case: Case, zero: str) -> None:
    """A feature, or the whole input, that is always zero: exact through the network's optimizer."""
    net = nn.Linear(3, 1, bias=False, **F64)
    start = net.weight
    x, weights = nonzero(5, 3), nonzero(3)
    if zero == "all":
        x.zero_()
        with torch.no_grad():
            start.zero_()
    else:
        x[:, 1] = 0.0
        with torch.no_grad():
            start[0, 1] = 0.0  # so that weight decay adds nothing
    values = case.tensors(requires_grad=True)
    optimizer = case.meta(net, **case.arguments(values))
    for _ in range(case.algorithm.settled):
        optimizer.step((net(x) - 1.0).square().mean())
    inputs = [start, *values.values()]
    gradients = torch.autograd.grad(
        (net.weight @ weights).sum(), inputs, create_graph=True, materialize_grads=True
    )
    assert all_finite(*gradients)
    # a parameter without a gradient is moved by weight decay alone
    decay = case.decay
    own_rate = bool(decay) and case.algorithm.size == "all"  # which others have a part in
    if case.algorithm.decoupled_decay and not own_rate:
        shrinks = case.algorithm.shrinks
        own = 1 - case.kwargs["lr"] * decay.get("weight_decay", 0.0)
        factor = own if shrinks is None else shrinks(case.kwargs)
        assert_close(gradients[0][0, 1].detach(), weights[1] * factor**3)
    elif not decay:
        assert gradients[0][0, 1] == weights[1]
    if zero == "all" and not decay:
        assert gradients[0].tolist() == [weights.tolist()]
        moves = case.algorithm.starts_moving
        assert any(gradient != 0 for gradient in gradients[1:]) == moves
    second = torch.autograd.grad(
        sum(gradient.sum() for gradient in gradients), inputs, allow_unused=True
    )
    assert all_finite(*(s for s in second if s is not None))


@every_formula_case
def test_second_moment_that_underflows(case: Case) -> None:
    """A gradient of 1e-170 is not zero, but its square is."""
    p, g = torch.zeros(2, **F64), torch.tensor([1e-170, 0.5], **F64)
    update = first_update(case, p)
    if not case.kwargs.get("eps_root"):
        assert (g.square() == 0).tolist() == [True, False]
    assert_close(update(g)[0], g[0] * slope_at_zero(case))
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        slopes = jacobian(update)(g)
        assert all_finite(slopes)
        assert_close(slopes[0, 0], torch.tensor(slope_at_zero(case), **F64))


@every_entrywise_case
def test_float32_with_the_smallest_gradients(case: Case) -> None:
    """From the smallest float32 up: values and slopes are finite."""
    p, g = torch.zeros(8), 10.0 ** -torch.arange(45.0, 5.0, -5.0)
    update = first_update(case, p)
    assert g[0] > 0
    assert all_finite(update(g))
    assert (update(g) <= 0).all()
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        slopes = jacobian(update)(g)
        assert all_finite(slopes)
        assert (slopes.diag() <= 0).all()


@pytest.mark.parametrize("record", [False, True], ids=["no-grad", "recorded"])
def test_variance_that_rounds_below_zero(record: bool) -> None:
    """Under a constant gradient ``v - a^2`` tends to zero; rounding takes some entries below."""
    tx, g = torchopt.scale_by_stddev(alpha=0.5, eps=1e-2), nonzero(200, dtype=torch.float32)
    g.requires_grad_(record)
    state = tx.init(g)
    with torch.set_grad_enabled(record):
        for _ in range(60):
            update, state = tx.update(g, state, inplace=False)
    assert (state.square_avg - state.grad_avg.square() < 0).any()
    assert all_finite(update)
    assert ((update / g).abs() <= 1.0 / 1e-2 + 1e-3).all()
    if record:
        (gradient,) = torch.autograd.grad(update.sum(), g)
        assert all_finite(gradient)


# The root -----------------------------------------------------------------------------------------


def derivatives(f: Callable, order: int, mode: str) -> Callable:
    for _ in range(order):
        f = torch.func.grad(f) if mode == "reverse" else forward_derivative(f)
    return f


def forward_derivative(f: Callable) -> Callable:
    return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_root(order: int, mode: str, dtype: torch.dtype) -> None:
    """Its derivatives are those of the square root, and zero at zero; also under ``vmap``."""
    coefficient = (1.0, 1 / 2, -1 / 4, 3 / 8)[order]
    f = derivatives(root, order, mode)
    x = nonzero(6, dtype=dtype).abs()
    expected = coefficient * x.double() ** (0.5 - order)
    assert_close(torch.stack([f(v) for v in x]), expected, dtype, times=4)
    assert_close(torch.vmap(f)(x), expected, dtype, times=4)
    zeros = torch.zeros(2, dtype=dtype)
    assert f(zeros[0]) == 0
    assert torch.vmap(f)(zeros).tolist() == [0, 0]


def test_root_value_is_exact() -> None:
    x = torch.cat([nonzero(50).abs(), torch.tensor([0.0, 5e-324, 1e300], **F64)])
    assert (root(x) == x.sqrt()).all()
    with torch.no_grad():
        assert (root(x) == x.sqrt()).all()
    with torch.inference_mode():
        assert (root(x) == x.sqrt()).all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_root_third_order_by_autograd(order: int) -> None:
    x = torch.tensor([0.0, 0.49, 2.25], requires_grad=True, **F64)
    y = root(x)
    for _ in range(order):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    coefficient = (1.0, 1 / 2, -1 / 4, 3 / 8)[order]
    assert y[0] == 0
    assert_close(y[1:].detach(), coefficient * x.detach()[1:] ** (0.5 - order))


def test_root_of_a_square_at_zero() -> None:
    """``|x|`` through the root: slope and curvature are zero at zero, not nan."""
    f = lambda x: root(x.square())  # noqa: E731
    for order in (1, 2, 3):
        for mode in ("reverse", "forward"):
            assert derivatives(f, order, mode)(torch.zeros((), **F64)) == 0
    assert derivatives(f, 1, "reverse")(torch.tensor(-0.5, **F64)) == -1


# Clipping by norm ---------------------------------------------------------------------------------


def clipped(max_norm: Any, order: float) -> Function:
    """Return the clipped gradients of two parameters, as a function of one vector."""
    tx = torchopt.clip_grad_norm(max_norm, order)

    def function(x: Tensor) -> Tensor:
        g = {"a": x[:2], "b": x[2:].view(1, -1)}
        updates = tx.update(g, tx.init(g), inplace=False)[0]
        return torch.cat([updates["a"], updates["b"].flatten()])

    return function


@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1.0, 100.0])
@pytest.mark.parametrize("order", NORMS)
def test_clip_values(order: float, max_norm: float) -> None:
    """The values of ``torch.nn.utils.clip_grad_norm_``, over all parameter groups together."""
    a, b = nn.Parameter(nonzero(2, 3)), nn.Parameter(nonzero(4))
    tx = torchopt.chain(torchopt.clip_grad_norm(max_norm, order), torchopt.scale(-1.0))
    start = [a.detach().clone(), b.detach().clone()]
    a.grad, b.grad = nonzero(2, 3), nonzero(4)
    grads = [a.grad.clone(), b.grad.clone()]
    functional = tx.update(grads, tx.init(grads), inplace=False)[0]
    optimizer = torchopt.Optimizer([{"params": [a]}, {"params": [b]}], tx)
    optimizer.step()

    for parameter, gradient in zip((a, b), grads):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([a, b], max_norm, order)
    expected = [a.grad, b.grad]
    clips = norm > max_norm
    assert clips == (max_norm < 100.0)
    assert_close([-u for u in functional], expected)
    assert_close([s - p.detach() for s, p in zip(start, (a, b))], expected, times=10)


@pytest.mark.parametrize("order", NORMS)
def test_clip_is_differentiated(order: float) -> None:
    """Its Jacobian, and the derivative in ``max_norm``, against central differences."""
    x, c, h = nonzero(5), torch.tensor(0.4, **F64), 1e-4
    function = clipped(c, order)
    jacobian = torch.func.jacrev(function)(x)
    step = h * torch.eye(5, **F64)
    at = lambda k: torch.stack([function(x + k * s) for s in step], dim=1)  # noqa: E731
    measured = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
    assert (jacobian - measured).abs().max() <= META_GRADIENT * measured.abs().max()
    assert_close(torch.func.jacfwd(function)(x), jacobian)
    factor = function(x)[0] / x[0]
    assert factor < 0.9
    # not the constant factor that clipping without a derivative would have
    assert (jacobian - factor * torch.eye(5, **F64)).abs().max() > 0.1 * factor
    # u is c times a function of x
    slope = torch.func.jacfwd(lambda c: clipped(c, order)(x))(c)
    assert_close(slope, function(x) / c)


@pytest.mark.parametrize("order", NORMS)
def test_clip_inactive_is_the_identity(order: float) -> None:
    x = nonzero(5)
    assert (clipped(1e3, order)(x) == x).all()
    assert (torch.func.jacrev(clipped(1e3, order))(x) == torch.eye(5)).all()


@every_jacobian
@pytest.mark.parametrize("order", NORMS)
def test_clip_where_all_gradients_are_zero(order: float, jacobian: Any) -> None:
    """The factor at a norm of zero is ``min(1, c / 1e-6)``, and so is the derivative."""
    zeros = torch.zeros(5, **F64)
    for max_norm, factor in ((0.7, 1.0), (2e-7, 0.2), (0.0, 0.0)):
        function = clipped(max_norm, order)
        assert (function(zeros) == 0).all()
        slopes = jacobian(function)(zeros)
        assert all_finite(slopes)
        assert_close(slopes, factor * torch.eye(5, **F64))


@every_hessian
@pytest.mark.parametrize("zero", ["one", "all"])
@pytest.mark.parametrize("order", NORMS)
def test_clip_second_order_at_zeros(order: float, zero: str, hessian: Any) -> None:
    x, weights = nonzero(5), nonzero(5)
    if zero == "all":
        x.zero_()
    else:
        x[1] = x[4] = 0.0
    for max_norm in (0.7, 2e-7):
        curvature = hessian(lambda x, c=max_norm: weights @ clipped(c, order)(x))(x)
        assert all_finite(curvature)
        if zero == "all":
            assert (curvature == 0).all()
        elif max_norm < 0.7:
            assert (curvature != 0).any()


@every_jacobian
@pytest.mark.parametrize("order", NORMS)
def test_clip_with_one_zero_entry(order: float, jacobian: Any) -> None:
    """Zero entries do not disturb the derivative among the others."""
    x = nonzero(5)
    x[1] = x[4] = 0.0
    slopes = jacobian(clipped(0.3, order))(x)
    assert all_finite(slopes)
    others = [0, 2, 3]
    alone = torch.func.jacfwd(clipped(0.3, order))(x[others])
    assert_close(slopes[others][:, others], alone)
    factor = (clipped(0.3, order)(x)[0] / x[0]).item()
    assert_close(slopes.diag()[[1, 4]], torch.full((2,), factor, **F64))


@pytest.mark.parametrize("order", NORMS)
def test_clip_third_order_at_zero(order: float) -> None:
    weights = nonzero(5)
    f = lambda x: weights @ clipped(2e-7, order)(x)  # noqa: E731
    for x in (torch.zeros(5, **F64), nonzero(5) * torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], **F64)):
        assert all_finite(torch.func.jacrev(torch.func.hessian(f))(x))


def test_clip_then_adam_at_zero_gradients() -> None:
    """A chain with both roots, all gradients zero."""
    tx = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam(0.1, eps=1e-3))
    p = nonzero(3)

    def function(g: Tensor) -> Tensor:
        state, q = tx.init(p), p
        for _ in range(2):
            updates, state = tx.update(g, state, q, inplace=False)
            q = torchopt.apply_updates(q, updates, inplace=False)
        return q

    zeros = torch.zeros(3, **F64)
    expected = -2 * 0.1 / 1e-3 * torch.eye(3, **F64)  # u = -lr g / eps, twice
    for jacobian in JACOBIANS.values():
        assert_close(jacobian(function)(zeros), expected)
