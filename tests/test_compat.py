"""Scripts written for TorchOpt 0.7.3: old import paths, keywords and names, and what is absent."""

from __future__ import annotations

import importlib
import inspect
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close
from torch import nn

import torchopt
from torchopt import compat, pytree


ROWS = [
    (module, name, target, today)
    for module, names in compat.HERE.items()
    for name, (target, today) in names.items()
]
PAGE = "docs/coming_from/torchopt.md"


#: Public today, too: these show the names of today (test_completion.py).
SHOWN = {"torchopt.typing", "torchopt.diff.implicit", "torchopt.diff.zero_order"}


@pytest.mark.parametrize(("module", "name", "target", "today"), ROWS)
def test_each_row_of_the_table(module: str, name: str, target: str, today: str) -> None:
    """By import and by attribute an old path leads to the object that the table names."""
    wanted = getattr(importlib.import_module(target), today)
    scope: dict[str, Any] = {}
    exec(f"from {module} import {name} as imported", scope)
    assert scope["imported"] is wanted
    assert getattr(importlib.import_module(module), name) is wanted
    if module not in SHOWN:
        assert name in dir(importlib.import_module(module))


#: Where an attribute of a package is a function, which has the name of a module.
FUNCTIONS = {
    *("torchopt.schedule.polynomial", "torchopt.schedule.exponential_decay"),
    "torchopt.diff.zero_order",  # a module that can be called, as it was
}


@pytest.mark.parametrize("module", sorted(compat.HERE))
def test_old_modules_are_attributes(module: str) -> None:
    """``torchopt.optim.meta`` is there after ``import torchopt``, as are all old modules."""
    value: Any = torchopt
    for part in module.split(".")[1:]:
        value = getattr(value, part)
    is_function = callable(value)
    assert value is sys.modules[module] or is_function
    parent, _, last = module.rpartition(".")
    assert not is_function or last in compat.HERE.get(parent, {}) or module in FUNCTIONS


@pytest.mark.parametrize("path", sorted(compat.ABSENT))
def test_what_is_absent_says_where_to_look(path: str) -> None:
    """Three ways to ask for what 0.7.3 had and this version has not; ``hasattr`` still works."""
    module, _, name = path.rpartition(".")
    owner = importlib.import_module(module)
    assert not hasattr(owner, name)
    with pytest.raises(AttributeError, match=PAGE):
        getattr(owner, name)
    with pytest.raises(ImportError, match=PAGE):
        exec(f"from {module} import {name}", {})
    with pytest.raises(ImportError, match=PAGE):
        importlib.import_module(f"{path}.more")


def test_other_names_fail_as_everywhere() -> None:
    with pytest.raises(AttributeError, match="'torchopt' has no attribute 'nonsense'"):
        torchopt.nonsense  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("torchopt.nonsense")
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from torchopt.optim.meta import nonsense", {})
    with pytest.raises(AttributeError, match=PAGE):
        pytree.nonsense  # noqa: B018


FRESH = """
from torchopt.optim.meta import MetaAdam
import torchopt.transform.scale, torchopt.schedule
import torchopt
assert callable(torchopt.transform.scale), "a module in the place of a function"
assert torchopt.schedule is torchopt.schedules and callable(torchopt.schedules.polynomial)
assert torchopt.hook.zero_nan_hook and torchopt.pytree.tree_add and MetaAdam is torchopt.MetaAdam
import TorchOpt.optim.meta
from TorchOpt.optim import Adam
assert TorchOpt.base.identity is torchopt.identity and Adam is torchopt.Adam
assert TorchOpt.optim is torchopt.optim and TorchOpt.optim.meta.MetaAdam is MetaAdam
"""


def test_in_a_fresh_process() -> None:
    """The first import may be that of an old path."""
    subprocess.run([sys.executable, "-c", FRESH], check=True, timeout=120)


LATE = """
import sys, torchopt
assert not {"torchopt.schedules", "torchopt.transforms.hook"} & sys.modules.keys()
import torchopt.schedule
assert torchopt.schedule is torchopt.schedules is sys.modules["torchopt.schedule"]
assert torchopt.schedules.__spec__.name == "torchopt.schedules"
assert torchopt.hook.__name__ == "torchopt.transforms.hook"
"""


def test_what_was_renamed_is_imported_when_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_names_of_old_states_are_pickled() -> None:
    state = torchopt.base.EmptyState(), torchopt.transform.trace(0.9)
    again = pickle.loads(pickle.dumps(state))
    assert again == state
    assert type(again[0]) is torchopt.typing.EmptyState


# Arguments -------------------------------------------------------------------------------------


def test_old_arguments_of_scale_by_adam() -> None:
    tx = torchopt.transform.scale_by_adam(0.8, b2=0.99, eps=1e-6)
    assert tx == torchopt.scale_by_adam((0.8, 0.99), 1e-6)


@pytest.mark.parametrize("name", ["scale_by_adamax", "scale_by_radam"])
def test_old_arguments_of_scalings_with_two_betas(name: str) -> None:
    old, new = getattr(torchopt.transform, name), getattr(torchopt, name)
    assert old() == new((0.9, 0.999), 1e-6)
    assert old(0.8, b2=0.99, eps=1e-5) == new((0.8, 0.99), 1e-5)
    with pytest.warns(FutureWarning, match="moment_requires_grad"):
        old(moment_requires_grad=True)


def test_old_utilities_of_recipes() -> None:
    utils = torchopt.alias.utils
    tx = torchopt.chain(utils.flip_sign_and_add_weight_decay(0.1, True), utils.scale_by_neg_lr(0.5))
    params, grads = {"w": nonzero(3)}, {"w": nonzero(3)}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert_close(updates["w"], -0.5 * (-grads["w"] + 0.1 * params["w"]))


def test_impl_is_the_old_keyword_for_the_transformation() -> None:
    net, tx = nn.Linear(2, 1), torchopt.sgd(0.1)
    for optimizer in (
        torchopt.Optimizer(net.parameters(), impl=tx),
        torchopt.MetaOptimizer(net, impl=tx),
        torchopt.FuncOptimizer(impl=tx),
    ):
        assert optimizer.impl is tx
    with pytest.raises(TypeError, match="both tx= and impl="):
        torchopt.FuncOptimizer(tx=tx, impl=tx)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adadelta", "adamax", "radam"])
def test_moment_requires_grad_is_ignored_with_a_warning(name: str) -> None:
    """The warning points to the line of the script; the keyword is not in the signature."""
    recipe = getattr(torchopt, name)
    titles = {"sgd": "SGD", "adamw": "AdamW", "radam": "RAdam"}
    meta = f"Meta{titles.get(name, name.title())}"
    for make in (
        lambda: recipe(0.1, moment_requires_grad=True),
        lambda: getattr(torchopt, meta)(nn.Linear(2, 1), 0.1, moment_requires_grad=False),
    ):
        with pytest.warns(FutureWarning, match="moment_requires_grad") as caught:
            made = make()
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert PAGE in str(caught[0].message)
        assert getattr(made, "transformation", made) == recipe(0.1)
    assert "moment_requires_grad" not in inspect.signature(recipe).parameters


# Names on today's objects ------------------------------------------------------------------------


def test_module_detach_returns_its_argument() -> None:
    net = nn.Linear(2, 1)
    torchopt.MetaSGD(net, 0.1).step(net(nonzero(3, 2).float()).sum())
    assert torchopt.module_detach_(net) is net
    assert net.weight.is_leaf


def test_state_groups_are_the_extracted_states() -> None:
    net = nn.Linear(2, 1)
    inner = torchopt.MetaAdam(net, 0.1)
    inner.step(net(nonzero(3, 2).float()).square().sum())
    extracted = torchopt.extract_state_dict(inner)
    same = pytree.tree_map(
        lambda x, y: x is y or (x.dim() == 0 and x == y), extracted, tuple(inner.state_groups)
    )
    leaves = pytree.tree_leaves(same)
    assert len(leaves) >= 4
    assert all(leaves)


def test_the_empty_chain_is_the_identity_of_0_7_3() -> None:
    kind = torchopt.base.IdentityGradientTransformation
    assert isinstance(torchopt.identity(), kind)
    assert kind() == torchopt.identity()
    assert not isinstance(torchopt.adam(), kind)


def test_stateless_transformations_take_no_state() -> None:
    g = [nonzero(3)]
    tx = torchopt.chain(torchopt.clip_grad_value(0.5), torchopt.scale(-1.0))
    (u,), state = tx.update(g, state=None)
    assert_close(u, -g[0].clamp(-0.5, 0.5))
    for kept in (state, torchopt.base.EmptyState(), (torchopt.base.EmptyState(),) * 2):
        assert_close(tx.update(g, kept)[0][0], u)


@pytest.mark.parametrize(
    "tx",
    [
        torchopt.trace(0.9),
        torchopt.adam(),
        torchopt.scale_by_schedule(lambda count: 0.5),
        torchopt.scale_by_learning_rate(lambda count: 0.5),
    ],
)
def test_what_keeps_something_needs_its_state(tx: Any) -> None:
    with pytest.raises(TypeError, match=r"Write state = tx\.init\(params\)"):
        tx.update([nonzero(3)], None)


# Trees -----------------------------------------------------------------------------------------


def test_arithmetic_of_trees() -> None:
    x, y = ({"a": nonzero(2, 2), "b": (nonzero(3),)} for _ in range(2))
    a, b = x["a"], y["a"]
    for tree, wanted in (
        (pytree.tree_pos(x), a),
        (pytree.tree_neg(x), -a),
        (pytree.tree_add(x, y, x), a + b + a),
        (pytree.tree_add_scalar_mul(x, y), a + b),
        (pytree.tree_add_scalar_mul(x, y, 0.5), a + 0.5 * b),
        (pytree.tree_sub(x, y), a - b),
        (pytree.tree_sub_scalar_mul(x, y), a - b),
        (pytree.tree_sub_scalar_mul(x, y, 0.5), a - 0.5 * b),
        (pytree.tree_mul(x, y, y), a * b * b),
        (pytree.tree_scalar_mul(3.0, x), 3.0 * a),
        (pytree.tree_truediv(x, y), a / b),
        (pytree.tree_matmul({"a": a, "b": (a,)}, {"a": b, "b": (b,)}), a @ b),
    ):
        assert_close(tree["a"], wanted)
    leaves, spec = pytree.tree_flatten_as_tuple(x)
    assert isinstance(leaves, tuple)
    assert spec == pytree.tree_structure(x)
    product = (a * b).sum() + (x["b"][0] * y["b"][0]).sum()
    assert abs(pytree.tree_vdot_real(x, y) - product.item()) < 1e-12
    c, d = torch.complex(nonzero(3), nonzero(3)), torch.complex(nonzero(3), nonzero(3))
    assert abs(pytree.tree_vdot_real(c, d) - torch.vdot(c, d).real.item()) < 1e-12


def test_trees_of_futures() -> None:
    future: torch.futures.Future[int] = torch.futures.Future()
    later = future.then(lambda f: f.value() + 1)
    future.set_result(2)
    assert pytree.tree_wait({"a": later}) == {"a": 3}


def test_states_are_trees_whatever_the_namespace() -> None:
    """``tree_iter(state)`` of 0.7.3's scripts, and optree itself, see every slot."""
    optree = pytest.importorskip("optree")
    state = torchopt.adam().init({"w": nonzero(3), "b": nonzero(2)})
    for leaves in (list(pytree.tree_iter(state)), optree.tree_leaves(state)):
        assert [x.shape for x in leaves if x.dim()] == [(2,), (3,), (2,), (3,)]
    again = pytree.tree_map(lambda x: x.clone(), state)
    assert isinstance(again, torchopt.OptState)


def test_a_tree_without_parameters_has_a_state_that_fits() -> None:
    for params in ((), {}, (None,), {"a": (), "b": {"c": []}, "d": None}):
        for tx in (torchopt.adam(0.1), torchopt.sgd(0.1, momentum=0.9), torchopt.rmsprop(0.1)):
            updates, _ = tx.update(params, tx.init(params), params)
            assert updates == params


# Linear systems --------------------------------------------------------------------------------


def test_linalg_solves_with_matrices_and_functions() -> None:
    a, b = torch.randn(4, 4, dtype=torch.float64), nonzero(4)
    a = torch.eye(4, dtype=torch.float64) + 0.1 * a @ a.T
    wanted = torch.linalg.solve(a, b)
    for operator in (a, lambda v: a @ v):
        assert_close(
            torchopt.linalg.cg(operator, b, rtol=1e-13, M=torch.inverse(a)), wanted, times=10
        )
        terms = sum(torch.linalg.matrix_power(torch.eye(4) - 0.3 * a, k) @ b for k in range(7))
        assert_close(torchopt.linalg.ns(operator, b, 7, alpha=0.3), 0.3 * terms)
    inverse = torchopt.linalg.ns_inv(a, 200, alpha=0.3)
    assert_close(inverse, torch.linalg.inv(a), times=1e3)
    solver = torchopt.linear_solve.solve_cg(maxiter=100, rtol=1e-12, atol=0.0, ridge=0.1)
    assert isinstance(solver, torchopt.typing.LinearSolver)
    ridge = torch.linalg.solve(a + 0.1 * torch.eye(4, dtype=a.dtype), b)
    assert_close(solver(lambda v: a @ v, b), ridge, times=100)
