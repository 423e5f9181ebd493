"""torchopt.LBFGS: what torch.optim.LBFGS does, call for call, and checkpoints that interchange."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import pytest
import torch
from solver_problems import logistic_data, logistic_regression, rosenbrock, scipy_minimum
from tolerances import VALUES, assert_close, relative_error

import torchopt
from torchopt.solvers import Outcome


DTYPES = [torch.float32, torch.float64]
SETTINGS = {
    "strong_wolfe": {"line_search_fn": "strong_wolfe"},
    "fixed": {"lr": 2e-3},
    "short memory": {"line_search_fn": "strong_wolfe", "history_size": 2},
    "few calls": {"line_search_fn": "strong_wolfe", "max_eval": 7},
    "one iteration": {"lr": 0.5, "max_iter": 1},
    "searched once": {"max_iter": 1, "line_search_fn": "strong_wolfe"},
}


class Run:
    """An optimizer of one vector, with every loss that it has asked for."""

    def __init__(self, cls, fn, start, **options):
        self.fn, self.p, self.losses = fn, torch.nn.Parameter(start.clone()), []
        self.optimizer = cls([self.p], **options)

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.fn(self.p)
        loss.backward()
        self.losses.append(loss.item())
        return loss

    def steps(self, count):
        for _ in range(count):
            self.optimizer.step(self.closure)
        return self


def both(fn, start, steps, **options):
    theirs = Run(torch.optim.LBFGS, fn, start, **options).steps(steps)
    return Run(torchopt.LBFGS, fn, start, **options).steps(steps), theirs


# The same as torch.optim -------------------------------------------------------------------------


def test_arguments_and_defaults_are_those_of_torch():
    ours, theirs = (
        inspect.signature(cls.__init__).parameters for cls in (torchopt.LBFGS, torch.optim.LBFGS)
    )
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
    groups = [
        cls([torch.nn.Parameter(torch.ones(2))]) for cls in (torchopt.LBFGS, torch.optim.LBFGS)
    ]
    ours, theirs = (optimizer.state_dict() for optimizer in groups)
    assert ours == theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("n", [2, 10])
def test_steps_are_those_of_torch(n, setting, dtype):
    ours, theirs = both(rosenbrock, torch.full((n,), -1.2, dtype=dtype), 4, **SETTINGS[setting])
    count = 12  # rounding grows with every iteration
    assert_close(torch.tensor(ours.losses[:count]), torch.tensor(theirs.losses[:count]), dtype, 50)
    assert len(ours.losses) <= len(theirs.losses)
    if dtype is torch.float64:
        assert len(ours.losses) == len(theirs.losses)
        assert relative_error(ours.p, theirs.p) < 1e-6
    mine, other = (run.optimizer.state[run.p] for run in (ours, theirs))
    assert mine["func_evals"] == len(ours.losses)
    assert mine["n_iter"] == other["n_iter"]


@functools.cache
def minimum_of_scipy(name):
    problem = logistic_regression(*logistic_data(name, torch.float64))
    return scipy_minimum(*problem, maxiter=500, ftol=1e-11, gtol=1e-7).fun


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "search"),
    [
        ("iris", None),
        ("iris", "strong_wolfe"),
        ("breast_cancer", "strong_wolfe"),
        ("digits", "strong_wolfe"),
    ],
)
def test_logistic_regression_of_scikit_learn(name, search, dtype):
    loss, start = logistic_regression(*logistic_data(name, dtype))
    options = {"line_search_fn": search, "lr": 1.0 if search else 0.1}
    ours, theirs = both(loss, start, 1, max_iter=200, max_eval=1000, **options)
    assert len(ours.losses) <= len(theirs.losses)
    minimum = minimum_of_scipy(name)
    resolution = max(1e-7, 10 * VALUES[dtype])
    assert loss(ours.p).item() == pytest.approx(loss(theirs.p).item(), rel=resolution)
    assert loss(ours.p).item() == pytest.approx(minimum, rel=3 * resolution)


def test_large_rosenbrock_needs_as_many_calls_as_torch():
    options = {"line_search_fn": "strong_wolfe", "max_iter": 300, "max_eval": 3000}
    start = torch.linspace(-2, 2, 30, dtype=torch.float64)
    ours, theirs = both(rosenbrock, start, 1, history_size=8, **options)
    assert len(ours.losses) == len(theirs.losses)
    assert rosenbrock(ours.p).item() < 1e-7
    assert ours.optimizer.outcome is Outcome.SMALL_CHANGE


class Net(torch.nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.first = torch.nn.Linear(3, 4, dtype=dtype)
        self.idle = torch.nn.Parameter(torch.ones(2, dtype=dtype))  # never has a gradient
        self.last = torch.nn.Linear(4, 1, dtype=dtype)
        self.last.weight = torch.nn.Parameter(self.last.weight.detach().T.contiguous().T)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def trained(cls, net, steps=3, **options):
    optimizer = cls(net.parameters(), **options)
    x = torch.linspace(-1, 1, 30, dtype=net.idle.dtype).reshape(10, 3)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - x.sum(1, keepdim=True).sin()).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(steps)]
    return losses, [p.detach() for p in net.parameters()]


def test_many_parameters_some_without_gradient_or_dense_layout():
    net = Net()
    results = [
        trained(cls, copy.deepcopy(net), line_search_fn="strong_wolfe", max_iter=4)
        for cls in (torchopt.LBFGS, torch.optim.LBFGS)
    ]
    assert_close(torch.tensor(results[0][0]), torch.tensor(results[1][0]), times=1e3)
    assert_close(results[0][1], results[1][1], times=1e4)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_complex_parameters_are_pairs_of_reals(search, nonzero):
    target = nonzero(3, dtype=torch.complex128)
    fn = lambda p: ((p - target).abs().square() + 0.1 * (p.real * p.imag)).square().sum()  # noqa: E731
    start = torch.zeros(3, dtype=torch.complex128)
    ours, theirs = both(fn, start, 2, line_search_fn=search, max_iter=8, lr=0.3)
    assert len(ours.losses) == len(theirs.losses)
    assert_close(ours.p, theirs.p, times=1e4)


def test_sparse_gradients_are_made_dense():
    results = []
    for cls in (torchopt.LBFGS, torch.optim.LBFGS):
        torch.manual_seed(1)
        table = torch.nn.Embedding(5, 2, sparse=True, dtype=torch.float64)
        optimizer = cls(table.parameters(), line_search_fn="strong_wolfe")

        def closure(table=table, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (table(torch.tensor([0, 3, 3])) - 1).cosh().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        results.append(table.weight.detach())
    assert_close(*results, times=1e3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_remembers_in_float32(dtype):
    fn = lambda p: (p.float() - torch.tensor([1.0, -2.0])).cosh().sum()  # noqa: E731
    run = Run(torchopt.LBFGS, fn, torch.zeros(2, dtype=dtype), line_search_fn="strong_wolfe")
    run.steps(1)
    assert relative_error(run.p, torch.tensor([1.0, -2.0])) < 2 * VALUES[dtype]
    again = Run(torchopt.LBFGS, fn, run.p.detach(), line_search_fn="strong_wolfe")
    again.optimizer.load_state_dict(run.optimizer.state_dict())
    kept, loaded = run.optimizer.state[run.p], again.optimizer.state[again.p]
    assert loaded["d"].dtype == torch.float32
    assert_close(loaded["old_dirs"], kept["old_dirs"], times=0)


# Groups, schedulers, closures -------------------------------------------------------------------


def test_hyperparameters_are_read_anew_at_each_step():
    run = Run(torchopt.LBFGS, rosenbrock, torch.full((2,), -1.2), max_iter=3, max_eval=9, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, 0.5)
    run.steps(1)
    assert len(run.losses) == 3
    scheduler.step()
    run.optimizer.param_groups[0]["max_iter"] = 5
    run.steps(1)
    assert len(run.losses) == 8
    assert run.optimizer.state[run.p]["t"] == pytest.approx(5e-4)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_learning_rate_of_zero_changes_nothing(search):
    run = Run(torchopt.LBFGS, rosenbrock, torch.full((2,), -1.2), lr=0.0, line_search_fn=search)
    run.steps(2)
    assert torch.equal(run.p, torch.full((2,), -1.2))


def test_a_tensor_with_one_entry_is_a_learning_rate():
    start = torch.full((3,), -1.2)
    runs = [
        Run(torchopt.LBFGS, rosenbrock, start, lr=lr).steps(1)
        for lr in (1e-3, torch.tensor([1e-3]))
    ]
    assert_close(runs[0].p, runs[1].p)


def test_step_returns_what_the_closure_returned_first():
    run = Run(torchopt.LBFGS, rosenbrock, torch.full((2,), -1.2))
    with torch.no_grad():  # the closure is called with gradients enabled all the same
        loss = run.optimizer.step(run.closure)
    assert loss.item() == run.losses[0]
    numbers = Run(torchopt.LBFGS, rosenbrock, torch.full((2,), -1.2))
    assert numbers.optimizer.step(lambda: numbers.closure().item()) == run.losses[0]
    assert torch.equal(numbers.p, run.p)


def test_backtracking_is_a_line_search_too():
    run = Run(
        torchopt.LBFGS,
        rosenbrock,
        torch.full((2,), -1.2, dtype=torch.float64),
        line_search_fn="backtracking",
        max_iter=200,
    ).steps(1)
    assert relative_error(run.p, torch.ones(2)) < 1e-4


# Checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("to_torch", [False, True])
def test_a_run_goes_on_in_the_other_library(to_torch, search, dtype):
    classes = [torch.optim.LBFGS, torchopt.LBFGS]
    first, second = reversed(classes) if to_torch else classes
    options = {"line_search_fn": search, "lr": 1.0 if search else 1e-3, "max_iter": 5}
    start = torch.full((4,), -1.2, dtype=dtype)
    whole = Run(torch.optim.LBFGS, rosenbrock, start, **options).steps(4)
    before = Run(first, rosenbrock, start, **options).steps(2)
    after = Run(second, rosenbrock, before.p.detach(), lr=7.0)  # what is loaded counts
    after.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict()))
    after.steps(2)
    losses = before.losses + after.losses
    assert_close(torch.tensor(losses[:14]), torch.tensor(whole.losses[:14]), dtype, 100)
    if dtype is torch.float64:
        assert len(losses) == len(whole.losses)
        assert_close(after.p, whole.p, times=1e6)
    counts = [run.optimizer.state[run.p]["n_iter"] for run in (after, whole)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_states_have_the_names_and_kinds_of_torch(iterations):
    options = {"max_iter": max(iterations, 1), "tolerance_grad": 1e-7 if iterations else 1e9}
    ours, theirs = both(rosenbrock, torch.full((3,), -1.2), 1, **options)
    mine, other = (run.optimizer.state_dict()["state"][0] for run in (ours, theirs))
    assert set(mine) - {"al"} == set(other) - {"al"}
    for name in set(other) - {"al", "t", "H_diag"}:
        assert type(mine[name]) is type(other[name]), name
        if isinstance(other[name], list):
            assert [x.shape for x in mine[name]] == [x.shape for x in other[name]]
    for target in (ours, theirs):  # both load both, and go on
        for saved in (ours, theirs):
            target.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
            target.steps(1)


def test_a_state_dict_is_a_snapshot():
    run = Run(torchopt.LBFGS, rosenbrock, torch.full((3,), -1.2), max_iter=4).steps(1)
    saved, p = run.optimizer.state_dict(), run.p.detach().clone()
    run.steps(2)
    after = run.p.detach().clone()
    with torch.no_grad():
        run.p.copy_(p)
    run.optimizer.load_state_dict(saved)
    run.steps(2)
    assert torch.equal(run.p, after)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on(copied):
    run = Run(torchopt.LBFGS, rosenbrock, torch.full((3,), -1.2), max_iter=4).steps(1)
    twin = copied(run)
    run.steps(1)
    twin.steps(1)
    assert torch.equal(twin.p, run.p)
    assert twin.p is not run.p
