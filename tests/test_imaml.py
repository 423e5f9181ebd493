"""iMAML: its derivative against differences and closed forms, and the run at tiny size."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import relative_error
from torch import Tensor, nn


for needed in ("sklearn", "rich", "matplotlib"):
    pytest.importorskip(needed)

pytestmark = [pytest.mark.usefixtures("examples_on_path", "no_figures")]


def problem() -> tuple[Any, Any, Any, Any]:
    """A linear classifier in float64, and two tasks of random numbers."""
    from common.episodes import Task
    from common.imaml import ImplicitLearner

    network = nn.Linear(2, 2).double()
    learner = ImplicitLearner(network, "sgd", strength=1.0, cg_steps=8, rtol=1e-12)
    params = {name: p.detach().clone() for name, p in network.named_parameters()}
    rates = {name: torch.tensor(0.5).double() for name in params}
    x, y = torch.randn(2, 2, 6, 2).double(), torch.randint(0, 2, (2, 2, 6))
    return learner, params, rates, Task(x[0], y[0], x[1], y[1])


def derivative(learner: Any, params: Any, rates: Any, tasks: Any) -> Tensor:
    """Return the meta-gradient of the first task, laid out in one vector."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    loss = learner.outcome(leaves, rates, tasks, 200)[0][0]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))])


def at_the_solution(learner: Any, params: Any, rates: Any, tasks: Any) -> tuple[Tensor, Tensor]:
    """Return the Hessian and the gradient of the query loss where the first task is learned."""
    x, y = tasks.support_x[0], tasks.support_y[0]
    with torch.no_grad():
        adapted = learner.adapt(params, rates, x, y, 200)

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return learner.loss({"weight": w[:4].view(2, 2), "bias": w[4:]}, x, y)

    at = torch.cat([adapted["weight"].flatten(), adapted["bias"]])
    hessian = torch.func.hessian(loss)(at, x, y)
    return hessian, torch.func.grad(loss)(at, tasks.query_x[0], tasks.query_y[0])


def test_the_derivative_is_that_of_the_solution() -> None:
    """Central differences of what is learned by many steps; two tasks at once, by vmap."""
    learner, params, rates, tasks = problem()

    def loss(w: Tensor) -> Tensor:
        values = {"weight": w[:4].view(2, 2), "bias": w[4:]}
        return learner.outcome(values, rates, tasks, 30)[0].mean()

    at = torch.cat([params["weight"].reshape(-1), params["bias"]])
    steps = 1e-5 * torch.eye(6).double()
    with torch.no_grad():
        expected = torch.stack([(loss(at + e) - loss(at - e)) / 2e-5 for e in steps])
    leaf = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    assert relative_error(found, expected) < 1e-5


def test_few_conjugate_gradients() -> None:
    """The derivative is what one iteration has come to, in closed form; and it does not warn."""
    learner, params, rates, tasks = problem()
    learner.cg_steps, learner.damping = 1, 0.5
    hessian, b = at_the_solution(learner, params, rates, tasks)
    matrix = hessian + (learner.strength + learner.damping) * torch.eye(len(b))
    expected = learner.strength * b * (b @ b) / (b @ matrix @ b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = derivative(learner, params, rates, tasks)
    assert relative_error(found, expected) < 1e-9


def test_damping_is_added_to_the_hessian() -> None:
    """Against the dense inverse."""
    learner, params, rates, tasks = problem()
    learner.damping = 10.0
    hessian, b = at_the_solution(learner, params, rates, tasks)
    matrix = hessian + (learner.strength + learner.damping) * torch.eye(len(b))
    expected = learner.strength * torch.linalg.solve(matrix, b)
    assert relative_error(derivative(learner, params, rates, tasks), expected) < 1e-9


def test_what_is_left_of_the_gradient() -> None:
    """Nothing after many steps, all of it after none."""
    learner, params, rates, tasks = problem()
    assert learner.unsolved(params, rates, tasks, 200).max() < 1e-12
    assert torch.equal(learner.unsolved(params, rates, tasks, 0), torch.ones(2).double())


def test_the_example_at_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import imaml_few_shot

    monkeypatch.setattr(imaml_few_shot, "alone", lambda function, *args, **_: function(*args))
    monkeypatch.setattr(imaml_few_shot, "MEASURED", {"iMAML": (1, 2), "MAML": (1,)})
    options = ["--iterations", "2", "--channels", "2", "--blocks", "2", "--test-tasks", "4"]
    options += ["--inner-steps", "2", "--meta-batch", "2", "--threads", "1"]
    options += ["--output", str(tmp_path)]
    results = imaml_few_shot.main(options)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["results"].keys() == {"MAML", "iMAML"}
    assert [len(results["memory"]), len(results["claims"])] == [3, 3]
    assert (tmp_path / "imaml_few_shot.png").read_bytes().startswith(b"\x89PNG")
    again = imaml_few_shot.main([*options, "--resume"])
    assert again["results"] == results["results"]
    with pytest.raises(SystemExit):
        imaml_few_shot.main([*options, "--resume", "--strength", "3"])


def test_what_is_claimed() -> None:
    from common.imaml_report import claims
    from common.maml import Accuracy

    memory = [
        {"measured": name, "steps": steps, "memory": size}
        for name, sizes in (("iMAML", {5: 10.0, 500: 10.5}), ("MAML", {5: 30.0, 50: 300.0}))
        for steps, size in sizes.items()
    ]
    maml = torch.rand(100).double() + 90
    for loss, holds in ((0.5, True), (1.5, False), (-3.0, True)):
        found = claims({"MAML": Accuracy(maml), "iMAML": Accuracy(maml - loss)}, memory, 0.05)
        assert [claim["holds"] for claim in found] == [holds, True, True]
    memory[1]["memory"] = 1000.0
    found = claims({"MAML": Accuracy(maml), "iMAML": Accuracy(maml)}, memory, 0.2)
    assert [claim["holds"] for claim in found] == [True, False, False]
