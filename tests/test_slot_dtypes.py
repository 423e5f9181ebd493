"""Slots in another dtype: the rule, and what is kept rounded by hand between two updates."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from adapting import batch, mlp, mse
from conftest import nonzero
from fusing import needs_library
from tolerances import assert_close

import torchopt


BF16 = torch.bfloat16

#: Name -> the recipe, and the slots to be kept in bfloat16.
CASES = {
    "adam": (lambda **k: torchopt.adam(0.1, (0.7, 0.8), eps=0.05, **k), ("exp_avg",)),
    "adamw": (lambda **k: torchopt.adamw(0.1, (0.7, 0.8), eps=0.05, **k), ("exp_avg",)),
    "lion": (lambda **k: torchopt.lion(0.1, (0.7, 0.8), weight_decay=0.3, **k), ("exp_avg",)),
    "sgd": (lambda **k: torchopt.sgd(0.1, 0.9, 0.2, weight_decay=0.3, **k), ("momentum_buffer",)),
    "nesterov": (lambda **k: torchopt.sgd(0.1, 0.9, nesterov=True, **k), ("momentum_buffer",)),
    "both": (lambda: torchopt.adam(0.1, (0.7, 0.8), eps=0.05), ("exp_avg", "exp_avg_sq")),
    "nadam": (lambda: torchopt.nadam(0.1, (0.7, 0.8), eps=0.05), ("exp_avg", "exp_avg_sq")),
    "adafactor": (lambda: torchopt.adafactor(0.1), ("row_var", "col_var")),
    "free": (lambda: torchopt.schedule_free_sgd(0.1, 0.7), ("z",)),
    "chain": (
        lambda: torchopt.chain(torchopt.trace(0.5), torchopt.ema(0.7), torchopt.sgd(0.1, 0.9)),
        ("momentum_buffer_2",),
    ),
    "masked": (lambda: torchopt.masked(torchopt.adam(0.1), {"a": True, "b": False}), ("exp_avg",)),
    "named": (lambda: torchopt.named_chain(("m", torchopt.adam(0.1))), ("m.exp_avg",)),
    "partition": (
        lambda: torchopt.partition(
            {"x": torchopt.adam(0.1), "y": torchopt.sgd(0.1, 0.9)}, {"a": "x", "b": "y"}
        ),
        ("exp_avg", "momentum_buffer"),
    ),
    "accumulate": (
        lambda: torchopt.MultiSteps(torchopt.adam(0.1, eps=0.05), 2),
        ("acc_grads", "exp_avg"),
    ),
    "lookahead": (lambda: torchopt.lookahead(torchopt.sgd(0.1, 0.9), 2), ("slow",)),
}
WITH_ARGUMENT = [name for name in CASES if name in ("adam", "adamw", "lion", "sgd", "nesterov")]


def narrowed(name):
    make, slots = CASES[name]
    return make().with_slot_dtypes(dict.fromkeys(slots, BF16)), make(), slots


def problem(dtype):
    torch.manual_seed(3)
    params = {"a": nonzero(4, 3).to(dtype), "b": nonzero(5).to(dtype)}
    scale = {name: nonzero(*p.shape).to(dtype) for name, p in params.items()}
    return params, lambda p: {name: (p[name] * 3).sin() + scale[name] for name in p}


def rounded(state, slots):
    """Round slots by hand, as torch casts, and compute with them in the dtype of the parameters."""
    columns = dict(state.slots)
    for slot in slots:
        columns[slot] = {
            name: None if x is None else x.to(BF16).to(x.dtype)
            for name, x in columns[slot].items()
        }  # fmt: skip
    return torchopt.OptState(state.step, columns, state.counters)


def by_hand(tx, params, gradients, slots, steps):
    state = rounded(tx.init(params), slots)
    for _ in range(steps):
        params, state = tx.apply_gradients(gradients(params), state, params, inplace=False)
        state = rounded(state, slots)
    return params, state


def kept(tx, params, gradients, steps):
    state = tx.init(params)
    for _ in range(steps):
        params, state = tx.apply_gradients(gradients(params), state, params, inplace=False)
    return params, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_rounding_by_hand(name, dtype):
    tx, plain, slots = narrowed(name)
    params, gradients = problem(dtype)
    found, state = kept(tx, params, gradients, 5)
    expected, reference = by_hand(plain, params, gradients, slots, 5)
    unrounded, _ = kept(plain, params, gradients, 5)
    assert any(not torch.equal(unrounded[n], found[n]) for n in params) or name == "lion"
    for n in params:
        assert found[n].dtype == dtype
        assert_close(found[n], expected[n])
    for slot, column in state.slots.items():
        for n, x in column.items():
            if x is not None:
                assert x.dtype == (BF16 if slot in slots else reference.slots[slot][n].dtype)
                assert_close(x.to(dtype), reference.slots[slot][n].to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_the_cast(name):
    tx, plain, slots = narrowed(name)
    params, gradients = problem(torch.float64)
    params = {n: p.requires_grad_() for n, p in params.items()}

    def derivatives(last):
        total = torch.stack([p.square().sum() for p in last.values()]).sum()
        return torch.autograd.grad(total, list(params.values()))

    found = derivatives(kept(tx, params, gradients, 4)[0])
    expected = derivatives(by_hand(plain, params, gradients, slots, 4)[0])
    for a, b in zip(found, expected):
        assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_updates_in_place_are_the_same(name):
    tx, _, _ = narrowed(name)
    params, gradients = problem(torch.float32)
    expected, reference = kept(tx, params, gradients, 4)
    live = {n: p.clone() for n, p in params.items()}
    state = tx.init(live)
    for _ in range(4):
        live, state = tx.apply_gradients(gradients(live), state, live)
    for n in params:
        assert_close(live[n], expected[n])
    for slot, column in state.slots.items():
        assert {n: x is not None and x.dtype for n, x in column.items()} == {
            n: x is not None and x.dtype for n, x in reference.slots[slot].items()
        }


@pytest.mark.parametrize("name", WITH_ARGUMENT)
def test_the_argument_of_a_recipe(name):
    make, (slot,) = CASES[name]
    assert make(**{f"{slot}_dtype": BF16}) == narrowed(name)[0]
    assert make(**{f"{slot}_dtype": BF16}) != make()
    assert make(**{f"{slot}_dtype": None}) == make()
    assert "bfloat16" in repr(narrowed(name)[0])
    assert pickle.loads(pickle.dumps(narrowed(name)[0])) == narrowed(name)[0]


@needs_library
@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "sgd", "both"])
def test_is_fused(name):
    tx, _, _ = narrowed(name)
    params, gradients = problem(torch.float32)
    state = tx.init(params)
    assert torchopt.kernels.why(tx, gradients(params), state, params) == []
    required = tx.with_accelerated_op(True)
    updates, _ = required.update(gradients(params), state, params, inplace=False)
    expected, _ = tx.with_accelerated_op(False).update(
        gradients(params), state, params, inplace=False
    )
    for n in params:
        assert_close(updates[n], expected[n])


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_parameters_in_half_precision(dtype):
    tx = torchopt.adam(0.1, exp_avg_dtype=BF16)
    params, gradients = problem(torch.float32)
    params = {n: p.to(dtype) for n, p in params.items()}

    def own(p):
        return {n: g.to(dtype) for n, g in gradients({n: x.float() for n, x in p.items()}).items()}

    new, state = kept(tx, params, own, 3)
    assert state.exp_avg["a"].dtype == BF16
    assert state.exp_avg_sq["a"].dtype == torch.float32
    assert new["a"].dtype == dtype


def test_updates_without_parameters():
    tx = torchopt.sgd(0.1, momentum=0.9, momentum_buffer_dtype=BF16)
    g = [nonzero(3).float()]
    state = tx.init(g)
    for _ in range(2):
        _, state = tx.update(g, state)
    assert state.momentum_buffer[0].dtype == BF16


def stepped(optimizer, net, data, steps=3):
    for _ in range(steps):
        if isinstance(optimizer, torchopt.MetaOptimizer):
            optimizer.step(mse(net, data))
            continue
        optimizer.zero_grad()
        mse(net, data).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("cls", [torchopt.Adam, torchopt.MetaAdam])
def test_object_oriented_and_differentiable(cls):
    net, data = mlp().float(), batch()
    twin, third = copy.deepcopy(net), copy.deepcopy(net)
    made = lambda n: n if cls is torchopt.MetaAdam else n.parameters()  # noqa: E731
    optimizer = cls(made(net), lr=0.1, exp_avg_dtype=BF16)
    params = {n: p.detach() for n, p in twin.named_parameters()}

    def gradients(p):
        loss = (torch.func.functional_call(twin, p, data[0]) - data[1]).square().mean()
        return dict(zip(p, torch.autograd.grad(loss, list(p.values()))))

    params = {n: p.requires_grad_() for n, p in params.items()}
    plain = torchopt.adam(0.1)
    state = rounded(plain.init(params), ["exp_avg"])
    for _ in range(4):
        new, state = plain.apply_gradients(gradients(params), state, params, inplace=False)
        params = {n: p.detach().requires_grad_() for n, p in new.items()}
        state = rounded(state, ["exp_avg"])
    stepped(optimizer, net, data)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    third.load_state_dict({n: p.detach() for n, p in net.named_parameters()})
    fourth = copy.deepcopy(third)
    loaded = cls(made(third), lr=0.1, exp_avg_dtype=BF16)
    loaded.load_state_dict(torch.load(stream))
    for one, own in ((optimizer, net), (loaded, third)):
        for p, q in zip(stepped(one, own, data, 1), params.values()):
            assert_close(p, q.detach())
        saved = one.state_dict()["state"]
        assert {entry["exp_avg"].dtype for entry in saved.values()} == {BF16}
        assert {entry["exp_avg_sq"].dtype for entry in saved.values()} == {torch.float32}
    peer = torch.optim.Adam(fourth.parameters())
    peer.load_state_dict(optimizer.state_dict())
    wide = cls(made(fourth), lr=0.1)
    wide.load_state_dict(optimizer.state_dict())
    narrow = cls(made(fourth), lr=0.1, exp_avg_dtype=BF16)
    narrow.load_state_dict(wide.state_dict())
    kept_in = [x.state_dict()["state"][0]["exp_avg"].dtype for x in (peer, wide, narrow)]
    assert kept_in == [torch.float32, torch.float32, BF16]


def test_a_wide_state_that_is_given_becomes_narrow():
    tx = torchopt.adam(0.1, exp_avg_dtype=BF16)
    params, gradients = problem(torch.float32)
    _, state = kept(torchopt.adam(0.1), params, gradients, 2)
    _, state = tx.update(gradients(params), state, params, inplace=False)
    assert state.exp_avg["a"].dtype == BF16


def test_evaluates_from_rounded_slots():
    tx, plain, slots = narrowed("free")
    params, gradients = problem(torch.float64)
    found = tx.eval_params(kept(tx, params, gradients, 3)[1], params)
    expected = plain.eval_params(by_hand(plain, params, gradients, slots, 3)[1], params)
    for n in params:
        assert_close(found[n], expected[n])


def test_mapped():
    tx = torchopt.adam(0.1, exp_avg_dtype=BF16)
    params, gradients = problem(torch.float32)
    expected, _ = kept(tx, params, gradients, 3)

    def update(g, state, p):
        return tx.apply_gradients(g, state, p, inplace=False)

    stacked = {n: torch.stack([p, p]) for n, p in params.items()}
    state = torch.func.vmap(tx.init)(stacked)
    for _ in range(3):
        grads = gradients({n: p[0] for n, p in stacked.items()})
        grads = {n: torch.stack([g, g]) for n, g in grads.items()}
        stacked, state = torch.func.vmap(update)(grads, state, stacked)
    assert state.exp_avg["a"].dtype == BF16
    for n in params:
        assert_close(stacked[n][1], expected[n])


REFUSED = {
    "unknown": ({"exp_av": BF16}, r"'exp_av' is no slot.*'exp_avg'"),
    "integer": ({"exp_avg": torch.int8}, "floating one.*torch.int8"),
    "text": ({"exp_avg": "bfloat16"}, "floating one.*'bfloat16'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    dtypes, message = REFUSED[case]
    with pytest.raises(TypeError, match=message):
        torchopt.adam().with_slot_dtypes(dtypes)


def test_refused_counts_and_complex_numbers():
    tx = torchopt.apply_if_finite(torchopt.adam(), 3)
    for slot in tx.slot_names():
        if not slot.startswith("exp_avg") and not slot.startswith("max"):
            with pytest.raises(TypeError, match="cannot be kept in another dtype"):
                tx.with_slot_dtypes({slot: BF16})
    functions: Any = (lambda p: [x * 1 for x in p], lambda u, s, p=None: (u, s))
    pair = torchopt.chain(functions)
    with pytest.raises(TypeError, match="cannot be kept in another dtype"):
        pair.with_slot_dtypes({pair.slot_names()[0]: BF16})
    with pytest.raises(TypeError, match=r"'exp_avg' is kept in torch\.bfloat16.*complex"):
        torchopt.adam(exp_avg_dtype=BF16).init([torch.ones(2, dtype=torch.complex64)])


def test_back_to_the_dtype_of_the_parameters():
    tx = torchopt.adam(exp_avg_dtype=BF16).with_slot_dtypes({"exp_avg": None})
    assert tx == torchopt.adam()
