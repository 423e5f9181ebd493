"""How each optimizer converges on three problems: ``python docs/convergence.py [NAME ...]``.

Every optimizer that ``torchopt`` exports is run from a few learning rates; the best run of each is
written to ``docs/convergence.json`` and drawn. With names only those are run, and the others keep
their numbers. ``tests/test_convergence.py`` holds the numbers to the optimizers of today.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchopt


DATA = Path(__file__).with_suffix(".json")

#: The learning rates that are tried first, and the factors that are tried around the best of them.
DECADES = (1e-1, 1e-2, 1.0, 1e-3, 10.0)
AROUND = (1 / 3, 3.0)

#: What is given beside parameters and learning rate, where defaults do not do. One that is given
#: its learning rate here has no need of another.
SETTINGS: dict[str, dict[str, Any]] = {
    "DAdaptAdagrad": {"lr": 1.0},
    "DAdaptAdamW": {"lr": 1.0},
    "DAdaptSGD": {"lr": 1.0},
    "LBFGS": {"lr": 1.0, "line_search_fn": "strong_wolfe"},
    "PolyakSGD": {"lr": 1.0},
    "Prodigy": {"lr": 1.0},
}

#: The factor for such a one where it diverges.
CAREFUL = 0.3

#: Every how many steps an optimizer gets an estimate of the curvature, and what that costs.
CURVATURE_EVERY, CURVATURE_COST = 10, 2


#: At how many measurements in succession a loss is to be low: once may be by chance.
STAYS = 3


def optimizers() -> dict[str, Any]:
    """Return the object-oriented optimizers that ``torchopt`` exports, aliases left out."""
    public = {name: getattr(torchopt, name) for name in dir(torchopt)}
    return {
        name: value
        for name, value in sorted(public.items(), key=lambda item: item[0].lower())
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torchopt.Optimizer
        and value.__name__ == name
    }


# The problems --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A loss to minimise, and how low is low enough after how many gradients."""

    title: str
    tolerance: float
    budget: int
    #: The parameters to begin with, matrices all of them, so that each optimizer takes them.
    start: Callable[[], list[Tensor]]
    #: From parameters and the number of the step, which chooses a batch.
    loss: Callable[[Sequence[Tensor], int], Tensor]
    #: What is to be low: the loss on all data.
    whole: Callable[[Sequence[Tensor]], Tensor]
    #: The share that is right of what was kept for testing.
    accuracy: Callable[[Sequence[Tensor]], float] | None = None


SIZE, CONDITION = 8, 100.0


@cache
def _bowl() -> tuple[Tensor, Tensor]:
    """Return a symmetric matrix, its eigenvalues from 1 / CONDITION to 1, and the solution."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(normal)
    eigenvalues = torch.logspace(-math.log10(CONDITION), 0, SIZE, dtype=torch.float64)
    solution = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    return (basis * eigenvalues) @ basis.T, solution


def _quadratic(params: Sequence[Tensor], step: int = 0) -> Tensor:
    matrix, solution = _bowl()
    away = params[0] - solution
    return 0.5 * (away * (matrix @ away)).sum()


def _rosenbrock(params: Sequence[Tensor], step: int = 0) -> Tensor:
    x, y = params[0].unbind(1)
    return ((1 - x).square() + 100 * (y - x.square()).square()).sum()


HIDDEN, BATCH = 32, 128


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels to train with, and to test with: every fifth."""
    from sklearn.datasets import load_digits  # of the extra "examples"

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    x, y = torch.cat([x, torch.ones(len(x), 1)], 1), torch.tensor(labels)[order]
    test = torch.arange(len(y)) % 5 == 0
    return x[~test], y[~test], x[test], y[test]


def _network(params: Sequence[Tensor], x: Tensor) -> Tensor:
    first, second = params
    return torch.relu(x @ first) @ second


def _digits_start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(i, o, generator=generator) * (2 / i) ** 0.5
        for i, o in ((65, HIDDEN), (HIDDEN, 10))
    ]


def _digits_loss(params: Sequence[Tensor], step: int) -> Tensor:
    x, y, _, _ = _digits()
    rows = (torch.arange(BATCH) + step * BATCH) % len(y)
    return torch.nn.functional.cross_entropy(_network(params, x[rows]), y[rows])


def _digits_whole(params: Sequence[Tensor]) -> Tensor:
    x, y, _, _ = _digits()
    return torch.nn.functional.cross_entropy(_network(params, x), y)


def _accuracy(params: Sequence[Tensor]) -> float:
    _, _, x, y = _digits()
    return (_network(params, x).argmax(1) == y).float().mean().item()


PROBLEMS = {
    "quadratic": Problem(
        "Quadratic",
        1e-2,
        500,
        lambda: [torch.zeros(SIZE, SIZE, dtype=torch.float64) + 0.1],
        _quadratic,
        _quadratic,
    ),
    "rosenbrock": Problem(
        "Rosenbrock",
        1e-1,
        1000,
        lambda: [torch.tensor([[-1.2, 1.0]], dtype=torch.float64)],
        _rosenbrock,
        _rosenbrock,
    ),
    "digits": Problem("Digits", 0.1, 300, _digits_start, _digits_loss, _digits_whole, _accuracy),
}


# Running -------------------------------------------------------------------------------------


@dataclass
class Run:
    """The loss on all data after some numbers of gradients."""

    lr: float
    gradients: list[int]
    losses: list[float]
    reached: int | None = None
    accuracy: float | None = None

    @property
    def diverged(self) -> bool:
        """Whether the loss has left all bounds."""
        return not self.losses[-1] < 1e4 * self.losses[0]

    def rank(self) -> tuple[float, float]:
        """Return what is least for the best run."""
        last = self.losses[-1]
        return self.reached or math.inf, last if math.isfinite(last) else math.inf


def made(name: str, params: list[Tensor], lr: float) -> torch.optim.Optimizer:
    """Return an optimizer of the parameters, without weight decay."""
    cls = optimizers()[name]
    settings: dict[str, Any] = {**SETTINGS.get(name, {}), "lr": lr}
    signature = inspect.signature(cls)
    if "base" in signature.parameters:  # which takes the step with the learning rate
        return cls(params, base=torchopt.sgd(settings.pop("lr")), **settings)
    if "weight_decay" in signature.parameters:
        settings.setdefault("weight_decay", 0.0)
    return cls(params, **settings)


def takes_curvature(optimizer: Any) -> bool:
    """Whether an optimizer wants an estimate of the Hessian's diagonal now and then."""
    tx = getattr(optimizer, "transformation", None)
    return tx is not None and "hessian" in tx.slot_names()


def run(name: str, problem: Problem, lr: float, budget: int | None = None) -> Run:
    """Minimise, until the loss stays low enough or the gradients are used up."""
    params = [x.clone().requires_grad_() for x in problem.start()]
    optimizer: Any = made(name, params, lr)
    curvature = takes_curvature(optimizer)
    generator = torch.Generator().manual_seed(0)
    found = Run(lr, [0], [problem.whole(params).item()])
    count = step = 0

    def closure() -> Tensor:
        nonlocal count
        count += 1
        loss = problem.loss(params, step)
        for param, grad in zip(params, torch.autograd.grad(loss, params)):
            param.grad = grad
        return loss

    # what is low when they are used up has some more, to show that it stays
    while count < (budget or problem.budget) or found.losses[-1] <= problem.tolerance:
        extra = {}
        if curvature and step % CURVATURE_EVERY == 0:
            extra["hessian"] = torchopt.hutchinson_diagonal(
                lambda p: problem.loss(p, step),  # noqa: B023 - called at once
                params,
                generator=generator,
            )
            count += CURVATURE_COST
        optimizer.step(closure, **extra)
        step += 1
        if count < found.gradients[-1] * 1.06:
            continue
        loss = evaluated(optimizer, lambda: problem.whole(params).item())
        found.gradients.append(count)
        found.losses.append(loss)
        if all(x <= problem.tolerance for x in found.losses[-STAYS:]):
            found.reached = found.gradients[-STAYS]
            break
        if found.diverged:
            break
    if (score := problem.accuracy) is not None:
        found.accuracy = evaluated(optimizer, lambda: score(params))
    return found


@torch.no_grad()
def evaluated(optimizer: Any, measure: Callable[[], float]) -> float:
    """Measure at the parameters to evaluate with, where these are others than those to train."""
    swaps = isinstance(optimizer, torchopt.Optimizer)
    if swaps:
        optimizer.eval()
    value = measure()
    if swaps:
        optimizer.train()
    return value


def best(name: str, problem: Problem) -> Run:
    """Return the run from the best learning rate."""
    fixed = SETTINGS.get(name, {}).get("lr")
    if fixed is not None:
        trial = run(name, problem, fixed)
        return run(name, problem, CAREFUL * fixed) if trial.diverged else trial
    found: Run | None = None

    def attempt(lr: float) -> None:
        nonlocal found
        trial = run(name, problem, lr, found.gradients[-1] if found and found.reached else None)
        if found is None or trial.rank() < found.rank():
            found = trial

    for lr in DECADES:
        attempt(lr)
    assert found is not None
    middle = found.lr
    for factor in AROUND:
        attempt(float(f"{middle * factor:.1g}"))
    return found


def recorded() -> dict[str, Any]:
    """Return the committed numbers."""
    return json.loads(DATA.read_text(encoding="utf-8"))


def written(runs: Run) -> dict[str, Any]:
    """Return a run as it is committed, to three digits."""
    losses = [float(f"{x:.3g}") for x in runs.losses]
    content = {**vars(runs), "losses": losses}
    if runs.accuracy is not None:
        content["accuracy"] = round(runs.accuracy, 3)
    return {key: value for key, value in content.items() if value is not None}


def main(names: Sequence[str]) -> None:
    """Run some optimizers, or all, and write numbers and picture."""
    torch.set_num_threads(1)
    known = optimizers()
    if unknown := set(names) - known.keys():
        raise SystemExit(f"no optimizers of torchopt: {', '.join(sorted(unknown))}")
    found = recorded() if names else {}
    for name in names or known:
        found[name] = {key: written(best(name, problem)) for key, problem in PROBLEMS.items()}
        shown = (f"{key} {row.get('reached', '-')}" for key, row in found[name].items())
        print(f"{name:26}", *shown, sep="  ", flush=True)
    lines = []
    for name in sorted(found.keys() & known.keys(), key=str.lower):
        rows = (f'  "{key}": {json.dumps(row)}' for key, row in found[name].items())
        lines.append(f'"{name}": {{\n' + ",\n".join(rows) + "}")
    DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    import convergence_picture  # which needs matplotlib

    convergence_picture.draw()


if __name__ == "__main__":
    main(sys.argv[1:])
