"""iMAML: its derivative against differences, its linear solver, and the run at tiny size."""

from __future__ import annotations

import json
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
    learner = ImplicitLearner(network, "sgd", strength=1.0, cg_steps=8)
    params = {name: p.detach().clone() for name, p in network.named_parameters()}
    rates = {name: torch.tensor(0.5).double() for name in params}
    x, y = torch.randn(2, 2, 6, 2).double(), torch.randint(0, 2, (2, 2, 6))
    return learner, params, rates, Task(x[0], y[0], x[1], y[1])


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
    """They solve a small system; and they return what they have where the curvature ends."""
    from common.imaml import truncated_cg

    root = torch.randn(4, 4).double()
    matrix = root @ root.T + torch.eye(4)
    b = torch.randn(4).double()
    found = truncated_cg(4)(lambda v: {"x": matrix @ v["x"]}, {"x": b})["x"]
    assert relative_error(found, torch.linalg.solve(matrix, b)) < 1e-9
    assert torch.equal(truncated_cg(3)(lambda v: {"x": -v["x"]}, {"x": b})["x"], 0 * b)
    indefinite = torch.tensor([4.0, 1.0, -3.0]).double()
    b = torch.tensor([1.0, 1.0, 0.5]).double()
    first = b * (b @ b) / (b @ (indefinite * b))  # the second direction has no curvature
    found = truncated_cg(5)(lambda v: {"x": indefinite * v["x"]}, {"x": b})["x"]
    assert relative_error(found, first) < 1e-12
    assert torch.equal(truncated_cg(2)(lambda v: v, {"x": 0 * b})["x"], 0 * b)


def test_damping_stands_for_a_stronger_hold() -> None:
    """The derivative is the inverse of ``I + H / (strength + damping)``, in the same units."""
    from common.imaml import damped, truncated_cg

    root = torch.randn(4, 4).double()
    hessian, b = root + root.T, torch.randn(4).double()
    matrix = hessian + 2 * torch.eye(4)  # with strength 2
    solve = damped(truncated_cg(4), 2.0, 10.0)
    found = 2 * solve(lambda v: {"x": matrix @ v["x"]}, {"x": b})["x"]
    assert relative_error(found, torch.linalg.solve(torch.eye(4) + hessian / 12, b)) < 1e-9


def test_the_example_at_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import imaml_few_shot

    monkeypatch.setattr(imaml_few_shot, "alone", lambda function, *args: function(*args))
    monkeypatch.setattr(imaml_few_shot, "MEASURED", {"iMAML": (1, 2), "MAML": (1,)})
    options = ["--iterations", "2", "--channels", "2", "--blocks", "2", "--test-tasks", "4"]
    options += ["--inner-steps", "2", "--meta-batch", "2", "--threads", "1"]
    options += ["--output", str(tmp_path)]
    results = imaml_few_shot.main(options)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["results"].keys() == {"MAML", "iMAML"}
    assert [len(results["memory"]), len(results["claims"])] == [3, 2]
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
        found = claims({"MAML": Accuracy(maml), "iMAML": Accuracy(maml - loss)}, memory)
        assert [claim["holds"] for claim in found] == [holds, True]
    memory[1]["memory"] = 1000.0
    found = claims({"MAML": Accuracy(maml), "iMAML": Accuracy(maml)}, memory)
    assert not found[1]["holds"]
