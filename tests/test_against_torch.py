"""Values: the three faces against ``torch.optim``, and against closed forms that need neither.

``torch.optim`` is an oracle for values only. Its ``differentiable=True`` is none for derivatives
(SGD detaches its first momentum buffer); those are tested in ``test_conformance.py``.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import F64, Case, every_formula_case, every_torch_case
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


pytestmark = pytest.mark.complete


STEPS = 30
DECAY = 0.93  # of the scheduled learning rate, per step


# The trajectory: two groups, a schedule, an unused parameter, one with an occasional gradient -----

Weights = dict[str, dict[str, Tensor]]


def initial_weights() -> Weights:
    torch.manual_seed(3)
    return {
        "body": {"w": nonzero(3, 4), "sometimes": nonzero(4)},
        "head": {"w": nonzero(4), "bias": nonzero(), "unused": nonzero(2)},
    }


def convex_losses() -> Iterator[Any]:
    """Yield the losses of the steps: least squares with new data each time, strongly convex."""
    generator = torch.Generator().manual_seed(11)
    for step in range(STEPS):
        x, z, y = (
            torch.randn(size, generator=generator, **F64) for size in ((8, 12), (8, 4), (8,))
        )

        def loss(weights: Weights, x: Tensor = x, z: Tensor = z, y: Tensor = y, step: int = step):
            body, head = weights["body"], weights["head"]
            prediction = x @ body["w"].flatten() + z @ head["w"] + head["bias"]
            if step % 3 == 1:
                prediction = prediction + z.flip(1) @ body["sometimes"]
            squares = sum(w.square().sum() for w in (body["w"], head["w"], head["bias"]))
            return (prediction - y).square().mean() + 0.05 * squares

        yield loss


def own_values(case: Case) -> dict[str, float]:
    """Return what the second group has of its own: its numbers differ from the first's."""
    found = {}
    for name in case.tunable:
        if name in case.algorithm.of_all_groups:
            found[name] = case.value(name)
            continue
        smaller = 0.9 * case.value(name)
        field, _, place = name.partition(".")
        spec = case.specs[field].of_element(int(place)) if place else case.specs[field]
        allowed = spec.allows(smaller)
        found[name] = smaller if allowed else 1.1 * case.value(name)
    return found


def decay_of(case: Case) -> float:
    """Return the factor of the schedule: 1 where the rate is read when a state begins.

    That is at the first gradient in ``torch.optim``, and with ``init`` in the functional API.
    """
    return 1.0 if "lr" in case.algorithm.read_once else DECAY


def scheduled(case: Case, lr: float) -> Any:
    return lambda count: lr * decay_of(case) ** count


def torch_trajectory(case: Case, cls: type, maximize: bool) -> tuple[list[Weights], Any, Weights]:
    """Return the weights after each step of an optimizer of ``torch.optim``'s kind."""
    weights = initial_weights()
    leaves = [p.requires_grad_() for group in weights.values() for p in group.values()]
    optimizer = cls(
        [
            {"params": list(weights["body"].values())},
            {"params": list(weights["head"].values()), **changed(case, own_values(case))},
        ],
        **case.kwargs,
        maximize=maximize,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: decay_of(case) ** epoch)
    trajectory = []
    for loss in convex_losses():
        optimizer.zero_grad()
        sign = -1 if maximize else 1
        (sign * loss(weights)).backward()
        optimizer.step()
        scheduler.step()
        trajectory.append(detached(weights))
    assert leaves[-1].grad is None
    return trajectory, optimizer, weights


def changed(case: Case, values: dict[str, Any]) -> dict[str, Any]:
    """Return only the arguments that differ from the row's own, for a parameter group."""
    arguments = case.arguments(values)
    return {name: value for name, value in arguments.items() if value != case.kwargs[name]}


def detached(weights: Weights) -> Weights:
    return {g: {n: p.detach().clone() for n, p in group.items()} for g, group in weights.items()}


def assert_trajectories(actual: list[Weights], expected: list[Weights]) -> None:
    assert len(actual) == len(expected) == STEPS
    for step, (a, e) in enumerate(zip(actual, expected), start=1):
        assert_close(a, e, what=f"step {step}: ")
    start = initial_weights()
    moved = {
        f"{g}.{n}": (expected[-1][g][n] - p).abs().max() for g in start for n, p in start[g].items()
    }
    assert moved.pop("head.unused") == 0
    assert all(distance > 1e-2 for distance in moved.values())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@every_torch_case
def test_object_oriented_face(case: Case, maximize: bool) -> None:
    expected, theirs, their_weights = torch_trajectory(case, case.torch_cls, maximize)
    actual, ours, our_weights = torch_trajectory(case, case.cls, maximize)
    assert_trajectories(actual, expected)
    for group, names in their_weights.items():
        for name, p in names.items():
            state = {k: v for k, v in theirs.state[p].items() if v is not None}
            own = ours.state[our_weights[group][name]]
            if state.get("step") == 0:  # Adagrad's begins in the constructor, ours at a gradient
                assert not own
                continue
            assert own.keys() == state.keys()
            for slot, value in state.items():
                assert_close(torch.as_tensor(own[slot], **F64), torch.as_tensor(value, **F64))


def functional_trajectory(case: Case, maximize: bool, inplace: bool) -> list[Weights]:
    own = own_values(case)
    values = {name: {"body": case.value(name), "head": own[name]} for name in case.tunable}
    values["lr"] = {group: scheduled(case, lr) for group, lr in values["lr"].items()}
    tx = case.recipe(**case.arguments(values), maximize=maximize)
    weights = initial_weights()
    state = tx.init(weights)
    trajectory = []
    for loss in convex_losses():
        leaves, spec = torch.utils._pytree.tree_flatten(weights)
        for leaf in leaves:
            leaf.requires_grad_()
        sign = -1 if maximize else 1
        grads = torch.autograd.grad(sign * loss(weights), leaves, allow_unused=True)
        grads = torch.utils._pytree.tree_unflatten(grads, spec)
        with torch.no_grad():
            updates, state = tx.update(grads, state, weights, inplace=inplace)
            weights = torchopt.apply_updates(weights, updates, inplace=inplace)
        trajectory.append(detached(weights))
    return trajectory


@pytest.mark.sampled(2)
@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "inplace"])
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@every_torch_case
def test_functional_face(case: Case, maximize: bool, inplace: bool) -> None:
    expected, _, _ = torch_trajectory(case, case.torch_cls, maximize)
    assert_trajectories(functional_trajectory(case, maximize, inplace), expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@every_torch_case
def test_differentiable_face(case: Case, maximize: bool) -> None:
    expected, _, _ = torch_trajectory(case, case.torch_cls, maximize)
    net = nn.ModuleDict(
        {group: nn.ParameterDict(names) for group, names in initial_weights().items()}
    )
    own = own_values(case)
    optimizer = torchopt.MetaOptimizer(
        [
            {"params": net["body"], "lr": scheduled(case, case.value("lr"))},
            {"params": net["head"], **changed(case, own), "lr": scheduled(case, own["lr"])},
        ],
        case.recipe(**case.kwargs, maximize=maximize),
    )
    actual = []
    for loss in convex_losses():
        sign = -1 if maximize else 1
        optimizer.step(sign * loss(net))
        actual.append(detached({group: dict(names.items()) for group, names in net.items()}))
    assert_trajectories(actual, expected)


# Closed forms -------------------------------------------------------------------------------------


def run(case: Case, p: Tensor, gradient: Any, steps: int, **changes: Any) -> Tensor:
    """Return a parameter after some pure steps along ``gradient(p)``."""
    tx = case.recipe(**{**case.kwargs, **changes})
    state = tx.init([p])
    for _ in range(steps):
        updates, state = tx.update([gradient(p)], state, [p], inplace=False)
        (p,) = torchopt.apply_updates([p], updates, inplace=False)
    return p


def numbers_of(case: Case) -> Any:
    """Return the numbers of a configuration; those that it does not give are 0."""
    return collections.defaultdict(float, case.kwargs)


@every_formula_case
def test_first_step(case: Case) -> None:
    p, g, k = nonzero(7), nonzero(7), numbers_of(case)
    decay = k["weight_decay"] * p
    if case.algorithm.decoupled_decay:
        direction = case.algorithm.formula.first(g, k) + decay
    else:
        direction = case.algorithm.formula.first(g + decay, k)
    assert_close(run(case, p, lambda p: g, 1), p - k["lr"] * direction)


@every_formula_case
def test_constant_gradient(case: Case) -> None:
    """Under one gradient for ever each algorithm has a closed form for any number of steps."""
    p, g, steps, k = nonzero(5), nonzero(5), 12, numbers_of(case)
    t = torch.arange(1.0, steps + 1, **F64)[:, None]
    expected = p - k["lr"] * case.algorithm.formula.constant(g, t, k).sum(0)
    without_decay = {"weight_decay": 0.0} if "weight_decay" in k else {}
    assert_close(run(case, p, lambda p: g, steps, **without_decay), expected)


SGD_ROWS = [
    {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
    {"momentum": 0.7, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
    {"momentum": 0.7, "dampening": 0.4, "weight_decay": 0.3, "nesterov": False},
    {"momentum": 0.8, "dampening": 0.0, "weight_decay": 0.2, "nesterov": True},
]


@pytest.mark.parametrize("row", SGD_ROWS, ids=lambda row: "-".join(str(v) for v in row.values()))
def test_sgd_on_a_quadratic_is_a_matrix_power(row: dict[str, Any]) -> None:
    """On ``p^T A p / 2`` a step multiplies (parameter, buffer) by a matrix: value and Jacobian."""
    lr, steps, n = 0.05, 20, 4
    mu, tau, lam, nesterov = row.values()
    root = nonzero(n, n)
    a, eye = root @ root.T / n + 0.1 * torch.eye(n, **F64), torch.eye(n, **F64)
    g = a + lam * eye  # the gradient is g @ p
    # b' = mu b + (1 - tau) g p, p' = p - lr b', or p - lr (g p + mu b') for Nesterov
    b_of_p, b_of_b = (1 - tau) * g, mu * eye
    ahead, keep = (mu, g) if nesterov else (1.0, 0 * g)
    later = torch.cat(
        [
            torch.cat([eye - lr * (keep + ahead * b_of_p), -lr * ahead * b_of_b], dim=1),
            torch.cat([b_of_p, b_of_b], dim=1),
        ]
    )
    first = torch.cat([eye - lr * (keep + ahead * g), g])  # dampening comes with the second step
    matrix = (torch.linalg.matrix_power(later, steps - 1) @ first)[:n]

    tx = torchopt.sgd(lr, **row)
    if mu == 0:
        matrix = torch.linalg.matrix_power(eye - lr * g, steps)

    def final(p: Tensor) -> Tensor:
        state = tx.init(p)
        for _ in range(steps):
            update, state = tx.update(a @ p, state, p, inplace=False)
            p = torchopt.apply_updates(p, update, inplace=False)
        return p

    start = nonzero(n)
    assert_close(final(start), matrix @ start)
    assert_close(torch.func.jacrev(final)(start), matrix)
    assert_close(torch.func.jacfwd(final)(start), matrix)


def test_adamw_without_gradient_decays_geometrically() -> None:
    p, lr, decay = nonzero(5), 0.1, 0.3
    tx = torchopt.adamw(lr, weight_decay=decay)
    state, q = tx.init(p), p
    for _ in range(10):
        update, state = tx.update(torch.zeros_like(q), state, q, inplace=False)
        q = torchopt.apply_updates(q, update, inplace=False)
    assert_close(q, p * (1 - lr * decay) ** 10)


def test_learning_rate_is_read_anew_at_every_step() -> None:
    """A live change of ``param_groups`` acts at once, in both object faces."""
    p = nn.Parameter(nonzero(3))
    start = p.detach().clone()
    optimizer = torchopt.SGD([p], lr=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert_close(p.detach(), start - 0.75)
