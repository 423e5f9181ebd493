"""Parameters that do not depend on each other stay so where one kernel updates them together.

By the rules each has nodes of its own in the graph. Whatever works by them works by kernels: at the
cost of what a loss depends on, and with ``None`` where it depends on nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case, every_fused_kind
from conftest import nonzero
from fusing import kernel_calls_fixture, needs_library  # noqa: F401
from tolerances import assert_close
from torch import Tensor, nn

import torchopt
from torchopt.kernels import nodes


pytestmark = needs_library


class Heads(nn.Module):
    """Independent heads, and the loss of each."""

    a: nn.Linear
    b: nn.Linear

    def __init__(self, names: str = "ab") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.x = nonzero(5, 3)
        for name in names:
            setattr(self, name, nn.Linear(3, 2).double())

    def loss(self, names: str) -> Tensor:
        return sum((getattr(self, n)(self.x).square().mean() for n in names), torch.zeros(()))

    def of(self, name: str) -> list[Tensor]:
        return list(getattr(self, name).parameters())


Outcome = list[Any]
Drive = Callable[[Heads, torchopt.MetaOptimizer, list[Tensor]], Outcome]


def outcome(case: Case, use: bool | None, drive: Drive, names: str = "ab") -> Outcome:
    net, tx = Heads(names), case.smooth(use_accelerated_op=use)
    return drive(net, torchopt.MetaOptimizer(net, tx), list(net.parameters()))


def cubes(params: dict[str, Tensor]) -> Tensor:
    """A loss to which every parameter contributes by itself."""
    return sum((p.pow(3).sum() for p in params.values()), torch.zeros(()))


def beginning(case: Case, use: bool | None) -> tuple[dict[str, Tensor], Any, Any, Any]:
    """Return two parameters, a transformation, the parameters to go on with, and their state."""
    torch.manual_seed(0)
    start = {name: nonzero(4, requires_grad=True) for name in "ab"}
    tx = case.smooth(use_accelerated_op=use)
    return start, tx, dict(start), tx.init(start)


def same(actual: Outcome, expected: Outcome) -> None:
    assert [x is None for x in actual] == [x is None for x in expected]
    for x, y in zip(actual, expected):
        if y is not None:
            assert_close(x, y, times=8)


@pytest.fixture(name="visits")
def visits_fixture(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each backward pass of a node was for."""
    seen: list[int] = []
    original = nodes.Fused.backward

    def watched(ctx: Any, *bars: Any) -> Any:
        seen.append(ctx.group.count)
        return original(ctx, *bars)

    monkeypatch.setattr(nodes.Fused, "backward", staticmethod(watched))
    return seen


@every_fused_kind
def test_steps_on_one_part_cost_the_same_each_time(
    case: Case, kernel_calls: list[int], visits: list[int]
) -> None:
    net = Heads()
    inner = torchopt.MetaOptimizer(net, case.smooth(use_accelerated_op=None))
    inner.step(net.loss("ab"))
    inner.step(net.loss("ab"))
    for _ in range(12):
        del kernel_calls[:], visits[:]
        inner.step(net.loss("a"))
        assert (len(kernel_calls), visits) == (1, [])


@pytest.mark.parametrize("create_graph", [True, False], ids=["second", "first"])
def test_a_loss_costs_what_it_depends_on(create_graph: bool, visits: list[int]) -> None:
    """Twenty steps on one head do not run for the loss of the other, not even for nothing."""
    net = Heads()
    start = list(net.parameters())
    inner = torchopt.MetaAdam(net, lr=0.1)
    inner.step(net.loss("ab"), create_graph=create_graph)
    for _ in range(20):
        inner.step(net.loss("a"), create_graph=create_graph)
    net.loss("b").backward()
    assert len(visits) == 1
    assert [p.grad is None for p in start] == [True, True, False, False]


def first_order(net: Heads, inner: torchopt.MetaOptimizer, start: list[Tensor]) -> Outcome:
    inner.step(net.loss("ab"), create_graph=False)
    return list(torch.autograd.grad(net.loss("ab"), start))


def logged(net: Heads, inner: torchopt.MetaOptimizer, start: list[Tensor]) -> Outcome:
    found = torch.autograd.grad(net.loss("ab"), list(net.parameters()))
    found += torch.autograd.grad(net.loss("b"), net.of("b"))
    found += torch.autograd.grad(net.loss("a"), list(net.parameters()), allow_unused=True)
    return [*found, *torch.autograd.grad(net.loss("ab"), start)]


def one_after_the_other(net: Heads, inner: Any, start: list[Tensor]) -> Outcome:
    net.loss("a").backward()
    before = [p.grad for p in start[2:]]
    net.loss("b").backward()
    return [*before, *(p.grad for p in start)]


def unused(net: Heads, inner: Any, start: list[Tensor]) -> Outcome:
    found = torch.autograd.grad(net.loss("a"), start, allow_unused=True, retain_graph=True)
    found += torch.autograd.grad(net.loss("b"), start, allow_unused=True, create_graph=True)
    total = sum(x.square().sum() for x in found[6:])
    assert isinstance(total, Tensor)
    return [*found, *torch.autograd.grad(total, start, allow_unused=True)]


def second_order_apart(net: Heads, inner: Any, start: list[Tensor]) -> Outcome:
    """The graph of a backward pass through all keeps the parts apart, too."""
    found = torch.autograd.grad(net.loss("ab"), start, create_graph=True)
    sums = [
        sum((x.square().sum() for x in part), torch.zeros(())) for part in (found[:2], found[2:])
    ]
    sums[0].backward(inputs=start[:2])
    return [*found, *torch.autograd.grad(sums[1], start[2:]), *(p.grad for p in start)]


def states_of_one(net: Heads, inner: torchopt.MetaOptimizer, start: list[Tensor]) -> Outcome:
    (state,) = inner.extract_state()
    slots = [x for slot in state.slots.values() for n, x in slot.items() if n.startswith("a.")]
    total = sum((x.sin().sum() for x in slots), net.loss("a"))
    return list(torch.autograd.grad(total, start, allow_unused=True))


BEFORE: dict[str, list[str]] = {"together": ["ab", "ab"], "then a": ["ab", "a", "a"]}
BEFORE |= {"mixed": ["a", "ab", "b", "ab", "a"]}
DRIVES = (first_order, logged, one_after_the_other, unused, second_order_apart, states_of_one)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("drive", DRIVES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@every_fused_kind
def test_as_by_the_rules(case: Case, before: list[str], drive: Drive) -> None:
    def whole(net: Heads, inner: torchopt.MetaOptimizer, start: list[Tensor]) -> Outcome:
        for names in before:
            inner.step(net.loss(names))
        return drive(net, inner, start)

    same(
        outcome(case, None, whole),
        outcome(case, False, whole),
    )


@every_fused_kind
def test_first_order_steps_leave_the_others(case: Case) -> None:
    """Also where something is kept for the backward pass, and where weights were computed."""

    def drive(net: Heads, inner: torchopt.MetaOptimizer, start: list[Tensor]) -> Outcome:
        for names in ("ab", "ab", "a", "ab"):
            inner.step(net.loss(names), create_graph=False)
        return one_after_the_other(net, inner, start)

    same(
        outcome(case, None, drive),
        outcome(case, False, drive),
    )


@every_fused_kind
@pytest.mark.parametrize("create_graph", [True, False], ids=["second", "first"])
def test_weights_of_independent_networks_that_make_them(create_graph: bool, case: Case) -> None:
    results = []
    for use in (None, False):
        torch.manual_seed(0)
        makers = [nonzero(3, requires_grad=True) for _ in range(2)]
        params = {name: maker.exp() for name, maker in zip("ab", makers)}
        tx = case.smooth(use_accelerated_op=use)
        state = tx.init(params)
        for _ in range(2):
            grads = torch.autograd.grad(
                cubes(params), [*params.values()], create_graph=create_graph
            )
            params, state = tx.apply_gradients(dict(zip("ab", grads)), state, params, inplace=False)
        params["a"].sum().backward()
        before = makers[1].grad
        params["b"].sum().backward()
        results.append([before, *(maker.grad for maker in makers)])
    same(*results)


@every_fused_kind
@pytest.mark.parametrize("how", ["update", "apply_gradients"])
def test_the_functional_face(how: str, case: Case) -> None:
    """A part is updated by itself afterwards; derivatives are taken by old and new parameters."""
    results = []
    for use in (None, False):
        start, tx, params, state = beginning(case, use)

        def step(params: Any, state: Any, tx: Any = tx) -> Any:
            grads = torch.autograd.grad(cubes(params), [*params.values()], create_graph=True)
            grads = dict(zip(params, grads))
            if how == "apply_gradients":
                return tx.apply_gradients(grads, state, params, inplace=False)
            updates, state = tx.update(grads, state, params, inplace=False)
            return torchopt.apply_updates(params, updates, inplace=False), state

        for _ in range(2):
            params, state = step(params, state)
        slots = {s: {"a": c["a"]} for s, c in state.slots.items()}
        own, _ = step({"a": params["a"]}, torchopt.OptState(state.step, slots, state.counters))
        found = [*torch.autograd.grad(own["a"].sum(), [own["a"]])]
        both = [own["a"], params["b"]]
        found += torch.autograd.grad(own["a"].sin().sum(), both, allow_unused=True)
        own["a"].sin().sum().backward()
        params["b"].sin().sum().backward()
        results.append([*found, *(p.grad for p in start.values())])
    same(*results)


def test_networks_of_one_optimizer() -> None:
    results = []
    for use in (None, False):
        nets = [Heads("a"), Heads("b")]
        start = [p for net in nets for p in net.parameters()]
        inner = torchopt.MetaSGD(nets, lr=0.1, momentum=0.9, use_accelerated_op=use)
        for _ in range(2):
            inner.step(nets[0].loss("a") + nets[1].loss("b"))
        nets[0].loss("a").backward()
        nets[1].loss("b").backward()
        results.append([p.grad for p in start])
    same(*results)


def test_what_was_freed_is_refused() -> None:
    """A second pass through the same part fails as by the rules; the other part is still there."""
    net = Heads()
    inner = torchopt.MetaAdam(net, lr=0.1)
    inner.step(net.loss("ab"))
    for name in "ab":
        net.loss(name).backward()
        with pytest.raises(RuntimeError, match="second time"):
            net.loss(name).backward()


def test_what_a_bare_step_keeps_is_freed_part_by_part() -> None:
    def step() -> tuple[list[Tensor], Any]:
        p = [nonzero(3, requires_grad=True) for _ in range(2)]
        g = [nonzero(3, requires_grad=True) for _ in range(2)]
        tx = torchopt.adam(0.1)
        return tx.apply_gradients(g, tx.init(p), p, inplace=False)[0], g

    (a, b), _ = step()
    a.sum().backward(retain_graph=True)
    a.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        a.sum().backward()
    b.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        b.sum().backward()

    (a, b), g = step()
    with torch.no_grad():
        g[0].add_(1)
    b.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        a.sum().backward()


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch does not tell whether there are hooks",
)
def test_what_is_kept_is_seen_by_hooks() -> None:
    """``saved_tensors_hooks`` (``save_on_cpu``) get all that a step keeps."""
    p, g = ([nonzero(3, requires_grad=True) for _ in range(2)] for _ in range(2))
    tx, packed, opened = torchopt.adam(0.1), [], []

    def unpack(x: Tensor) -> Tensor:
        opened.append(x)
        return x

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        new, _ = tx.apply_gradients(g, tx.init(p), p, inplace=False)
    new[0].sum().backward()
    assert 0 < len(opened) < len(packed)
    new[1].sum().backward()
    assert len(opened) == len(packed)


def test_infinite_slopes_of_others_do_not_come_in() -> None:
    """Nothing is multiplied by zero where a loss depends on nothing."""
    net = Heads()
    start = list(net.parameters())
    with torch.no_grad():
        net.b.weight.zero_()
    inner = torchopt.MetaAdam(net, lr=0.1)
    inner.step(net.loss("a") + net.b.weight.abs().sqrt().sum())  # its slope is infinite
    inner.step(net.loss("a"))
    assert [g is None for g in torch.autograd.grad(net.loss("a"), start, allow_unused=True)] == [
        False,
        False,
        True,
        True,
    ]


def test_hooks_of_others_are_not_called() -> None:
    for use in (None, False):
        net, calls = Heads(), []
        net.b.weight.register_hook(lambda g, calls=calls: calls.append(g))
        inner = torchopt.MetaSGD(net, lr=0.1, use_accelerated_op=use)
        inner.step(net.loss("ab"), create_graph=False)
        inner.step(net.loss("ab"), create_graph=False)
        del calls[:]
        net.loss("a").backward()
        assert calls == []
        net.loss("b").backward()
        assert len(calls) == 1
        assert calls[0] is not None


@every_fused_kind
def test_under_levels_of_torch_func(case: Case) -> None:
    """The gradient of each step is torch.func's, and what records it plain autograd."""
    results = []
    for use in (None, False):
        start, tx, params, state = beginning(case, use)

        for _ in range(2):
            grads = torch.func.grad(cubes)(params)
            params, state = tx.apply_gradients(grads, state, params, inplace=False)
        params["a"].sin().sum().backward()
        before = start["b"].grad
        params["b"].sin().sum().backward()

        def after(a: Tensor, b: Tensor, tx: Any = tx) -> Any:
            params: Any = {"a": a, "b": b}
            state = tx.init(params)
            params, state = tx.apply_gradients(
                torch.func.grad(cubes)(params), state, params, inplace=False
            )
            grads = {"a": torch.func.grad(cubes)({"a": params["a"]})["a"], "b": None}
            params, state = tx.apply_gradients(grads, state, params, inplace=False)
            return params["a"].sin().sum()

        given = [p.detach() for p in start.values()]
        found = torch.func.grad(after, (0, 1))(*given)
        batch = torch.func.vmap(torch.func.grad(after, (0, 1)))(
            *(torch.stack([p, 2 * p]) for p in given)
        )
        results.append([before, *(p.grad for p in start.values()), *found, *batch])
    same(*results)


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed: int) -> None:
    """Random parts in random steps, then passes through random parts: what works by the rules."""
    chance = random.Random(seed)
    names = "abc"

    def some() -> str:
        return "".join(sorted(chance.sample(names, chance.randint(1, 3))))

    steps = [(some(), chance.random() < 0.7) for _ in range(chance.randint(2, 5))]
    passes = [(some(), chance.random() < 0.4) for _ in range(4)]
    coupled = chance.random() < 0.4

    def drive(net: Heads, inner: torchopt.MetaOptimizer, start: list[Tensor]) -> Outcome:
        found: Outcome = []
        for own, create_graph in steps:
            loss = net.loss(own)
            if coupled and len(own) > 1:
                loss = loss + getattr(net, own[0]).bias.prod() * getattr(net, own[1]).bias.sum()
            inner.step(loss, create_graph=create_graph)
        for own, retain in passes:
            loss = net.loss(own)
            try:
                found += torch.autograd.grad(loss, start, allow_unused=True, retain_graph=retain)
            except RuntimeError:
                return [*found, "freed"]
        return found

    case = chance.choice([case for case in CASES if case.algorithm.fused])
    actual, expected = (outcome(case, use, drive, names) for use in (None, False))
    works = [x for x in expected if not isinstance(x, str)]  # the rules may fail earlier
    same(actual[: len(works)], works)
