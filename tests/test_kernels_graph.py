"""Rules become graphs: what is traced, what is refused, and that numbers keep their meaning."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import nonzero
from pointwise import (
    constant_value,
    evaluate,
    evaluate_kernel,
    program_of,
    user_optimizer,
    values_of,
)
from tolerances import assert_close
from torch import Tensor

import torchopt
from torchopt.kernels import why
from torchopt.kernels.generate.graph import input_node
from torchopt.kernels.generate.tracing import FUNCTIONS, SymbolicTensor, UntraceableError


# Guards -------------------------------------------------------------------------------------------


def test_first_step_of_damped_momentum_has_its_own_program() -> None:
    tx = torchopt.sgd(0.1, momentum=0.9, dampening=0.5)
    values = values_of(tx)
    first, later = program_of(tx, 1), program_of(tx, 2)
    assert first.kernels["update"].text == later.kernels["update"].text, "numbers differ, no more"
    assert [first.conditions.hold(values, t) for t in (1, 2, 3, 1000)] == [
        True,
        False,
        False,
        False,
    ]
    assert [later.conditions.hold(values, t) for t in (1, 2, 3, 1000)] == [False, True, True, True]
    plain = torchopt.sgd(0.1, momentum=0.9)
    assert all(program_of(plain, 1).conditions.hold(values_of(plain), t) for t in (1, 2, 1000))


@pytest.mark.parametrize("name", ["weight_decay", "momentum"])
def test_zero_leaves_a_term_out_and_only_zero(name: str) -> None:
    without = torchopt.sgd(0.1, **{name: 0.0})
    with_it = torchopt.sgd(0.1, **{name: 0.5})
    other = torchopt.sgd(0.7, **{name: 0.01})
    program, richer = program_of(without), program_of(with_it)
    assert program.kernels["update"].text != richer.kernels["update"].text
    assert program.conditions.hold(values_of(torchopt.sgd(0.7)), 5)
    assert not program.conditions.hold(values_of(with_it), 5)
    assert richer.conditions.hold(values_of(other), 5)
    assert not richer.conditions.hold(values_of(without), 5)


def test_numbers_are_those_of_the_call() -> None:
    """A program made for some numbers computes with any others for which it holds."""
    made, used = torchopt.adam(0.1, (0.8, 0.9), 1e-3), torchopt.adam(0.3, (0.5, 0.7), 1e-2)
    program = program_of(made, 2)
    assert program.conditions.hold(values_of(used), 7)
    inputs = {"g": nonzero(5), "s0": nonzero(5), "s1": nonzero(5).abs()}
    row = program.numbers["update"](values_of(used), 7)
    actual = evaluate_kernel(program.kernels["update"], inputs, row)
    state = used.init([inputs["g"]])
    state.step = 6
    state.slots = {"exp_avg": [inputs["s0"]], "exp_avg_sq": [inputs["s1"]]}
    (u,), new = used.with_accelerated_op(False).update([inputs["g"]], state, inplace=False)
    expected = {"u": u, "s0": new.exp_avg[0], "s1": new.exp_avg_sq[0]}
    assert_close(actual, expected)


def test_maximize_shares_the_kernels_of_minimize() -> None:
    for make in (torchopt.sgd, torchopt.adam, torchopt.adamw, torchopt.rmsprop):
        down, up = (program_of(make(0.1, maximize=m)) for m in (False, True))
        for name, kernel in down.kernels.items():
            assert up.kernels[name].text == kernel.text, name


# Numbers that get lost ----------------------------------------------------------------------------


#: Rules that are pointwise in their tensors but do with numbers what symbols may lose sight of.
NUMBERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "sqrt(lr)": lambda g, t, lr: g * math.sqrt(lr),
    "exp(lr)": lambda g, t, lr: g * math.exp(-lr),
    "lr / sqrt(t)": lambda g, t, lr: g * (-lr / math.sqrt(t)),
    "log(t)": lambda g, t, lr: g * (math.log(t) + 1.0),
    "int(t)": lambda g, t, lr: g * int(t),
    "round(lr)": lambda g, t, lr: g * round(lr + 3.4),
    "float(lr)": lambda g, t, lr: g * float(lr),
    "abs(t - 3)": lambda g, t, lr: g * abs(t - 3),
    "t // 2": lambda g, t, lr: g * (t // 2),
    "t % 3": lambda g, t, lr: g * (-lr if t % 3 else lr),
    "t % 3 == 1": lambda g, t, lr: g * (-lr if t % 3 == 1 else lr),
    "divmod": lambda g, t, lr: g * divmod(t, 4)[1],
    "float(t) % 2": lambda g, t, lr: g * (-lr if float(t) % 2 else lr),
    "min(t, 3)": lambda g, t, lr: g * min(t, 3),
    "max(lr, 1 / t)": lambda g, t, lr: g * max(lr, 1 / t),
    "t in (1, 3)": lambda g, t, lr: g * (lr if t in (1, 3) else -lr),
    "t == 3": lambda g, t, lr: g * (lr if t == 3 else -lr),
    "dict": lambda g, t, lr: g * {1: 5.0, 2: 6.0}.get(t, 7.0),
    "t ** -0.5": lambda g, t, lr: g * t**-0.5,
    "2 ** -t": lambda g, t, lr: g * 2**-t,
    "format": lambda g, t, lr: g * float(f"{lr:.3f}"),
    "lr or 1": lambda g, t, lr: g * (lr or 1.0),
    "not lr": lambda g, t, lr: g * (3.0 if not lr else -2.0),
    "lr < inf": lambda g, t, lr: g * (-lr if lr < math.inf else 1.0),
    "lr != nan": lambda g, t, lr: g * (-lr if lr != math.nan else 1.0),
    "a guard that divides": lambda g, t, lr: g * (-lr if t == 1 or 1 / (t - 1) > 0.3 else lr),
}


def updates_of(tx: Any, lrs: list[float]) -> list[Tensor]:
    """The updates of consecutive steps, each with a learning rate of its own."""
    torch.manual_seed(3)
    p = torch.nn.Parameter(nonzero(4))
    optimizer = torchopt.Optimizer([p], tx)
    values = []
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        before, p.grad = p.detach().clone(), nonzero(4)
        optimizer.step()
        values.append(p.detach() - before)
    return values


@pytest.mark.parametrize("lrs", [[0.25] * 7, [0.0, 0.25, 0.5, 0.5], [1.0, 2.0, 0.5]], ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_never_get_lost(name: str, lrs: list[float]) -> None:
    """Fused or not, a rule gives the same values at every step and for every number."""
    cls = user_optimizer(lambda g, p, t, slots, lr: (NUMBERS[name](g, t, lr), slots), lr=0.1)
    expected = updates_of(cls().with_accelerated_op(False), lrs)
    assert_close(updates_of(cls(), lrs), expected, times=4)
    tx = cls()
    state = tx.init([nonzero(4)])
    state.step = 4  # so that the first program that is known is that of a later step
    tx.update([nonzero(4)], state, [nonzero(4)])
    assert_close(updates_of(tx, lrs), expected, times=4)


def test_a_lost_number_is_refused_with_a_reason() -> None:
    cls = user_optimizer(lambda g, p, t, slots, lr: (g * math.sqrt(lr), slots), lr=0.1)
    with pytest.raises(UntraceableError, match="numbers"):
        program_of(cls())
    (line,) = why(cls(), [torch.ones(2)])
    assert "cannot be followed" in line
    with pytest.raises(RuntimeError, match="cannot be followed"):
        cls().with_accelerated_op(True).update([torch.ones(2)], cls().init([torch.ones(2)]))


# Rules without a pointwise graph ------------------------------------------------------------------


#: Rules, and what the reason says; ``None`` if Python itself has stopped the rule.
REFUSED: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "if tensor": (lambda g: g if g > 0 else -g, "branches on the entries"),
    "and": (lambda g: (g > 0) and g, "branches on the entries"),
    "iteration": (lambda g: sum(x for x in g), "iterates over a tensor"),
    "shape": (lambda g: g * g.shape[0], "'shape'"),
    "numel": (lambda g: g * g.numel(), "'numel'"),
    "dtype": (lambda g: g if g.dtype == torch.float32 else -g, "'dtype'"),
    "norm": (lambda g: g / g.norm(), "'norm'"),
    "torch.sum": (lambda g: g / torch.sum(g), "'sum'"),
    "linalg": (lambda g: g / torch.linalg.vector_norm(g), "'linalg_vector_norm'"),
    "erf": (lambda g: torch.erf(g), "'erf'"),
    "in place": (lambda g: g.mul_(2.0), "'mul_'"),
    "item": (lambda g: g * g.item(), "'item'"),
    "rounding": (lambda g: torch.div(g, 3.0, rounding_mode="floor"), "'div'"),
    "constant tensor": (lambda g: g * torch.ones(3), "Tensor"),
    "returns a number": (lambda g: 1.0, "float"),
    "index": (lambda g: g * g[0], None),
    "len": (lambda g: g * len(g), None),
    "float()": (lambda g: g * float(g), None),
    "matmul": (lambda g: g @ g, None),
    "bits of numbers": (lambda g: g & 1, "'bitwise_and' in an unknown way .*numbers among"),
    "sum of truth values": (lambda g: g * ((g > 0) + (g < 1)), "'add' .*truth values"),
    "difference of truth values": (lambda g: (g > 0) - (g < 1), "'sub' .*truth values"),
    "nan_to_num": (lambda g: g.nan_to_num(), "without posinf and neginf"),
    "raises": (lambda g: {}["missing"], None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_reason(name: str) -> None:
    rule, reason = REFUSED[name]
    cls = user_optimizer(lambda g, p, t, slots: (rule(g), slots))
    with pytest.raises(Exception, match=reason) as caught:
        program_of(cls())
    if reason:
        assert isinstance(caught.value, UntraceableError), repr(caught.value)


@pytest.mark.parametrize(
    "name", ["shape", "norm", "erf", "in place", "index", "sum of truth values"]
)
def test_refused_rules_still_work(name: str) -> None:
    cls = user_optimizer(lambda g, p, t, slots: (REFUSED[name][0](g), slots))
    g = nonzero(3)
    (u,), _ = cls().update([g.clone()], cls().init([g]), inplace=False)
    assert torch.equal(u, REFUSED[name][0](g.clone()))
    (line,) = why(cls(), [g])
    assert line.startswith("User of")
    assert "its rule" in line


SLOTS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "gradient": lambda g, p, slots: (g, slots[0]),
    "parameter": lambda g, p, slots: (p, slots[0]),
    "swapped": lambda g, p, slots: (slots[1], slots[0]),
    "kept": lambda g, p, slots: (slots[0], slots[1] * 0.5 + g),
    "shifted": lambda g, p, slots: (g * 0.5, slots[0]),
    "constant": lambda g, p, slots: (torch.ones_like(g), slots[0]),
}


@pytest.mark.parametrize("face", ["functional", "object-oriented"])
@pytest.mark.parametrize("name", SLOTS)
def test_slots_that_are_inputs(name: str, face: str) -> None:
    """A new slot that is the parameter, the gradient or another slot is kept as such."""
    cls = user_optimizer(
        lambda g, p, t, slots, lr: (g * -lr, SLOTS[name](g, p, slots)), ("first", "second"), lr=0.1
    )
    results = []
    for setting in (None, False):
        torch.manual_seed(5)
        tx = cls().with_accelerated_op(setting)
        p = torch.nn.Parameter(nonzero(3))
        optimizer, state = torchopt.Optimizer([p], tx), tx.init([p.detach()])
        for _ in range(4):
            p.grad = nonzero(3)
            if face == "functional":
                (u,), state = tx.update([p.grad], state, [p.detach().clone()], inplace=False)
                p = torch.nn.Parameter(p.detach() + u)
                kept = [slot[0] for slot in state.slots.values()]
            else:
                optimizer.step()
                kept = [optimizer.state[p][slot] for slot in tx.slot_names()]
        results.append([p.detach(), *kept])
    assert_close(results[0], results[1])


def test_without_parameters_a_rule_sees_none() -> None:
    """What a rule does without parameters is not what it does with them, in any order."""
    cls = user_optimizer(lambda g, p, t, s: (g * 2.0 if p is None else g * 3.0, s))
    g = [nonzero(3, requires_grad=True)]
    tx = cls()
    for params, factor in ((None, 2.0), (g, 3.0), (None, 2.0)):
        (u,), _ = tx.update(g, tx.init(g), params, inplace=False)
        assert torch.equal(u, g[0] * factor)
        (first,) = torch.autograd.grad((u * g[0]).sum(), g, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), g)
        assert_close(second, torch.full_like(second, 2 * factor))


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_shared_value_is_one_node() -> None:
    """Thirty values, each used twice, are thirty nodes and not 2^30 paths."""

    def rule(g: Any, p: Any, t: Any, slots: Any) -> Any:
        for _ in range(30):
            g = g * 0.5 + g.abs()
        return g, slots

    with time_limit(5):
        program = program_of(user_optimizer(rule)())
    assert len(program.kernels["update"].text.splitlines()) < 100


# Functions ----------------------------------------------------------------------------------------

A, B, C = "abc"
#: Name -> calls of it; letters are tensors.
CALLS: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "add": [((A, B), {}), ((A, 0.5), {}), ((A, B), {"alpha": -0.3}), ((A, 2), {"alpha": 3})],
    "sub": [((A, B), {}), ((A, 0.5), {}), ((A, B), {"alpha": -0.3})],
    "subtract": [((A, B), {}), ((A, B), {"alpha": 2})],
    "mul": [((A, B), {}), ((A, -3), {})],
    "multiply": [((A, B), {})],
    "div": [((A, B), {}), ((A, 0.7), {})],
    "divide": [((A, B), {})],
    "true_divide": [((A, B), {})],
    "neg": [((A,), {})],
    "sqrt": [((C,), {})],
    "rsqrt": [((C,), {})],
    "reciprocal": [((A,), {})],
    "abs": [((A,), {})],
    "sign": [((A,), {})],
    "square": [((A,), {})],
    "pow": [
        *[((C, e), {}) for e in (2, 2.0, 0.5, 1, -0.5, 1.7, -2.3, 0)],
        *[((A, e), {}) for e in (2, 3, -1, -2, 5)],
        ((C, A), {}),
    ],
    **{name: [((A,), {})] for name in ("exp", "expm1", "tanh", "sigmoid", "negative", "absolute")},
    **{name: [((C,), {})] for name in ("log", "log1p", "sgn", "logical_not")},
    **{name: [((A, B), {})] for name in ("logical_and", "logical_or", "logical_xor")},
    **{name: [((A,), {})] for name in ("isnan", "isinf", "isfinite")},
    "nan_to_num": [((A, 0.5, 1.5, -1.5), {}), ((A,), {"posinf": 2.0, "neginf": -2.0})],
    "maximum": [((A, B), {}), ((B, A), {})],
    "minimum": [((A, B), {}), ((B, A), {})],
    "clamp": [
        ((A, -0.5, 0.5), {}),
        ((A,), {"min": 0.1}),
        ((A,), {"max": 0.1}),
        ((A,), {"min": -0.3, "max": 0.4}),
        ((A, 0.5, -0.5), {}),
    ],
    "clip": [((A, -0.5, 0.5), {})],
    "relu": [((A,), {})],
    "lerp": [((A, B, w), {}) for w in (0.0, 0.3, 0.9, 1.0, C)],
    "addcmul": [((A, B, C), {}), ((A, B, C), {"value": -0.2})],
    "addcdiv": [((A, B, C), {}), ((A, B, C), {"value": -0.2})],
    "clone": [((A,), {})],
    "zeros_like": [((A,), {})],
    "ones_like": [((A,), {})],
    "full_like": [((A, 0.3), {})],
    **{name: [((A, B), {}), ((A, 0.3), {}), ((A, A), {})] for name in ("lt", "gt", "le", "ge")},
    **{name: [((A, B), {}), ((A, A), {})] for name in ("eq", "ne")},
    **{name: [((A, B), {})] for name in ("less", "less_equal", "greater", "greater_equal")},
    "not_equal": [((A, B), {})],
    # below: they need conditions
    **{name: [] for name in ("where", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not")},
}


def tensors_abc() -> dict[str, Tensor]:
    return {A: nonzero(40), B: nonzero(40), C: nonzero(40).abs()}


def trace_and_evaluate(function: Callable[..., Any], given: dict[str, Tensor]) -> Tensor:
    node = function(**{name: SymbolicTensor(input_node(name)) for name in given}).node
    return evaluate({"y": node}, given, constant_value)["y"]


def test_every_function_has_a_call() -> None:
    assert CALLS.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize("name", [n for n in CALLS if CALLS[n]])
def test_function(name: str) -> None:
    given = tensors_abc()
    for args, kwargs in CALLS[name]:
        ways = [getattr(torch, name)]
        if hasattr(Tensor, name):
            ways.append(lambda first, *rest, **kw: getattr(first, name)(*rest, **kw))
        for way in ways:

            def call(way: Any = way, args: Any = args, kwargs: Any = kwargs, **t: Any) -> Any:
                return way(*(t.get(x, x) if isinstance(x, str) else x for x in args), **kwargs)

            assert_close(trace_and_evaluate(call, given).double(), call(**given).double(), times=10)


OPERATORS: dict[str, Callable[..., Any]] = {
    "+": lambda a, b, c: (a + b) + 1 + (2.5 + c),
    "-": lambda a, b, c: (a - b) - 1 - (2.5 - c),
    "*": lambda a, b, c: (a * b) * 3 * (0.5 * c),
    "/": lambda a, b, c: (a / b) / 3 / (0.5 / c),
    "**": lambda a, b, c: a**2 + c**0.5 + c**-0.5,
    "neg, abs": lambda a, b, c: -a + abs(b),
    "comparisons": lambda a, b, c: torch.where(a < b, a, c) + torch.where(a >= c, 1.0, b),
    "reflected comparisons": lambda a, b, c: torch.where(a > 0.3, a, b) - torch.where(c <= 1, a, 2),
    "equal": lambda a, b, c: torch.where(a == a, b, c) + torch.where(a != a, b, 0.5),
    "methods": lambda a, b, c: a.add(b, alpha=2).mul(c).sub(0.3).div(c).square().clamp(0.1, 2.0),
    "truth": lambda a, b, c: (a > 0) * b + (a <= 0) * c,
    "logic": lambda a, b, c: (
        torch.where((a > 0) & (b > 0) | ~(c > 0.5), a, b)
        + torch.where((a > 0) ^ (b > 0), c, 0.0)
        + a * torch.bitwise_not(torch.bitwise_or(a > b, torch.bitwise_and(b > 0, c > 1)))
    ),
    "powers": lambda a, b, c: c**a + 1.5**b - c**1.3,
    "augmented": lambda a, b, c: augmented(a, b),
}


def augmented(a: Any, b: Any) -> Any:
    a += b
    a *= 2
    a -= b
    a /= 3
    return a


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str) -> None:
    given = tensors_abc()
    actual = trace_and_evaluate(OPERATORS[name], given)
    assert_close(actual, OPERATORS[name](**{k: v.clone() for k, v in given.items()}), times=10)


def test_nan_goes_where_torch_lets_it_go() -> None:
    nan, inf = math.nan, math.inf
    a = torch.tensor([nan, 1.0, nan, inf, -inf, nan, 0.5])
    b = torch.tensor([1.0, nan, nan, nan, 1.0, -inf, inf])
    for function in (
        lambda a, b: torch.maximum(a, b),
        lambda a, b: torch.minimum(a, b),
        lambda a, b: torch.clamp(a, -0.5, 0.75) + 0 * torch.clamp(b, -0.5, 0.75),
        lambda a, b: torch.relu(a),
        lambda a, b: torch.where(a > b, a, b),
        lambda a, b: torch.where(a != a, 0.0, a),
        lambda a, b: a.abs(),
        lambda a, b: torch.where(torch.isfinite(a) & ~torch.isnan(b), a, 0.25),
        lambda a, b: torch.where(torch.isinf(a) | torch.isnan(b), 0.5, a),
        lambda a, b: (
            torch.nan_to_num(a, 0.1, 0.2, -0.2) + b.nan_to_num(0.0, posinf=1.0, neginf=2.0)
        ),
        lambda a, b: torch.where(torch.logical_not(a), b, a) + torch.tanh(b),
    ):
        actual = trace_and_evaluate(function, {"a": a, "b": b})
        assert torch.equal(actual.nan_to_num(7.0), function(a=a, b=b).nan_to_num(7.0)), function
