"""The parts of the experiment on MAML in reinforcement learning: families, training, tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import torchopt
from common.environments import best_navigation_return, gymnasium, np
from common.maml_rl_exact import expected_return, optimal_return
from common.maml_rl_learning import (
    Advantages,
    CategoricalPolicy,
    GaussianPolicy,
    Learner,
    Params,
    Policy,
    for_each_task,
    roll_out,
)


#: Inner learning rates that the agents without meta-training may choose from.
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
CHOICE_TASKS = 40
LOG_EVERY = 10


@dataclass(frozen=True)
class Settings:
    """What determines the numbers of one family of tasks."""

    family: str
    hidden: int
    horizon: int
    trajectories: int
    meta_batch: int
    iterations: int
    inner_lr: float
    outer_lr: float
    discount: float
    trace: float
    estimator: str
    test_tasks: int
    test_steps: int
    device: str


class Family:
    """A family of tasks, its policy and its oracle, for one seed.

    Args:
        settings: See :class:`Settings`.
        seed: Of everything random.
    """

    names = {"tabular": "torchopt/TabularMDP-v0", "navigation": "torchopt/PointNavigation-v0"}

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.device = torch.device(settings.device)
        self.tabular = settings.family == "tabular"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * seed)
            self.policy = self._policy().to(self.device)
        advantages = Advantages(settings.discount, settings.trace)
        self.learner = Learner(self.policy, advantages, settings.estimator, settings.inner_lr)

    def _policy(self) -> Policy:
        width = self.settings.hidden
        if self.tabular:
            return CategoricalPolicy(10, 5, (width,))
        return GaussianPolicy(2, 2, (width, width), spread=0.1)

    def initial(self) -> Params:
        """Return the initial parameters, the same for every method."""
        return {name: p.detach().clone() for name, p in self.policy.named_parameters()}

    def stream(self, number: int, tasks: int, trajectories: int | None = None) -> Stream:
        """Return a source of tasks and trajectories with its own randomness."""
        copies = tasks * (trajectories or self.settings.trajectories)
        name = self.names[self.settings.family]
        env = gymnasium.make_vec(name, num_envs=copies, horizon=self.settings.horizon)
        return Stream(env.unwrapped, self, tasks, 1000 * self.seed + number)

    def best(self, tasks: Any) -> Tensor:
        """Return the highest return that is possible for who knows the task, ``[tasks]``."""
        if self.tabular:
            transitions, rewards = (torch.as_tensor(x) for x in tasks)
            return optimal_return(transitions, rewards, self.settings.horizon)
        return torch.as_tensor(best_navigation_return(tasks, self.settings.horizon))


class Stream:
    """Tasks and trajectories of one family, with randomness of its own."""

    def __init__(self, env: Any, family: Family, count: int, seed: int) -> None:
        self.env, self.family, self.count = env, family, count
        self.tasks_generator = np.random.default_rng(seed)
        self.actions_generator = torch.Generator(family.device).manual_seed(seed)
        env.reset(seed=seed)

    def tasks(self) -> Any:
        """Draw tasks."""
        return self.env.sample_tasks(self.count, self.tasks_generator)

    def roll_out(self, tasks: Any, params: Params) -> Any:
        """Let adapted policies act in their tasks."""
        return roll_out(self.env, tasks, self.family.policy, params, self.actions_generator)


# Training ---------------------------------------------------------------------------------------


def meta_train(
    family: Family, inner_step: bool, report: Callable[[int, float], None]
) -> tuple[Params, list[dict[str, float]]]:
    """Train initial parameters: by MAML, or for the mean return of all tasks (no inner step).

    Returns:
        The parameters, and some iterations' returns before and after the inner step.
    """
    settings = family.settings
    params = {name: p.requires_grad_() for name, p in family.initial().items()}
    outer = torchopt.Adam(list(params.values()), lr=settings.outer_lr)
    stream = family.stream(1, settings.meta_batch)
    log = []
    for iteration in range(1, settings.iterations + 1):
        tasks = stream.tasks()
        adapted = for_each_task(params, stream.count)
        batch = stream.roll_out(tasks, adapted)
        before = batch.returns.mean().item()
        if inner_step:
            adapted = family.learner.adapt(adapted, batch)
            batch = stream.roll_out(tasks, adapted)
        outer.zero_grad()
        family.learner.outer_loss(adapted, batch).backward()
        outer.step()
        after = batch.returns.mean().item()
        report(iteration, after)
        if iteration % LOG_EVERY == 0:
            log.append({"iteration": iteration, "before": before, "after": after})
    return {name: p.detach() for name, p in params.items()}, log


# Tests ------------------------------------------------------------------------------------------


def adaptation(
    family: Family, params: Params, lr: float, stream: Stream, steps: int
) -> Iterator[tuple[Any, Params, Any]]:
    """Yield tasks, parameters and trajectories after 0 to ``steps`` inner steps on new tasks."""
    tasks = stream.tasks()
    adapted = for_each_task(params, stream.count)
    for step in range(steps + 1):
        batch = stream.roll_out(tasks, adapted)
        yield tasks, adapted, batch
        if step < steps:
            adapted = family.learner.adapt(adapted, batch, lr)
            adapted = {name: p.detach() for name, p in adapted.items()}


def measured(family: Family, params: Params, rates: Sequence[float]) -> dict[str, Any]:
    """Return mean returns on unseen tasks by number of inner steps, and the highest possible.

    Args:
        family: The tasks.
        params: Initial parameters.
        rates: The inner learning rate of runs of 1, 2, ... steps.
    """
    runs = {lr: _returns(family, params, lr, 2, family.settings.test_tasks) for lr in set(rates)}
    returns, best = runs[rates[0]]
    returns = [returns[0], *(runs[lr][0][step] for step, lr in enumerate(rates, 1))]
    return {"returns": returns, "best": best, "rates": list(rates)}


def best_rates(family: Family, params: Params) -> list[float]:
    """Return the best inner learning rate for runs of 1, 2, ... steps, on training tasks."""
    tasks = min(CHOICE_TASKS, family.settings.test_tasks)
    runs = {lr: _returns(family, params, lr, 3, tasks)[0] for lr in RATES}
    steps = range(1, family.settings.test_steps + 1)
    return [max(RATES, key=lambda lr, k=step: runs[lr][k]) for step in steps]


def _returns(
    family: Family, params: Params, lr: float, number: int, tasks: int
) -> tuple[list[float], float]:
    """Return mean returns by number of steps and the highest possible, on a stream of tasks."""
    returns, best = [], float("nan")
    stream = family.stream(number, tasks)
    for drawn, _, batch in adaptation(family, params, lr, stream, family.settings.test_steps):
        returns.append(batch.returns.double().mean().item())
        best = family.best(drawn).mean().item()
    return returns, best


def paths(family: Family, params: Params, lr: float, goals: int = 8) -> dict[str, Any]:
    """Return the ways that the means of the policies take before and after one step."""
    stream = family.stream(4, goals)
    ways: list[Any] = []
    for tasks, adapted, _ in adaptation(family, params, lr, stream, 1):
        silent = dict(adapted)
        silent["log_spread"] = torch.full_like(adapted["log_spread"], -20.0)
        walk = stream.roll_out(tasks, silent).observations[:, 0]
        ways.append(walk.tolist())
    return {"goals": tasks.places.tolist(), "before": ways[0], "after": ways[1]}


def meta_gradient_errors(
    family: Family, counts: tuple[int, ...], tasks: int = 4
) -> list[dict[str, float]]:
    """Compare meta-gradients estimated from samples with the exact ones, on tabular processes.

    The return after adaptation is computed exactly; only the inner step is estimated, from
    ``count`` trajectories and without bootstrapping. So an estimator whose second derivative is
    right has an error that vanishes as ``count`` grows.

    Returns:
        Rows with ``count`` and the relative errors by name of the estimator.
    """
    settings = family.settings
    unbiased = replace(family.learner.advantages, trace=1.0)
    params = {name: 3 * p for name, p in family.initial().items()}  # not too near to uniform
    params = {n: p.clone().requires_grad_() for n, p in for_each_task(params, tasks).items()}
    leaves = list(params.values())
    rows = []
    for count in counts:
        stream = family.stream(5, tasks, count)
        drawn = stream.tasks()
        processes = [torch.as_tensor(x, dtype=torch.float32, device=family.device) for x in drawn]

        def value(weights: Params, processes: list[Tensor] = processes) -> Tensor:
            policy = torch.stack([_table(family, weights, k) for k in range(tasks)])
            return expected_return(*processes, policy, settings.horizon, settings.discount).sum()

        slopes = torch.autograd.grad(value(params), leaves, create_graph=True)
        stepped = [p + settings.inner_lr * slope for p, slope in zip(leaves, slopes)]
        exact = _flat(torch.autograd.grad(value(dict(zip(params, stepped))), leaves))
        batch = stream.roll_out(drawn, params)
        row: dict[str, float] = {"count": count}
        for estimator in ("dice", "surrogate"):
            learner = replace(family.learner, estimator=estimator, advantages=unbiased)
            estimated = _flat(torch.autograd.grad(value(learner.adapt(params, batch)), leaves))
            row[estimator] = ((estimated - exact).norm() / exact.norm()).item()
        rows.append(row)
    return rows


def _table(family: Family, weights: Params, task: int) -> Tensor:
    """Return the probabilities ``[states, actions]`` of the policy of one task."""
    own = {name: p[task] for name, p in weights.items()}
    states = torch.eye(10, device=family.device)
    return functional_call(family.policy, own, (states,)).softmax(-1)


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
