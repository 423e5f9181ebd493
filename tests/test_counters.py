"""Counters: numbers of a state beside its slots, in every API, exact in every checkpoint."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from adapting import assert_derivative
from conftest import nonzero, nonzero_like
from refusing import refused
from tolerances import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import vmap
from torch.utils import _pytree as pytree

import torchopt
from torchopt import Counter, Slot


# Counters -----------------------------------------------------------------------------------------


@torchopt.transformation
class Weighted(torchopt.ElementwiseTransformation):
    """Gradients times the share of this step among the weights of all steps."""

    growth: float = torchopt.hyper(1.5, gt=0)

    slots = (Slot("total"),)
    counters = (Counter("weight_sum", 0.0), Counter("product", 1.0))
    uses_step = True

    def count(self, t: Any, *, weight_sum: Any, product: Any, growth: Any) -> dict[str, Any]:
        product = product * growth
        return {"weight_sum": weight_sum + product, "product": product}

    def rule(
        self, g: Tensor, p: Any, t: Any, slots: tuple, *, growth: Any, weight_sum: Any, product: Any
    ) -> tuple[Tensor, tuple]:
        total = slots[0] + g * product
        return total / weight_sum, (total,)


def averaged(grads: list[Tensor], growth: float) -> Tensor:
    """The last update in closed form: a mean with weights that grow."""
    weights = [growth**t for t in range(1, len(grads) + 1)]
    return sum(w * g for w, g in zip(weights, grads)) / sum(weights)


def numbers(state: Any) -> dict[str, float]:
    return {name: float(x) for name, x in state.counters.items()}


def after(tx: Any, params: Any, grads: list[Any], state: Any = None) -> tuple[Any, Any]:
    updates, state = None, tx.init(params) if state is None else state
    for g in grads:
        updates, state = tx.update(g, state, params, inplace=False)
    return updates, state


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "pure"])
def test_counters_on_the_functional_face(inplace: bool, setting: bool | None) -> None:
    tx, params = Weighted(1.5).with_accelerated_op(setting), [nonzero(3), nonzero(2, 2)]
    state, grads = tx.init(params), []
    assert numbers(state) == {"weight_sum": 0.0, "product": 1.0}
    for step in range(1, 5):
        grads.append([nonzero(3), nonzero(2, 2)])
        own = [g.clone() for g in grads[-1]]
        updates, state = tx.update(own, state, params, inplace=inplace)
        assert_close(updates, [averaged(list(column), 1.5) for column in zip(*grads)])
        assert state.product == 1.5**step
        assert type(state.product) is float


@pytest.mark.parametrize("setting", [None, False], ids=["fused", "rules"])
def test_counters_on_the_other_faces(setting: bool | None) -> None:
    tx = torchopt.chain(Weighted(1.5), torchopt.scale(-0.1)).with_accelerated_op(setting)
    p, grads = nonzero(3), [nonzero(3) for _ in range(4)]
    own, net = nn.Parameter(p.clone()), nn.ParameterDict({"p": p.clone()})
    optimizer, inner = torchopt.Optimizer([own], tx), torchopt.MetaOptimizer(net, tx)
    expected = p
    for step, g in enumerate(grads, start=1):
        own.grad = g.clone()
        optimizer.step()
        inner.step((net["p"] * g).sum())
        expected = expected - 0.1 * averaged(grads[:step], 1.5)
        assert_close(own.detach(), expected)
        assert_close(net["p"].detach(), expected)
    (state,) = inner.extract_state()
    for found in (optimizer.state[own]["product"], state.product):
        assert found == 1.5**4
        assert type(found) is float


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counters_are_exact_in_checkpoints_whatever_the_dtype(dtype: torch.dtype) -> None:
    tx = torchopt.chain(Weighted(1.1), torchopt.scale(-0.1))
    params = [nn.Parameter(nonzero(3, dtype=dtype))]
    optimizer = torchopt.Optimizer(params, tx)
    for _ in range(3):
        params[0].grad = nonzero(3, dtype=dtype)
        optimizer.step()
    before = {n: optimizer.state[params[0]][n] for n in ("weight_sum", "product")}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = torchopt.Optimizer(params, tx)
    other.load_state_dict(saved)
    net = nn.ParameterList([params[0].detach().clone()])
    inner = torchopt.MetaOptimizer(net, tx)
    inner.load_state_dict(saved)
    (state,) = inner.extract_state()
    assert {n: other.state[params[0]][n] for n in before} == before == numbers(state)
    again = torchopt.Optimizer(params, tx)
    again.load_state_dict(inner.state_dict())
    assert {n: float(again.state[params[0]][n]) for n in before} == before


def copied_by_leaves(state: Any) -> Any:
    return pytree.tree_map(torch.clone, state)


def saved_by_leaves(state: Any) -> Any:
    leaves, spec = pytree.tree_flatten(state)
    file = io.BytesIO()
    torch.save(leaves, file)
    file.seek(0)
    return pytree.tree_unflatten(torch.load(file, weights_only=True), spec)


@pytest.mark.parametrize("way", [copied_by_leaves, saved_by_leaves, copy.deepcopy])
def test_states_that_are_handled_leaf_by_leaf_go_on(way: Any) -> None:
    tx, params = Weighted(1.1), {"p": nonzero(3).float()}
    grads = [{"p": nonzero(3).float()} for _ in range(5)]
    _, state = after(tx, params, grads[:3])
    expected, twin = after(tx, params, grads[3:], copy.deepcopy(state))
    other = way(state)
    leaves = [x for x in pytree.tree_leaves(other.counters) if isinstance(x, Tensor)]
    assert all(x.dtype == torch.float64 and x.dim() == 0 for x in leaves)
    found, other = after(tx, params, grads[3:], other)
    assert torch.equal(found["p"], expected["p"])
    assert numbers(other) == numbers(twin)


def test_counters_differ_where_gradients_are_missing() -> None:
    tx, params = Weighted(2.0), {"a": nonzero(3), "b": nonzero(2), "none": None}
    present = ["ab", "a", "a", "b"]
    state, got = tx.init(params), {"a": [], "b": []}
    own = {n: nn.Parameter(p.clone()) for n, p in params.items() if p is not None}
    optimizer = torchopt.Optimizer(own.items(), tx)
    for names in present:
        grads = {n: nonzero_like(params)[n] if n in names else None for n in params}
        for n in names:
            got[n].append(grads[n])
        updates, state = tx.update(grads, state, params, inplace=False)
        for n, p in own.items():
            p.grad = grads[n]
        optimizer.step()
        for n in names:
            assert_close(updates[n], averaged(got[n], 2.0))
    assert state.product == {"a": 8.0, "b": 4.0, "none": state.product["none"]}
    assert [optimizer.state[p]["product"] for p in own.values()] == [8.0, 4.0]
    again = copied_by_leaves(state)
    _, state = tx.update({"a": None, "b": nonzero(2), "none": None}, again, params, inplace=False)
    assert state.product == 8.0  # one number, once they agree


def test_members_of_a_batch_have_counters_of_their_own() -> None:
    tx, params = Weighted(1.5), nonzero(2, 3)
    grads = [nonzero(2, 3) for _ in range(3)]
    growth = torch.tensor([1.5, 2.5], dtype=torch.float64)

    def step(growth: Tensor, g: Tensor, state: Any, p: Tensor) -> Any:
        return Weighted(growth).update(g, state, p, inplace=False)

    state, plain = vmap(tx.init)(params), vmap(tx.init)(params)
    for g in grads:
        updates, state = vmap(step)(growth, g, state, params)
        same, plain = vmap(lambda g, s, p: tx.update(g, s, p, inplace=False))(g, plain, params)
    for k in range(2):
        own = [g[k] for g in grads]
        assert_close(updates[k], averaged(own, float(growth[k])))
        assert_close(same[k], averaged(own, 1.5))
    assert_close(state.product, growth**3)
    assert_close(torch.as_tensor(plain.product), torch.full((2,), 1.5**3, dtype=torch.float64))


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("per", ["all", "parameter", "entry"])
def test_a_learned_number_has_its_derivative_through_the_counters(per: str) -> None:
    params = {"a": nonzero(3), "b": nonzero(2)}
    tensors = [torch.tensor(1.5, requires_grad=True)]
    growth: Any = tensors[0]
    if per != "all":
        shapes = [(), ()] if per == "parameter" else [(3,), (2,)]
        tensors = [(1.5 + torch.rand(shape)).requires_grad_() for shape in shapes]
        growth = dict(zip("ab", tensors))

    def outer(growth: Any) -> Tensor:
        tx, p = torchopt.chain(Weighted(growth), torchopt.scale(-0.1)), params
        state = tx.init(p)
        for _ in range(4):
            p, state = tx.apply_gradients({n: x**2 for n, x in p.items()}, state, p, inplace=False)
        return torch.stack([(x**2).sum() for x in p.values()]).sum()

    net = nn.ParameterDict({n: p.clone() for n, p in params.items()})

    def differentiable() -> Tensor:
        tx = torchopt.chain(Weighted(growth), torchopt.scale(-0.1))
        with torchopt.inner_loop(net, tx) as inner:
            for _ in range(4):
                inner.step(torch.stack([(p**3 / 3).sum() for p in net.values()]).sum())
            return torch.stack([(x**2).sum() for x in net.values()]).sum()

    assert_derivative(lambda: outer(growth), tensors)
    assert_derivative(differentiable, tensors)
    assert_close(differentiable().detach(), outer(growth).detach())
    values = growth if isinstance(growth, Tensor) else {n: x.detach() for n, x in growth.items()}
    values = values.detach() if isinstance(values, Tensor) else values
    reverse, forward = torch.func.jacrev(outer)(values), torch.func.jacfwd(outer)(values)
    assert_close(forward, reverse, times=10)


@pytest.mark.parametrize(
    "backend", [pytest.param("eager", marks=pytest.mark.thorough), "aot_eager"]
)
def test_a_compiled_update_is_not_compiled_again_at_the_third_call(backend: str) -> None:
    torch._dynamo.reset()
    tx, params = Weighted(1.5), {"p": nonzero(3), "q": nonzero(2)}
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def update(g: Any, state: Any, p: Any) -> Any:
        return tx.update(g, state, p, inplace=False)

    state, grads, graphs = tx.init(params), [], []
    for _ in range(6):
        grads.append(nonzero(3))
        updates, state = update({"p": grads[-1], "q": nonzero(2)}, state, params)
        assert_close(updates["p"], averaged(grads, 1.5))
        graphs.append(counter.frame_count)
    assert graphs[2:] == graphs[1:2] * 4
    assert float(state.product) == 1.5**6
    torch._dynamo.reset()


@pytest.mark.parametrize("lacking", ["weight_sum", "product"])
def test_a_state_without_a_counter_is_refused_by_name(lacking: str) -> None:
    tx, params = Weighted(), {"p": nonzero(3)}
    state = tx.init(params)
    counters = {n: x for n, x in state.counters.items() if n != lacking}
    with refused(ValueError, f"it lacks .*{lacking}", tx, params):
        tx.update(params, torchopt.OptState(0, state.slots, counters), params)
    net = nn.ParameterDict({"p": params["p"].clone()})
    inner = torchopt.MetaOptimizer(net, tx)
    inner.step(net["p"].sum())
    (own,) = inner.extract_state()
    own.counters.pop(lacking)
    with pytest.raises(ValueError, match=f"it lacks .*{lacking}"):
        inner.recover_state((own,))


def test_a_counter_that_nobody_counts_is_refused_by_name() -> None:
    @torchopt.transformation
    class Uncounted(torchopt.ElementwiseTransformation):
        counters = (Counter("n"),)

        def rule(self, g: Tensor, p: Any, t: Any, slots: tuple, *, n: Any) -> tuple[Tensor, tuple]:
            return g * n, slots

    with pytest.raises(TypeError, match="Uncounted has counters, and defines no count"):
        Uncounted().update([torch.ones(2)], Uncounted().init([torch.ones(2)]))


# Names --------------------------------------------------------------------------------------------


@torchopt.transformation
class Doubled(torchopt.ElementwiseTransformation):
    """Counts under a name that the hyperparameter of another part has."""

    counters = (Counter("growth", 1.0),)

    def count(self, t: Any, *, growth: Any) -> dict[str, Any]:
        return {"growth": 2 * growth}

    def rule(self, g: Tensor, p: Any, t: Any, slots: tuple, *, growth: Any) -> tuple[Tensor, tuple]:
        return g * growth, slots


def test_names_that_clash_in_a_chain_are_numbered() -> None:
    tx = torchopt.chain(Weighted(1.5), Weighted(2.0), Doubled())
    assert tx.slot_names() == ("total", "total_2")
    names = ["weight_sum", "product", "weight_sum_2", "product_2", "growth_3"]
    params, grads = [nonzero(3)], [[nonzero(3)] for _ in range(3)]
    found, state = after(tx, params, grads)
    assert list(state.counters) == names
    assert tx.hyperparameters() == {"growth": 1.5, "growth_2": 2.0}
    means = [averaged([g for (g,) in grads[: k + 1]], 1.5) for k in range(3)]
    assert_close(found[0], 8 * averaged(means, 2.0))
    assert state.product == 1.5**3
    assert state.product_2 == state.growth_3 == 8.0
    net = nn.ParameterList([params[0].clone()])
    inner = torchopt.MetaOptimizer(net, torchopt.chain(tx, torchopt.scale(-1.0)))
    own = nn.Parameter(params[0].clone())
    optimizer = torchopt.Optimizer([own], torchopt.chain(tx, torchopt.scale(-1.0)))
    for (g,) in grads:
        own.grad = g.clone()
        optimizer.step()
        inner.step((net[0] * g).sum())
    assert_close(net[0].detach(), own.detach())
    assert {n: optimizer.state[own][n] for n in names} == numbers(state)


@torchopt.transformation
class Floor(torchopt.ElementwiseTransformation):
    growth: float = torchopt.hyper(9.0, gt=0, shared=True)

    def rule(self, g: Tensor, p: Any, t: Any, slots: tuple, *, growth: Any) -> tuple[Tensor, tuple]:
        return g * growth, slots


def test_a_shared_hyperparameter_is_that_of_an_earlier_part() -> None:
    tx, params, g = torchopt.chain(Weighted(1.5), Floor()), [nonzero(3)], [nonzero(3)]
    assert tx.hyperparameters() == {"growth": 1.5}
    assert Floor().hyperparameters() == {"growth": 9.0}  # alone it has its own
    assert_close(after(tx, params, [g])[0], [1.5 * g[0]])
    own = nn.Parameter(params[0].clone())
    optimizer = torchopt.Optimizer([own], torchopt.chain(tx, torchopt.scale(-1.0)))
    optimizer.param_groups[0]["growth"] = 2.0  # and one entry of a group moves both
    own.grad = g[0].clone()
    optimizer.step()
    assert_close(own.detach(), params[0] - 2.0 * g[0])


def test_the_order_of_the_parts_does_not_mix_their_counters() -> None:
    params, grads = [nonzero(2)], [[nonzero(2)] for _ in range(2)]
    results = {}
    for order in itertools.permutations((Weighted(1.5), Doubled(), Weighted(3.0))):
        found, _ = after(torchopt.chain(*order), params, grads)
        results[tuple(map(repr, order))] = found[0]
    assert len(results) == 6
    doubled_last = torchopt.chain(Weighted(1.5), Weighted(3.0))
    expected, _ = after(doubled_last, params, grads)
    key = (repr(Weighted(1.5)), repr(Weighted(3.0)), repr(Doubled()))
    assert_close(results[key], 4 * expected[0])


# Without slots ------------------------------------------------------------------------------------


@torchopt.transformation
class Fading(torchopt.ElementwiseTransformation):
    """Gradients times a power of ``decay``, kept in a counter and nowhere else."""

    decay: float = torchopt.hyper(0.5, gt=0)

    counters = (Counter("power", 1.0),)

    def count(self, t: Any, *, power: Any, decay: Any) -> dict[str, Any]:
        return {"power": power * decay}

    def rule(
        self, g: Tensor, p: Any, t: Any, slots: tuple, *, decay: Any, power: Any
    ) -> tuple[Tensor, tuple]:
        return g * power, slots


@pytest.mark.parametrize(
    "tx",
    [
        Fading(),
        torchopt.masked(Fading(), [True]),
        torchopt.partition({"a": Fading()}, lambda params: ["a"] * len(params)),
    ],
    ids=["bare", "masked", "partition"],
)
def test_a_state_that_is_only_a_counter_is_not_left_out(tx: Any) -> None:
    params, grads = [nonzero(3)], [nonzero(3)]
    with pytest.raises(TypeError, match=r"got None.*state = tx\.init"):
        tx.update(grads, None, params, inplace=False)
    updates, state = after(tx, params, [grads, grads])
    assert_close(updates, [grads[0] * 0.25])
    assert [float(x) for x in state.counters.values()] == [0.25]
