"""The functional face under torch.func and torch.compile."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from cases import every, every_case, named
from conftest import nonzero, nonzero_like
from tolerances import META_GRADIENT, assert_close, relative_error
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import torchopt
from torchopt.base import tree


MEMBERS = 4


def quartic(params: Any, x: Tensor) -> Tensor:
    """A loss that couples the parameters, with derivatives of every order."""
    return ((params["w"] @ x - params["b"]) ** 2).sum() + (params["w"] ** 4).sum() / 4


def start(*batch: int) -> dict[str, Tensor]:
    return {"w": nonzero(*batch, 2, 3), "b": nonzero(*batch, 2)}


def unroll(tx: torchopt.GradientTransformation, params: Any, x: Tensor, steps: int = 3) -> Any:
    """Return the parameters after some steps, by func.grad inside."""
    state = tx.init(params)
    for _ in range(steps):
        grads = grad(quartic)(params, x)
        updates, state = tx.update(grads, state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params


def outer(tx: torchopt.GradientTransformation, params: Any, x: Tensor, steps: int = 3) -> Tensor:
    params = unroll(tx, params, x, steps)
    return (params["w"] ** 2).sum() + params["b"].sum()


def member(tree: Any, index: int) -> Any:
    return pytree.tree_map(lambda leaf: leaf if leaf is None else leaf[index], tree)


# func.grad ----------------------------------------------------------------------------------------


@every_case
def test_func_grad_is_autograd(case: Any) -> None:
    params, x = start(), nonzero(3)
    found = grad(lambda p: outer(case.tx(), p, x))(params)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    expected = torch.autograd.grad(outer(case.tx(), leaves, x), list(leaves.values()))
    assert_close(found, dict(zip(leaves, expected)))


@every_case
def test_func_grad_of_every_hyperparameter(case: Any) -> None:
    """Against central differences, in float64."""
    params, x = start(), nonzero(3)
    values = case.tensors()
    found = grad(lambda h: outer(case.tx(h), params, x))(values)
    for name, value in values.items():
        h = 1e-3 * value
        at = [outer(case.tx({**values, name: value + k * h}), params, x) for k in (-2, -1, 1, 2)]
        expected = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)
        noise = 64 * torch.finfo(torch.float64).eps * at[0].abs() / h.abs()  # of differences
        assert (found[name] - expected).abs() <= META_GRADIENT * expected.abs() + noise, name


def test_second_derivatives_nest() -> None:
    tx, params, x = torchopt.adam(0.1), start(), nonzero(3)

    def slope(b: Tensor) -> Tensor:
        return grad(lambda c: outer(tx, {"w": params["w"], "b": c}, x))(b).sum()

    found = grad(slope)(params["b"])
    h = 1e-5
    rows = h * torch.eye(2, dtype=torch.float64)
    expected = torch.stack(
        [(slope(params["b"] + e) - slope(params["b"] - e)) / (2 * h) for e in rows]
    )
    assert relative_error(found, expected) < 1e-5


# vmap: an ensemble of optimizers ------------------------------------------------------------------


@every_case
def test_vmap_is_a_loop_over_members(case: Any) -> None:
    """Each member has parameters, a state and a learning rate of its own."""
    params = start(MEMBERS)
    lr = 0.05 * (1 + torch.rand(MEMBERS, dtype=torch.float64))
    singles = [member(params, i) for i in range(MEMBERS)]
    state = vmap(case.tx().init)(params)
    states = [case.tx().init(p) for p in singles]

    def step(lr: Any, grads: Any, state: Any, params: Any) -> Any:
        tx = case.tx({"lr": lr})
        updates, state = tx.update(grads, state, params, inplace=False)
        return torchopt.apply_updates(params, updates, inplace=False), state

    for _ in range(3):
        grads = nonzero_like(params)
        params, state = vmap(step)(lr, grads, state, params)
        for i in range(MEMBERS):
            singles[i], states[i] = step(lr[i], member(grads, i), states[i], singles[i])
    assert state.step.tolist() == [3] * MEMBERS  # a leaf, as everything in a state
    for i in range(MEMBERS):
        assert_close(member(params, i), singles[i])
        assert_close(member(state.slots, i), states[i].slots)


@every_case
def test_vmap_of_grad_through_the_steps(case: Any) -> None:
    params, xs = start(MEMBERS), nonzero(MEMBERS, 3)
    tx = case.tx()
    found = vmap(grad(lambda p, x: outer(tx, p, x)))(params, xs)
    for i in range(MEMBERS):
        expected = grad(lambda p, x: outer(tx, p, x))(member(params, i), xs[i])
        assert_close(member(found, i), expected, times=10)


def test_vmap_over_every_hyperparameter_of_adam() -> None:
    tx_of = lambda h: torchopt.adamw(h[0], (h[1], h[2]), h[3], h[4])  # noqa: E731
    h = torch.tensor([[0.1, 0.9, 0.99, 1e-3, 0.1], [0.2, 0.8, 0.9, 1e-2, 0.3]], dtype=torch.float64)
    params, x = start(), nonzero(3)
    found = vmap(lambda row: outer(tx_of(row), params, x))(h)
    assert_close(found, torch.stack([outer(tx_of(row), params, x) for row in h]))


def test_vmap_with_inplace_changes_the_ensemble_in_place() -> None:
    tx, params = torchopt.sgd(0.1, momentum=0.9), {"w": nonzero(MEMBERS, 3)}
    before = params["w"].clone()
    state = vmap(tx.init)(params)

    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return torchopt.apply_updates(params, updates), state

    grads = nonzero_like(params)
    result, state = vmap(step)(grads, state, params)
    assert_close(result["w"], before - 0.1 * grads["w"])
    assert_close(params["w"], result["w"])
    assert_close(state.momentum_buffer, grads)


def test_vmap_clips_each_member_by_its_own_norm() -> None:
    tx, grads = torchopt.clip_grad_norm(1.0), start(MEMBERS)
    grads = {
        name: g * torch.logspace(-1, 1, MEMBERS).reshape(-1, *[1] * (g.dim() - 1)).double()
        for name, g in grads.items()
    }
    found = vmap(lambda g: tx.update(g, tx.init(g), inplace=False)[0])(grads)
    norms = []
    for i in range(MEMBERS):
        single = member(grads, i)
        assert_close(member(found, i), tx.update(single, tx.init(single), inplace=False)[0])
        norms.append(sum(float(g.square().sum()) for g in single.values()) ** 0.5)
    assert min(norms) < 1 < max(norms)


def test_vmap_with_masked_weight_decay() -> None:
    tx = torchopt.adamw(0.1, weight_decay=0.5, mask={"w": True, "b": False})
    params = start(MEMBERS)
    grads, state = nonzero_like(params), vmap(tx.init)(params)
    updates, state = vmap(lambda g, s, p: tx.update(g, s, p, inplace=False))(grads, state, params)
    for i in range(MEMBERS):
        single = member(params, i)
        expected, _ = tx.update(member(grads, i), tx.init(single), single, inplace=False)
        assert_close(member(updates, i), expected)
    assert_close(updates["b"], -0.1 * grads["b"].sign(), times=1e5)


# Forward mode -------------------------------------------------------------------------------------


def _arguments(case: Any) -> tuple[Any, Any]:
    """Return a function of gradients, parameters and slots, and a point after some updates."""
    tx, params = case.tx(), start()
    state = tx.init(params)
    for _ in range(1 if case.algorithm.may_rest else 2):
        _, state = tx.update(nonzero_like(params), state, params, inplace=False)

    leaves, spec = pytree.tree_flatten(state.slots)

    def function(point: Any) -> Any:
        grads, params, present = point
        rest = iter(present)
        slots = pytree.tree_unflatten([x if x is None else next(rest) for x in leaves], spec)
        given = torchopt.OptState(state.step, slots, state.counters)
        updates, new = tx.update(grads, given, params, inplace=False)
        return torchopt.apply_updates(params, updates, inplace=False), _present(new.slots)

    return function, (nonzero_like(params), params, _present(state.slots))


def _present(slots: Any) -> list[Tensor]:
    """Return the slots that there are, which not every parameter has."""
    return [x for x in pytree.tree_leaves(slots) if x is not None]


def _flat(value: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in pytree.tree_leaves(value)])


@every_case
def test_jvp_is_the_directional_derivative(case: Any) -> None:
    function, point = _arguments(case)
    direction = nonzero_like(point)
    _, found = jvp(function, (point,), (direction,))
    h = 1e-6
    moved = [
        function(pytree.tree_map(lambda x, d: x + s * h * d, point, direction))  # noqa: B023
        for s in (1, -1)
    ]
    expected = (_flat(moved[0]) - _flat(moved[1])) / (2 * h)
    assert relative_error(_flat(found), expected) < META_GRADIENT


@every_case
def test_forward_and_reverse_mode_are_transposes(case: Any) -> None:
    function, point = _arguments(case)
    direction = nonzero_like(point)
    value, pushed = jvp(function, (point,), (direction,))
    _, pull = vjp(function, point)
    weights = nonzero_like(value)
    (pulled,) = pull(weights)
    assert_close(_flat(pulled) @ _flat(direction), _flat(weights) @ _flat(pushed), times=100)


@every_case
def test_jacobians_of_the_unrolled_loop_agree(case: Any) -> None:
    tx, params, x = case.tx(), start(), nonzero(3)

    def function(b: Tensor) -> Tensor:
        steps = 2 + case.algorithm.rests
        return unroll(tx, {"w": params["w"], "b": b}, x, steps)["w"].reshape(-1)

    reverse = jacrev(function)(params["b"])
    assert reverse.shape == (6, 2)
    assert (reverse.abs().max() > 1e-6) != case.flat("gradients")
    assert_close(jacfwd(function)(params["b"]), reverse, times=100)


# torch.compile ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled_steps(
    tx: torchopt.GradientTransformation, backend: Any, tensor_step: bool = False, steps: int = 6
) -> list[int]:
    """Compare eager and compiled updates; return the number of graphs after each step."""
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def update(grads: Any, state: Any, params: Any) -> Any:
        return tx.update(grads, state, params, inplace=False)

    params = start()
    state = tx.init(params)
    if tensor_step:
        state = torchopt.OptState(torch.tensor(0), state.slots, state.counters)
    twin, graphs = state, []
    for _ in range(steps):
        grads = nonzero_like(params)
        updates, state = update(grads, state, params)
        expected, twin = tx.update(grads, twin, params, inplace=False)
        assert_close(updates, expected, times=10)
        assert_close(state.slots, twin.slots, times=10)
        assert state.step == twin.step
        params = torchopt.apply_updates(params, updates, inplace=False)
        graphs.append(counter.frame_count)
    return graphs


def counted(case: Any) -> Any:
    """The compiler sees counters and slots of other shapes, and of all others the step only."""
    return case.kind.has_counters, bool(case.kind.other_shapes)


@every(lambda case: True, each=counted)
def test_update_compiles_in_full_graph(case: Any) -> None:
    """One graph for the first step and one for all later ones, whatever their number.

    Counters are numbers at first and tensors then, and a warm-up of three steps ends. What is done
    at each second or third step makes for another graph when it is due again.
    """
    warms_up = any("warmup" in name for name in case.kwargs)  # whose end is behind a branch
    graphs = _compiled_steps(case.tx(), "aot_eager")
    more = max(int(case.kind.has_counters), 2 * warms_up)
    more += case.kwargs.get(case.algorithm.occasional, 1) - 1
    # torch takes a float64 number on the CPU for one of Python's, and begins anew when it is none
    anew = int(any(shape(torch.Size((2, 3))) == () for shape in case.algorithm.shapes.values()))
    assert 1 <= graphs[0] <= 1 + anew
    assert graphs[2 + more :] == graphs[1 + more : 2 + more] * (4 - more)
    assert graphs[-1] <= 2 + 2 * more + anew


def test_one_graph_with_a_tensor_for_the_step() -> None:
    assert _compiled_steps(torchopt.adam(0.1), "aot_eager", tensor_step=True) == [1] * 6


#: Each kind of hyperparameter alone is left to ``make test-all``.
ALONE = {
    "clip": lambda: torchopt.chain(torchopt.clip_grad_norm(0.5), torchopt.adam(0.1)),
    "schedule": lambda: torchopt.adam(torchopt.schedules.linear(0.1, 0.0, 4)),
    "cosine-schedule": lambda: torchopt.sgd(torchopt.schedules.cosine_decay(0.1, 4)),
    "tensor-lr": lambda: torchopt.sgd(torch.tensor(0.1, dtype=torch.float64), momentum=0.9),
    "lr-per-parameter": lambda: torchopt.sgd({"w": 0.1, "b": 0.2}),
    "masked": lambda: torchopt.adamw(0.1, mask={"w": True, "b": False}),
}
TOGETHER = {
    "clip-masked-schedule": lambda: torchopt.chain(
        torchopt.clip_grad_norm(0.5),
        torchopt.adamw(torchopt.schedules.linear(0.1, 0.0, 4), mask={"w": True, "b": False}),
    ),
    "tensor-and-schedule-by-parameter": lambda: torchopt.sgd(
        {
            "w": torch.tensor(0.1, dtype=torch.float64),
            "b": torchopt.schedules.cosine_decay(0.1, 4),
        },
        momentum=0.9,
    ),
}


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(make, id=name) for name, make in TOGETHER.items()),
        *(pytest.param(m, id=n, marks=pytest.mark.thorough) for n, m in ALONE.items()),
    ],
)
def test_update_compiles_with_every_kind_of_hyperparameter(make: Any) -> None:
    graphs = _compiled_steps(make(), "eager")
    assert graphs[-1] <= (2 if tree._COMPILER_KNOWS_OPTREE else 3)  # torch 2.6 makes one more


def test_an_inplace_step_compiles() -> None:
    tx = torchopt.adamw(0.1, weight_decay=0.1)

    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return torchopt.apply_updates(params, updates), state

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    params = start()
    twins = {name: p.clone() for name, p in params.items()}
    state, twin = tx.init(params), tx.init(params)
    for _ in range(3):
        grads = nonzero_like(params)
        result, state = compiled(grads, state, params)
        _, twin = step(grads, twin, twins)
    assert result["w"] is params["w"]
    assert_close(params, twins)


def test_an_unrolled_loop_compiles_with_its_derivative() -> None:
    tx, params, x = torchopt.adam(0.1), start(), nonzero(3)
    function = grad(lambda p, x: outer(tx, p, x, steps=2))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_close(compiled(params, x), function(params, x), times=10)
        params, x = start(), nonzero(3)


@pytest.mark.parametrize(
    "tensor_step",
    [
        pytest.param(False, id="numbers", marks=pytest.mark.thorough),  # two graphs take long
        pytest.param(True, id="tensor"),
    ],
)
def test_update_compiles_with_inductor(tensor_step: bool) -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("the default backend needs a C++ compiler on the path")
    # old compilers make a graph of its own for a count of 1, too
    most = 2 if tree._COMPILER_KNOWS_OPTREE else 3
    graphs = _compiled_steps(named("adamw").tx(), "inductor", tensor_step, steps=4)
    assert graphs[-1] <= (1 if tensor_step else most)
