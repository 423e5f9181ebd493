"""Solvers: they find minima, say how they ended, change no input, and can be unrolled."""

from __future__ import annotations

import math

import pytest
import torch
from solver_problems import (
    central_difference,
    logistic_data,
    logistic_regression,
    rosenbrock,
    scipy_minimum,
)
from tolerances import META_GRADIENT, VALUES, assert_close, relative_error

import torchopt
from torchopt.solvers import (
    LBFGS,
    Backtracking,
    GradientDescent,
    Outcome,
    StrongWolfe,
    Unrolled,
    minimize,
)
from torchopt.solvers.lbfgs import Pair, inverse_hessian_product


SEARCHES = ["strong_wolfe", "backtracking", StrongWolfe(c2=0.5), Backtracking(decrease=0.7)]
F64 = {"dtype": torch.float64}


def bowl(p, center):
    """A function with its minimum, 0, at ``center``; not quadratic."""
    return ((p - center).cosh() - 1).sum()


# L-BFGS ------------------------------------------------------------------------------------------


def test_two_loops_are_the_dense_update(nonzero):
    n, gamma = 6, 0.7
    dense, pairs = gamma * torch.eye(n, **F64), []
    for _ in range(4):
        s = nonzero(n)
        y = s * 1.5 + 0.3 * nonzero(n)
        assert s.dot(y) > 0
        rho = 1 / s.dot(y)
        left = torch.eye(n, **F64) - rho * torch.outer(s, y)
        dense = left @ dense @ left.T + rho * torch.outer(s, s)
        pairs.append(Pair(s, y, rho))
    g = nonzero(n)
    assert_close(inverse_hessian_product(g, tuple(pairs), gamma), dense @ g)


def test_pairs_without_curvature_are_skipped():
    # the optax trap: from x = 1 to 2 on -x ** 2 the curvature is negative
    fn = lambda x: -(x.square()).sum() + 0.01 * x.pow(4).sum()  # noqa: E731
    solver = LBFGS(line_search_fn=None)
    state = solver.init(fn, torch.ones(1, **F64))
    for _ in range(2):
        state = solver.step(fn, state)
    assert state.pairs == ()  # s'y < 0 for the step that was made
    assert state.slope < 0
    solution = minimize(fn, LBFGS(), torch.ones(1, **F64))
    assert_close(solution.params, torch.full((1,), math.sqrt(50.0), **F64), times=1e7)


def test_history_has_a_bound():
    solver = LBFGS(history_size=3)
    state = solver.init(rosenbrock, torch.full((8,), -1.2, **F64))
    sizes = []
    for _ in range(7):
        state = solver.step(rosenbrock, state)
        sizes.append(len(state.pairs))
    assert sizes == [0, 1, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("n", [2, 9])
def test_rosenbrock(search, n):
    start = torch.full((n,), -1.2, **F64)
    solver = LBFGS(line_search_fn=search, tolerance_change=1e-14)
    solution = minimize(rosenbrock, solver, start)
    assert solution.outcome.success
    assert relative_error(solution.params, torch.ones(n, **F64)) < 1e-5
    assert solution.value < 1e-10


def test_same_minimum_as_scipy_in_about_as_many_calls():
    start = torch.full((20,), -1.2, **F64)
    ours = minimize(rosenbrock, LBFGS(tolerance_change=1e-12, tolerance_grad=1e-6), start)
    scipy = scipy_minimum(rosenbrock, start, ftol=1e-14, gtol=1e-6)
    assert ours.outcome.success
    assert scipy.success
    assert relative_error(ours.params, scipy.x) < 1e-5
    assert ours.evaluations <= 1.25 * scipy.nfev


@pytest.mark.parametrize("name", ["iris", "breast_cancer"])
def test_logistic_regression_of_scikit_learn(name):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = logistic_data(name, torch.float64)
    loss, start = logistic_regression(x, y)
    solution = minimize(loss, LBFGS(tolerance_change=1e-14), start)
    w = solution.params.reshape(-1, x.shape[1] + 1)
    logits = x @ w[:, :-1].T + w[:, -1]
    # of two classes only the difference of the rows is penalised there: half as much
    model = linear_model.LogisticRegression(C=2.0 if len(w) == 2 else 1.0, tol=1e-10)
    model.set_params(max_iter=1000).fit(x.numpy(), y.numpy())
    assert solution.outcome.success
    assert relative_error(logits.softmax(1), model.predict_proba(x.numpy())) < 1e-5


# Trees and dtypes --------------------------------------------------------------------------------


def test_any_tree_of_any_floating_dtype(nonzero):
    center = {
        "a": [nonzero(2, 3), None, nonzero()],
        "b": (nonzero(3, dtype=torch.float32), nonzero(2, dtype=torch.complex128)),
        "c": nonzero(2, dtype=torch.bfloat16),
    }
    leaves, spec = torchopt.base.tree.flatten(center)
    start = torchopt.base.tree.tree_map(torch.zeros_like, center)
    before = torchopt.base.tree.tree_map(torch.clone, start)

    def fn(p):
        found = torchopt.base.tree.flatten(p)[0]
        assert found[1] is None
        pairs = [(a, b) for a, b in zip(found, leaves) if a is not None]
        return sum((a - b).abs().square().sum().double() for a, b in pairs)

    solution = minimize(fn, LBFGS(), start)
    result, result_spec = torchopt.base.tree.flatten(solution.params)
    assert result_spec == spec
    for found, wanted in zip(result, leaves):
        if wanted is not None:
            assert found.dtype == wanted.dtype
            assert relative_error(found, wanted) < max(1e-6, VALUES[wanted.dtype])
    for a, b in zip(torchopt.base.tree.flatten(before)[0], torchopt.base.tree.flatten(start)[0]):
        assert a is b is None or torch.equal(a, b)


def test_parameters_that_require_grad_are_left_alone():
    net = torch.nn.Linear(2, 1).double()
    params = dict(net.named_parameters())
    kept = {name: p.detach().clone() for name, p in params.items()}
    x, y = torch.randn(20, 2, **F64), torch.randn(20, 1, **F64)
    fn = lambda p: (torch.func.functional_call(net, p, x) - y).square().mean()  # noqa: E731
    solution = minimize(fn, LBFGS(tolerance_change=0.0, tolerance_grad=1e-10), params)
    design = torch.cat([x, torch.ones(20, 1, **F64)], 1)
    exact = torch.linalg.lstsq(design, y).solution
    assert_close(solution.params["weight"][0], exact[:2, 0], times=1e4)
    assert not solution.params["weight"].requires_grad
    for name, p in params.items():
        assert torch.equal(p, kept[name])
        assert p.grad is None
        assert p.requires_grad


def test_further_arguments_and_grad_mode():
    center = torch.tensor([1.0, -2.0], requires_grad=True, **F64)
    with torch.no_grad():
        solution = minimize(bowl, LBFGS(), torch.zeros(2, **F64), center)
    assert relative_error(solution.params, center) < 1e-6
    assert not solution.params.requires_grad


# Outcomes ----------------------------------------------------------------------------------------


class Downhill(torch.autograd.Function):
    """The square, with a gradient of the wrong sign."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, grad):
        return -2 * grad * ctx.saved_tensors[0]


ENDS = {
    Outcome.CONVERGED: (LBFGS(), rosenbrock, [1.0, 1.0]),
    Outcome.SMALL_CHANGE: (LBFGS(tolerance_change=1e-3), rosenbrock, [-1.2, 1.0]),
    Outcome.MAX_ITER: (LBFGS(max_iter=3), rosenbrock, [-1.2, 1.0]),
    Outcome.MAX_EVAL: (LBFGS(max_eval=4), rosenbrock, [-1.2, 1.0]),
    Outcome.LINE_SEARCH_FAILED: (LBFGS(), Downhill.apply, [-1.2, 1.0]),
    Outcome.NOT_FINITE: (LBFGS(), lambda p: p.log().sum(), [-1.2, 1.0]),
}
ARGUMENTS = {
    Outcome.CONVERGED: "tolerance_grad",
    Outcome.SMALL_CHANGE: "tolerance_change",
    Outcome.MAX_ITER: "max_iter",
    Outcome.MAX_EVAL: "max_eval",
    Outcome.LINE_SEARCH_FAILED: "float64",
    Outcome.NOT_FINITE: "lower lr",
}


def test_other_outcomes_are_those_of_root_finders():
    assert set(Outcome) - set(ENDS) == {Outcome.SINGULAR, Outcome.STAGNATED}  # tests/test_roots.py


@pytest.mark.parametrize("outcome", ENDS, ids=lambda outcome: outcome.name)
def test_every_outcome_comes_about_and_says_what_to_change(outcome):
    solver, fn, start = ENDS[outcome]
    calls = []
    counted = lambda p: (calls.append(p), fn(p))[1]  # noqa: E731
    solution = minimize(counted, solver, torch.tensor(start, **F64))
    assert solution.outcome is outcome
    assert solution.evaluations == len(calls)
    assert ARGUMENTS[outcome] in outcome.text
    if outcome.success:
        assert solution.checked() is solution
    else:
        with pytest.raises(RuntimeError, match=str(outcome)):
            solution.checked()


@pytest.mark.parametrize(
    "solver", [LBFGS(1e9, line_search_fn=None), GradientDescent(torchopt.sgd(1e9))], ids=str
)
def test_a_step_that_is_not_finite_is_not_taken(solver):
    fn = lambda p: (p.exp() - p).sum()  # noqa: E731
    solution = minimize(fn, solver, torch.tensor([-3.0, 0.5]))
    assert solution.outcome is Outcome.NOT_FINITE
    assert torch.isfinite(solution.params).all()
    assert solution.value == pytest.approx(fn(solution.params).item(), rel=1e-6)


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_a_search_stays_where_the_function_is_finite(search):
    fn = lambda p: (p - p.log()).sum()  # noqa: E731 - nan for p < 0, where the first step leads
    seen = []
    spied = lambda p: (seen.append(p.detach().clone()), fn(p))[1]  # noqa: E731
    start = torch.tensor([30.0, 0.02, 0.4], **F64)
    solution = minimize(spied, LBFGS(50.0, line_search_fn=search), start)
    assert any((p < 0).any() for p in seen)
    assert solution.outcome.success
    assert relative_error(solution.params, torch.ones(3, **F64)) < 1e-4


# By hand, and transformations --------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [LBFGS(), GradientDescent(torchopt.adam(0.3), max_iter=30)], ids=str
)
def test_stepping_by_hand_is_the_loop(solver):
    start, center = torch.zeros(3, **F64), torch.tensor([1.0, -2.0, 0.5], **F64)
    solution = minimize(bowl, solver, start, center)
    state = solver.init(bowl, start, center)
    while (outcome := solver.terminate(state)) is None:
        state = solver.step(bowl, state, center)
    assert outcome is solution.outcome
    assert torch.equal(state.params, solution.params)
    assert (state.iterations, state.evaluations) == (solution.iterations, solution.evaluations)


def test_a_transformation_as_a_solver_is_its_plain_loop(nonzero):
    center = {"w": nonzero(3), "b": nonzero()}
    tx = torchopt.partition(
        {"slow": torchopt.sgd(0.05, momentum=0.5), "fast": torchopt.adamw(0.1)},
        {"w": "slow", "b": "fast"},
    )
    fn = lambda p: bowl(p["w"], center["w"]) + bowl(p["b"], center["b"])  # noqa: E731
    start = {"w": torch.zeros(3, **F64), "b": torch.zeros((), **F64)}
    solution = minimize(fn, GradientDescent(tx, max_iter=7), start)
    params, state = start, tx.init(start)
    for _ in range(7):
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        grads = dict(zip(leaves, torch.autograd.grad(fn(leaves), list(leaves.values()))))
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
    assert solution.outcome is Outcome.MAX_ITER
    assert solution.evaluations == 8
    assert_close(solution.params, params)


# Derivatives -------------------------------------------------------------------------------------

UNROLLED = {
    "fixed": LBFGS(0.3, line_search_fn=None, max_iter=3),
    "strong_wolfe": LBFGS(0.3, line_search_fn=StrongWolfe(c2=0.1), max_iter=3),
    "backtracking": LBFGS(3.0, line_search_fn="backtracking", max_iter=3),
    "adam": GradientDescent(torchopt.adam(0.1), max_iter=3),
}


@pytest.mark.parametrize("name", UNROLLED)
def test_unrolled_derivatives_are_those_of_central_differences(name, nonzero):
    solver, start, center, weight = UNROLLED[name], nonzero(3), 3 * nonzero(3), nonzero(3)

    def outer(start, center):
        closed_over = center[0]
        fn = lambda p, c: bowl(p, c) + 0.1 * (p.square() * closed_over).sum() ** 2  # noqa: E731
        solution = minimize(fn, solver, start, center, adjoint=Unrolled())
        assert solution.iterations == 3
        # searches that went beyond the first length, whose lengths have a derivative
        assert (solution.evaluations > 4) == (name in ("strong_wolfe", "backtracking"))
        return solution.params.dot(weight)

    inputs = [start.requires_grad_(), center.requires_grad_()]
    found = torch.autograd.grad(outer(*inputs), inputs)
    with torch.no_grad():
        wanted = (
            central_difference(lambda x: outer(x, center), start.detach(), 3e-5),
            central_difference(lambda x: outer(start, x), center.detach(), 3e-5),
        )
    for derivative, difference in zip(found, wanted):
        assert relative_error(derivative, difference) < META_GRADIENT


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_the_learning_rate_and_the_value_have_derivatives(search, nonzero):
    start, center = nonzero(3), 3 * nonzero(3)

    def outer(lr):
        solver = LBFGS(lr, line_search_fn=search, max_iter=3)
        return minimize(bowl, solver, start, center, adjoint=Unrolled()).value

    lr = torch.tensor(0.31, requires_grad=True, **F64)
    (found,) = torch.autograd.grad(outer(lr), lr)
    with torch.no_grad():
        wanted = central_difference(lambda x: torch.tensor(outer(x), **F64), lr.detach())
    assert relative_error(found, wanted) < META_GRADIENT


def test_second_derivatives_are_unrolled_too(nonzero):
    start, center = nonzero(2), 2 * nonzero(2)
    solver = LBFGS(0.3, line_search_fn=None, max_iter=3)

    def slope(c):
        c = c.detach().requires_grad_()
        with torch.enable_grad():
            x = minimize(bowl, solver, start, c, adjoint=Unrolled()).params
            (grad,) = torch.autograd.grad(x.square().sum(), c, create_graph=True)
        return grad, c

    grad, c = slope(center)
    (found,) = torch.autograd.grad(grad[0], c)
    wanted = central_difference(lambda x: slope(x)[0][0].detach(), center)
    assert relative_error(found, wanted) < META_GRADIENT


def test_unrolling_records_the_same_iterations():
    start = torch.full((4,), -1.2, **F64)
    plain = minimize(rosenbrock, LBFGS(), start)
    unrolled = minimize(rosenbrock, LBFGS(), start, adjoint=Unrolled())
    assert unrolled.iterations == plain.iterations
    assert relative_error(unrolled.params, plain.params) < 1e-8
    assert not plain.params.requires_grad
