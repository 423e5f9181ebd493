"""Own ``(init, update)`` pairs of functions as transformations, in all faces.

The oracle is the library's own momentum: a pair that does the same must give the same, and the same
derivatives.
"""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn

import torchopt
from torchopt.base import pytree


class MomentumState(NamedTuple):
    """Not a tree like the parameters: a count stands beside the moments."""

    moments: Any
    count: Any


def init(params: Any) -> MomentumState:
    return MomentumState(pytree.tree_map(torch.zeros_like, params), torch.zeros(()))


def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
    assert not inplace, "only a pair by itself may be told to overwrite"
    moments = pytree.tree_map(lambda m, g: m if g is None else 0.9 * m + g, state.moments, updates)
    updates = pytree.tree_map(lambda m, g: None if g is None else m, moments, updates)
    return updates, MomentumState(moments, state.count + 1)


def pair() -> Any:
    return torchopt.GradientTransformation(init, update)  # pyright: ignore


def own() -> Any:
    return torchopt.chain(pair(), torchopt.scale_by_learning_rate(0.1))


def native() -> Any:
    return torchopt.chain(torchopt.trace(0.9), torchopt.scale_by_learning_rate(0.1))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().mean()


def steps(tx: Any, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    state, updates = tx.init(params), None
    for g in grads:
        updates, state = tx.update(g, state, params)
    return updates, state


# The functional face -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["class", "keywords", "base", "typing", "tuple"])
def test_each_way_to_write_a_pair(form: str) -> None:
    pairs: dict[str, Any] = {
        "class": lambda: pair(),
        "keywords": lambda: torchopt.GradientTransformation(init=init, update=update),  # pyright: ignore
        "base": lambda: torchopt.base.GradientTransformation(init, update),
        "typing": lambda: torchopt.typing.GradientTransformation(init, update),
        "tuple": lambda: (init, update),
    }
    tx = torchopt.chain(pairs[form](), torchopt.scale_by_learning_rate(0.1))
    params = {"w": nonzero(3), "b": [nonzero(2)]}
    grads = [{"w": nonzero(3), "b": [nonzero(2)]} for _ in range(3)]
    updates, state = steps(tx, params, grads)
    wanted, reference = steps(native(), params, grads)
    assert_close(updates, wanted)
    assert isinstance(state.state, MomentumState)
    assert_close(state.state.moments, reference.momentum_buffer)
    assert state.state.count == 3


def test_by_itself_a_pair_is_its_functions() -> None:
    tx, params = pair(), [nonzero(3)]
    assert isinstance(tx, torchopt.base.GradientTransformation)
    state = tx.init(params)
    assert isinstance(state, MomentumState)
    _, state = tx.update(params, state, inplace=False)
    assert type(state) is MomentumState
    assert torchopt.chain(tx) is tx


def test_parameters_without_a_gradient() -> None:
    params = {"a": nonzero(2), "b": nonzero(3)}
    grads = [{"a": nonzero(2), "b": None}, {"a": None, "b": nonzero(3)}, dict(params)]
    updates, _ = steps(own(), params, grads)
    wanted, _ = steps(native(), params, grads)
    assert_close(updates, wanted)


def test_the_order_of_keys_does_not_matter() -> None:
    """An ordered dict is flattened in its own order, a dict in that of its keys."""
    params = OrderedDict(z=nonzero(2), a=nonzero(3))
    grads = {"a": nonzero(3), "z": nonzero(2)}
    updates, state = own().update(grads, own_state := own().init(params), params)
    assert_close(updates, {name: -0.1 * g for name, g in grads.items()})
    assert list(own_state.state.moments) == ["z", "a"]
    assert_close(state.state.moments["z"], grads["z"])


def test_inside_a_mask() -> None:
    """The pair sees nothing of what the mask leaves out, and keeps nothing for it."""
    params = {"a": nonzero(2), "b": nonzero(3)}
    grads = [{"a": nonzero(2), "b": nonzero(3)} for _ in range(3)]
    for mask in ({"a": True, "b": False}, lambda tree: {name: name == "a" for name in tree}):
        updates, state = steps(torchopt.masked(own(), mask), params, grads)
        wanted, _ = steps(torchopt.masked(native(), mask), params, grads)
        assert_close(updates, wanted)
        assert state.state.moments["b"] is None
    alone, state = steps(torchopt.masked((init, update), {"a": True, "b": False}), params, grads)  # pyright: ignore
    assert_close(alone["b"], grads[-1]["b"])


def test_each_place_in_a_chain_has_a_state_of_its_own() -> None:
    p, params, grads = pair(), [nonzero(3)], [[nonzero(3)] for _ in range(3)]
    for tx in (
        torchopt.chain(p, p),
        torchopt.chain(torchopt.masked(p, [True]), torchopt.masked(p, [True])),
        torchopt.chain(own(), p).chain(torchopt.scale(-10.0)),
    ):
        updates, state = steps(tx, params, grads)
        wanted, _ = steps(torchopt.chain(torchopt.trace(0.9), torchopt.trace(0.9)), params, grads)
        assert_close(updates, wanted)
        assert {"state", "state_2"} <= set(state.slots)


def test_chain_flat_hands_over_lists() -> None:
    seen: list[Any] = []

    def watched(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        seen.append((updates, params))
        return [2 * u for u in updates], state

    params = {"b": nonzero(2), "a": nonzero(3)}
    flat: Any = torchopt.chain.flat  # pyright: ignore
    tx = flat((lambda params: None, watched), torchopt.scale(3.0))
    updates, _ = tx.update(params, tx.init(params), params)
    assert_close(updates, {name: 6 * p for name, p in params.items()})
    assert [x.shape for x in seen[0][0]] == [x.shape for x in seen[0][1]] == [(3,), (2,)]


@pytest.mark.parametrize(
    "function",
    [
        lambda u, s: ([2 * u[0]], s),
        lambda u, s, params=None: ([2 * params[0]], s),
        lambda u, s, p: ([2 * p[0]], s),
        lambda u, s, *, params, inplace: ([2 * params[0]], s),
        lambda u, s, **rest: ([2 * rest["params"][0]], s),
        lambda u, s, *rest: ([2 * rest[0][0]], s),
    ],
)
def test_a_pair_is_given_what_it_has_arguments_for(function: Any) -> None:
    p = [nonzero(3)]
    tx = torchopt.chain((lambda params: (), function), torchopt.scale(0.5))  # pyright: ignore
    updates, _ = tx.update(p, tx.init(p), p, value=1.0)
    assert_close(updates, p)


def test_extra_values_reach_the_pair_that_names_them() -> None:
    def damped(updates: Any, state: Any, params: Any = None, *, noise: Any) -> Any:
        return [u / (1 + noise) for u in updates], state

    noise = nonzero(1).abs().requires_grad_()
    tx = torchopt.chain((lambda params: (), damped), torchopt.sgd(0.5))  # pyright: ignore
    g, p = [nonzero(1)], [nonzero(1)]
    (u,), _ = tx.update(g, tx.init(p), p, inplace=False, noise=noise, other=3)
    assert_close(u, -0.5 * g[0] / (1 + noise))
    (slope,) = torch.autograd.grad(u.sum(), noise)
    assert_close(slope, 0.5 * g[0] / (1 + noise.detach()).square())


@pytest.mark.parametrize("dtype", [torch.complex128, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Complex numbers stay whole; half precision is computed, and kept, in float32."""
    params, grads = [nonzero(3, dtype=dtype)], [[nonzero(3, dtype=dtype)] for _ in range(3)]
    updates, state = steps(own(), params, grads)
    wanted, reference = steps(native(), params, grads)
    assert_close(updates, wanted)
    assert state.state.moments[0].dtype == reference.momentum_buffer[0].dtype


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda u, s: u, r"must return \(updates, state\)"),
        (lambda u, s: ([u[0][:1]], s), "whose shape is"),
        (lambda u, s: ([None], s), "returned None for the gradient of '0'"),
        (lambda u, s: ({"a": u[0]}, s), "not match"),
    ],
)
def test_wrong_results_are_named(function: Any, words: str) -> None:
    tx = torchopt.chain((lambda params: None, function), torchopt.scale(1.0))  # pyright: ignore
    with pytest.raises((TypeError, ValueError), match=words):
        tx.update([nonzero(3)], tx.init([nonzero(3)]))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="expects two functions"):
        torchopt.GradientTransformation(init, 3)  # pyright: ignore
    with pytest.raises(ValueError, match=r"lacks \['state'\]"):
        own().update([nonzero(3)], torchopt.OptState(0, {}))


def test_inplace_is_refused_where_the_state_is_recorded() -> None:
    tx, params = own(), [nonzero(3)]
    state = tx.init(params)
    _, state = tx.update([nonzero(3, requires_grad=True)], state, inplace=False)
    with pytest.raises(RuntimeError, match="through state"):
        tx.update([nonzero(3)], state)


# FuncOptimizer, Optimizer, MetaOptimizer --------------------------------------------------------


def test_func_optimizer_alone_and_in_a_chain() -> None:
    x = nonzero(5, 3)

    def run(tx: Any) -> list[Tensor]:
        start = {"w": torch.linspace(-1, 1, 3).double().requires_grad_()}
        optimizer, params = torchopt.FuncOptimizer(tx), start
        for _ in range(3):
            optimizer.load_state_dict(optimizer.state_dict())
            params = optimizer.step((x @ params["w"]).square().mean(), params)
        outer = (x @ params["w"]).square().mean()
        return [params["w"], *torch.autograd.grad(outer, start["w"])]

    assert_close(run(own()), run(native()))

    def ascending(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        updates, state = update(updates, state, inplace=False)
        return pytree.tree_scalar_mul(-0.1, updates), state

    assert_close(run((init, ascending)), run(native()))


def test_in_the_object_oriented_face() -> None:
    """Values, and a saved state that is a copy and fits."""
    x = nonzero(5, 3)

    def train(net: nn.Module, optimizer: Any, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(net, x).backward()
            optimizer.step()

    nets = [network() for _ in range(3)]
    rules = own(), native(), own()
    optimizers = [torchopt.Optimizer(n.parameters(), tx) for n, tx in zip(nets, rules)]
    train(nets[0], optimizers[0], 3)
    train(nets[1], optimizers[1], 6)
    file = io.BytesIO()
    torch.save(optimizers[0].state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    nets[2].load_state_dict(nets[0].state_dict())
    optimizers[2].load_state_dict(saved)
    train(nets[2], optimizers[2], 3)
    assert_close(list(nets[2].parameters()), list(nets[1].parameters()))
    optimizers[2].load_state_dict(saved)  # is as it was: loading copied it
    again = copy.deepcopy(optimizers[2])
    assert again.state["pairs"]["state"].count == 3  # pyright: ignore
    with pytest.raises(ValueError, match=r"it has \['state'\] for all parameters together"):
        torchopt.Optimizer(
            nets[1].parameters(), torchopt.scale_by_learning_rate(0.1)
        ).load_state_dict({**saved, "state": {"pairs": saved["state"]["pairs"]}})


def test_in_the_differentiable_face() -> None:
    """Meta-gradients; extracting, recovering, saving, copying; restored by ``inner_loop``."""
    x = nonzero(5, 3)

    def run(tx: Any, saved: bool) -> list[Tensor]:
        net = network()
        start = list(net.parameters())
        inner = torchopt.MetaOptimizer(net, tx)
        for _ in range(2):
            inner.step(loss_of(net, x))
        state, weights = torchopt.extract_state_dict(inner), torchopt.extract_state_dict(net)
        for _ in range(2):
            inner.step(loss_of(net, x))
        torchopt.recover_state_dict(inner, state)
        torchopt.recover_state_dict(net, weights)
        if saved:
            inner.load_state_dict(copy.deepcopy(inner.state_dict()))
        inner.step(loss_of(net, x))
        gradient = torch.autograd.grad(loss_of(net, x), start)
        if saved:
            net = copy.deepcopy(net)
            inner = torchopt.MetaOptimizer(net, tx)
        return [*net.parameters(), *gradient]

    for saved in (False, True):
        assert_close(run(own(), saved), run(native(), saved))


def test_copies_cuts_and_loops() -> None:
    x, net = nonzero(5, 3), network()
    inner = torchopt.MetaOptimizer(net, own())
    inner.step(loss_of(net, x))
    copied = copy.deepcopy(inner)
    assert copied.extract_state()[0].state.count == 1
    with torchopt.inner_loop(net, inner):
        inner.step(loss_of(net, x))
        assert inner.extract_state()[0].state.count == 2
    assert inner.extract_state()[0].state.count == 1
    torchopt.stop_gradient(inner)
    moments = inner.extract_state()[0].state.moments
    assert not any(m.requires_grad for m in moments.values())
    value = loss_of(net, x)
    with torch.no_grad():
        inner.step(value)
    assert not any(m.requires_grad for m in inner.extract_state()[0].state.moments.values())


def test_beside_a_fused_rule() -> None:
    """What follows the pair is computed as without it, fused or by rules."""
    params, grads = {"w": nonzero(7)}, [{"w": nonzero(7)} for _ in range(3)]
    for fused in (None, False):
        adam = torchopt.adam(0.1, use_accelerated_op=fused)
        updates, state = steps(torchopt.chain(pair(), adam), params, grads)
        wanted, _ = steps(torchopt.chain(torchopt.trace(0.9), adam), params, grads)
        assert_close(updates, wanted)
        assert {"state", "exp_avg", "exp_avg_sq"} == set(state.slots)
