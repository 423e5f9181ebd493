"""Reading and setting by name, in states, transformations and optimizers; hyperparameters there."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import META_GRADIENT, assert_close, relative_error

import torchopt
from torchopt import schedules


F64 = torch.float64


def start() -> dict[str, torch.Tensor]:
    return {"w": nonzero(2, 3), "b": nonzero(3)}


# tree_get and tree_set ----------------------------------------------------------------------------


def test_slots_counters_and_the_step_count_of_a_state() -> None:
    tx, p = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.nadam(0.1)), start()
    _, state = tx.update(start(), tx.init(p), p)
    assert torchopt.tree_get(state, "exp_avg") is state.exp_avg
    assert torchopt.tree_get(state, "mu_product") == state.mu_product
    assert torchopt.tree_get(state, "step") == 1
    assert torchopt.tree_get(state, "momentum_buffer") is None
    assert torchopt.tree_get(state, "momentum_buffer", 3) == 3


def test_a_state_set_by_name_is_used_and_the_old_one_stays() -> None:
    tx, p, g = torchopt.adam(0.1), start(), start()
    _, state = tx.update(g, tx.init(p), p)
    first = start()
    new = torchopt.tree_set(state, exp_avg=first, step=4)
    assert new.exp_avg is first
    assert (new.step, state.step) == (4, 1)
    assert state.exp_avg is not first
    updates, _ = tx.update(g, new, p, inplace=False)
    m = {k: 0.9 * first[k] + 0.1 * g[k] for k in p}
    v = {k: 0.999 * state.exp_avg_sq[k] + 0.001 * g[k] ** 2 for k in p}
    expected = {k: -0.1 * m[k] / (1 - 0.9**5) / ((v[k] / (1 - 0.999**5)).sqrt() + 1e-8) for k in p}
    assert_close(updates, expected, times=10)


def test_hyperparameters_of_a_transformation() -> None:
    tx = torchopt.MultiSteps(
        torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adamw(0.1, weight_decay=0.3)), 2
    )
    assert torchopt.tree_get(tx, "lr") == 0.1
    assert torchopt.tree_get(tx, "betas") == (0.9, 0.999)
    new = torchopt.tree_set(tx, lr=0.5, max_norm=2.0)
    assert (torchopt.tree_get(new, "lr"), torchopt.tree_get(new, "max_norm")) == (0.5, 2.0)
    assert torchopt.tree_get(tx, "lr") == 0.1
    changed = torchopt.chain(torchopt.clip_grad_norm(2.0), torchopt.adamw(0.5, weight_decay=0.3))
    assert new == torchopt.MultiSteps(changed, 2)
    with pytest.raises(ValueError, match="lr must be >= 0, got -1"):
        torchopt.tree_set(tx, lr=-1.0)


def test_several_of_a_name() -> None:
    tx = torchopt.named_chain(("a", torchopt.trace(0.5)), ("b", torchopt.trace(0.9)))
    state = tx.init(start())
    with pytest.raises(KeyError, match=r"2 values called 'momentum'.*filtering="):
        torchopt.tree_get(tx, "momentum")
    places = torchopt.tree_get_all_with_path(state, "momentum_buffer")
    assert [path for path, _ in places] == [("a.momentum_buffer",), ("b.momentum_buffer",)]
    found = torchopt.tree_get(state, "a.momentum_buffer")
    only = torchopt.tree_get(state, "momentum_buffer", filtering=lambda path, x: "a." in path[-1])
    assert only is found
    assert torchopt.tree_get(torchopt.sgd(0.1, weight_decay=0.2), "weight_decay") == 0.2
    new = torchopt.tree_set(tx, lambda path, value: value == 0.5, momentum=0.7)
    assert new.hyperparameters()["a.momentum"] == 0.7
    assert new.hyperparameters()["b.momentum"] == 0.9


@pytest.mark.parametrize("face", ["object-oriented", "differentiable"])
def test_states_of_the_other_faces(face: str) -> None:
    net = torch.nn.Linear(3, 1, bias=False)
    if face == "differentiable":
        optimizer: Any = torchopt.MetaAdam(net, lr=0.1)
        optimizer.step(net.weight.sum())
    else:
        optimizer = torchopt.Adam(net.parameters(), lr=0.1)
        net.weight.grad = torch.ones(1, 3)
        optimizer.step()
    saved = optimizer.state_dict()
    assert torchopt.tree_get(optimizer, "lr") == torchopt.tree_get(saved, "lr") == 0.1
    moments = torchopt.tree_get(saved, "exp_avg")
    assert_close(moments, torch.full((1, 3), 0.1))
    optimizer.load_state_dict(torchopt.tree_set(saved, lr=0.7))
    assert optimizer.param_groups[0]["lr"] == 0.7
    with pytest.raises(TypeError, match=r"optimizer.param_groups\[0\]\['lr'\] = "):
        torchopt.tree_set(optimizer, lr=0.7)


def test_other_trees_keep_their_kinds() -> None:
    Point = collections.namedtuple("Point", ["x", "y"])
    counts = collections.defaultdict(int, {"a": 1})
    tree = {"p": Point(1, [counts, 2]), "q": (3,)}
    assert torchopt.tree_get(tree, "y")[1] == 2
    new = torchopt.tree_set(tree, x=5, a=6)
    assert new == {"p": Point(5, [{"a": 6}, 2]), "q": (3,)}
    assert new["p"].y[0]["missing"] == 0
    assert tree["p"].x == 1
    assert new["q"] is tree["q"]


def test_what_is_not_there_is_not_set() -> None:
    with pytest.raises(KeyError, match="There is nothing called 'rate' in"):
        torchopt.tree_set(torchopt.sgd(0.1), rate=0.5)


# Hyperparameters in the state ---------------------------------------------------------------------


def test_the_state_has_what_the_last_update_used() -> None:
    """As in Optax 0.2.8: ``inject_hyperparams(sgd)(learning_rate=lambda count: count)``."""
    tx = torchopt.inject_hyperparams(torchopt.sgd)(lr=lambda count: 1.0 * count)
    g = [torch.ones(1)]
    state, found, rates = tx.init(g), [], []
    for _ in range(3):
        u, state = tx.update(g, state, g, inplace=False)
        found.append(u[0].item())
        rates.append(torchopt.tree_get(state, "lr"))
    assert (found, rates) == ([0.0, -1.0, -2.0], [0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchopt.sgd(schedules.linear(0.3, 0.1, 3), momentum=0.9, weight_decay=0.1),
        lambda: torchopt.nadam(0.1),
        lambda: torchopt.adamw(schedules.linear(0.3, 0.1, 3), weight_decay=0.3),
        lambda: torchopt.schedule_free_sgd(0.3),
    ],
    ids=["sgd", "nadam", "adamw", "schedule-free"],
)
def test_updates_are_the_same_with_hyperparameters_in_the_state(make: Any) -> None:
    p = q = start()
    tx, other = make(), torchopt.inject_hyperparams(make())
    state, kept = tx.init(p), other.init(q)
    for _ in range(4):
        g = start()
        p, state = tx.apply_gradients(g, state, p, inplace=False)
        q, kept = other.apply_gradients(g, kept, q, inplace=False)
        assert_close(q, p)
    assert_close(other.eval_params(kept, q), tx.eval_params(state, p))
    assert torchopt.tree_get(kept, "lr") is not None


def test_a_hyperparameter_in_the_state_is_set_and_learned() -> None:
    tx, p, g = torchopt.inject_hyperparams(torchopt.sgd(0.1, momentum=0.5)), start(), start()

    def trained(rate: Any) -> Any:
        state, params = torchopt.tree_set(tx.init(p), lr=rate), p
        for _ in range(3):
            params, state = tx.apply_gradients(
                {k: x.sin() + g[k] for k, x in params.items()}, state, params, inplace=False
            )
        return sum(x.square().sum() for x in params.values())

    rate = torch.tensor(0.3, dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(trained(rate), rate)
    expected = (trained(0.3 + 1e-6) - trained(0.3 - 1e-6)) / 2e-6
    assert relative_error(found, expected) < META_GRADIENT


def test_inject_hyperparams_expects_a_transformation_or_a_recipe() -> None:
    with pytest.raises(TypeError, match="inject_hyperparams"):
        torchopt.inject_hyperparams(0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="inject_hyperparams"):
        torchopt.inject_hyperparams(torchopt.SGD)  # pyright: ignore[reportArgumentType]
