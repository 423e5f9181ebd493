"""No adjoint cuts a closure without a word: the derivative is right, or an error names it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchopt
from torchopt.diff import (
    Auto,
    Checkpointed,
    Forward,
    Mixed,
    Offloaded,
    Truncated,
    Unrolled,
    grad_and_value,
    unroll,
)


ADJOINTS = {
    "1": Checkpointed(),
    "2": Checkpointed(2, graphs=2),
    "sqrt": Checkpointed("sqrt"),
    "log": Checkpointed("log", store="cpu"),
    "revolve": Checkpointed("revolve", slots=2),
    "forward": Forward(),
    "mixed": Mixed(),
    "offloaded": Offloaded(),
    "auto": Auto("4KiB"),
    "truncated": Truncated(99),
}
REPLAYED = ["1", "2", "sqrt", "log", "revolve"]


def number(value: float = 0.3) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


GLOBAL = number()
Case = tuple[Callable[[Tensor], Tensor], list[Tensor]]


class Holder:
    shared = number(0.7)

    def __init__(self) -> None:
        self.t = number()
        self.deep: Any = {"a": [(number(0.4),)]}

    def loss(self, w: Tensor) -> Tensor:
        return (w * self.t + self.deep["a"][0][0]).sin().sum() * Holder.shared


class Product(torch.autograd.Function):
    """A product, whose operands nobody sees but the graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a * b

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b = ctx.saved_tensors
        return grads[0] * b, (grads[0] * a).sum()

    @staticmethod
    def jvp(ctx: Any, *along: Any) -> Any:
        a, b = ctx.saved_tensors
        return sum(x * y for x, y in zip(along, (b, a)) if x is not None)


def default() -> Case:
    t = number()

    def loss(w: Tensor, t: Tensor = t, *, u: Tensor = Holder.shared) -> Tensor:
        return (w * t + u).sin().sum()

    return loss, [t, Holder.shared]


def module() -> Case:
    torch.manual_seed(0)
    net = nn.Bilinear(2, 2, 3).double()
    return lambda w: net(w.sin(), w).cos().sum(), list(net.parameters())


def called() -> Case:
    torch.manual_seed(0)
    net = nn.Linear(2, 2).double()
    weights = {k: v.detach().clone().requires_grad_() for k, v in net.named_parameters()}
    call = torch.func.functional_call
    return lambda w: call(net, weights, (w,)).sin().sum(), list(weights.values())


def chain() -> Case:
    t = number()
    a = t.exp()
    b = a.sin()
    return lambda w: (w * a + b * t).sin().sum(), [t]


def view() -> Case:
    t = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    part = t[:1]
    return lambda w: (w * part + t).sin().sum(), [t]


def hidden() -> Case:
    t = number()
    return lambda w: Product.apply(w, 2 * t).sin().sum(), [t]


def holder() -> Case:
    held = Holder()
    return held.loss, [held.t, held.deep["a"][0][0], Holder.shared]


def partial() -> Case:
    t = number()
    return functools.partial(lambda w, t: (w * t).sin().sum(), t=t), [t]


def leaf_inside() -> Case:
    t = number()

    def loss(w: Tensor) -> Tensor:
        made = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        return (w * t + made).sin().sum()

    return loss, [t]


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (default, module, called, chain, view, hidden, holder, partial, leaf_inside)
} | {"global": lambda: (lambda w: (w * GLOBAL).sin().sum(), [GLOBAL])}


def derivatives(case: str, adjoint: Any) -> list[Tensor]:
    """Return first and second derivatives by the start and what the loss closes over."""
    loss, by = CASES[case]()
    start = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)

    def step(w: Any, _: None) -> Any:
        if isinstance(adjoint, Offloaded):
            w = w if w.requires_grad else w.detach().requires_grad_()
            (g,) = torch.autograd.grad(loss(w), w, create_graph=True)
        elif isinstance(adjoint, Mixed):
            g = grad_and_value(loss)(w)[0]
        else:
            g = torch.func.grad(loss)(w)
        return w - 0.3 * g, None

    w, _ = unroll(step, start, length=5, adjoint=adjoint)
    first = torch.autograd.grad(w.square().sum(), [start, *by], create_graph=True)
    second = torch.autograd.grad([g.square().sum() for g in first], [start, *by])
    return [g.detach() for g in (*first, *second)]


@pytest.mark.parametrize("case", CASES)
def test_what_a_loss_closes_over_is_differentiated(case: str) -> None:
    expected = derivatives(case, Unrolled())
    assert all(g.any() for g in expected)
    for name, adjoint in ADJOINTS.items():
        found = derivatives(case, adjoint)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, msg=name)


# Steps that are not like the first ---------------------------------------------------------------


W = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", [*REPLAYED, "forward"])
def test_a_tensor_that_a_later_step_reads_first_is_differentiated(name: str) -> None:
    """Also by it alone: then the derivative does not pass through anything that was known."""
    rates = [number(0.9), number(0.5).double()]
    unread = number(0.1)

    def step(carry: Any, _: None) -> Any:
        w, n = carry
        return (w * rates[min(n, 1)] + (unread if n > 9 else 0), n + 1), None

    def differentiated(adjoint: Any) -> list[Tensor | None]:
        (w, _), _ = unroll(step, (W, 0), length=4, adjoint=adjoint)
        loss = w.sum() + rates[1] ** 2
        found = [torch.autograd.grad(loss, r, retain_graph=True)[0] for r in rates]
        return [*found, *torch.autograd.grad(loss, unread, allow_unused=True)]

    if name == "forward":
        with pytest.raises(RuntimeError, match=r"depends on 'rates\[1\]'.*first step does not"):
            differentiated(ADJOINTS[name])
        return
    found, expected = differentiated(ADJOINTS[name]), differentiated(Unrolled())
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-12)
    assert found[2] is expected[2] is None


class Registry:
    """Its tensors are nowhere in a function that calls its method by a global name."""

    late = number(0.5).double()

    def __call__(self, use: bool) -> Any:
        return Registry.late if use else 1.0


@pytest.mark.parametrize("name", REPLAYED)
@pytest.mark.parametrize("when", ["from the second on", "in the last", "in the middle"])
def test_a_hidden_tensor_that_a_later_step_reads_first(name: str, when: str) -> None:
    """The second and the last step are looked at too; what only others read is named."""
    rate, used = Registry(), {"from the second on": range(1, 9), "in the last": [8]}

    def step(carry: Any, _: None) -> Any:
        w, n = carry
        return (w * rate(n in used.get(when, [4])), n + 1), None

    def differentiated(adjoint: Any) -> list[Tensor]:
        (w, _), _ = unroll(step, (W, 0), length=9, adjoint=adjoint)
        loss = w.sum() + Registry.late**2
        return list(torch.autograd.grad(loss, [W, Registry.late]))

    if when == "in the middle":
        with pytest.raises(RuntimeError, match=r"depends on a tensor.*first step does not read"):
            differentiated(ADJOINTS[name])
        return
    expected = differentiated(Unrolled())
    torch.testing.assert_close(differentiated(ADJOINTS[name]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", REPLAYED)
def test_leaves_that_a_step_makes_itself_are_not_from_outside(name: str) -> None:
    def step(carry: Any, _: None) -> Any:
        w, n = carry
        own = nn.Parameter(torch.ones(2, dtype=torch.float64))
        return ((w * own).sin() if n else w.sin(), n + 1), None

    (w, _), _ = unroll(step, (W, 0), length=4, adjoint=ADJOINTS[name])
    (plain, _), _ = unroll(step, (W, 0), length=4)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), W) for x in (w, plain)))


@pytest.mark.parametrize("name", REPLAYED)
def test_variables_may_have_other_values_in_the_backward_pass(name: str) -> None:
    """As in a loop over tasks whose losses are added up, and differentiated after it."""

    def total(adjoint: Any) -> Tensor:
        result = torch.zeros((), dtype=torch.float64)
        for task in range(3):
            scale = number(0.2 + task).detach()

            def loss(w: Tensor) -> Tensor:
                return (scale * w).sin().sum()  # noqa: B023

            def step(w: Tensor, x: Tensor) -> Any:
                return w - 0.1 * x * torch.func.grad(loss)(w) * scale, None  # noqa: B023

            xs = torch.arange(5.0, dtype=torch.float64)
            result = result + unroll(step, W, xs, adjoint=adjoint)[0].square().sum()
        return torch.autograd.grad(result, W)[0]

    torch.testing.assert_close(total(ADJOINTS[name]), total(Unrolled()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", REPLAYED)
@pytest.mark.parametrize("how", ["attribute", "in place", "data"])
def test_what_has_changed_before_the_backward_pass_is_refused(name: str, how: str) -> None:
    held = Holder()
    held.t = torch.ones(2, dtype=torch.float64)
    step = lambda w, _: (w - 0.1 * torch.func.grad(held.loss)(w), None)  # noqa: E731
    w, _ = unroll(step, {"w": W}["w"], length=4, adjoint=ADJOINTS[name])
    if how == "attribute":
        held.t = 3 * held.t
    elif how == "in place":
        held.t.mul_(3)
    else:
        held.t.data.mul_(3)
    said = "'held.t', which was changed in place" if how == "in place" else "gives another value"
    with pytest.raises(RuntimeError, match=said):
        torch.autograd.grad(w.sum(), W)


@pytest.mark.parametrize("name", [*REPLAYED, "forward"])
def test_a_state_that_is_another_one_only_once_is_noticed(name: str) -> None:
    """The second and the third call give the same, and the first does not."""
    made = [torch.ones(2, dtype=torch.float64)]

    def step(w: Tensor, x: Tensor) -> Any:
        last = made[-1]
        made.append(x)
        return (w * last).sin(), None

    def differentiated() -> None:
        w, _ = unroll(step, W, torch.full((3, 2), 0.5).double(), adjoint=ADJOINTS[name])
        torch.autograd.grad(w.sum(), W)

    with pytest.raises(RuntimeError, match="gives another value of the carry"):
        differentiated()


# Writes that are not counted ---------------------------------------------------------------------


def batch_norm(mean: Tensor, w: Tensor) -> Tensor:
    var = torch.ones(2, dtype=torch.float64)
    x = torch.arange(6.0, dtype=torch.float64).view(3, 2)
    return nn.functional.batch_norm(x * w, mean, var, training=True).sin().mean(0)


def through_data(mean: Tensor, w: Tensor) -> Tensor:
    mean.data += 1
    return w.sin()


def through_a_view(mean: Tensor, w: Tensor) -> Tensor:
    mean.data[:1].mul_(0.5).add_(1)
    return w.sin()


@pytest.mark.parametrize("name", [*REPLAYED, "forward"])
@pytest.mark.parametrize("write", [batch_norm, through_data, through_a_view])
def test_writes_that_no_version_counts_are_refused_and_undone(name: str, write: Any) -> None:
    mean = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="changes 'mean' in place"):
        unroll(lambda w, _: (w + write(mean, w), None), W, length=3, adjoint=ADJOINTS[name])
    assert not mean.any()


def test_a_choice_leaves_no_trace_in_buffers() -> None:
    mean = torch.zeros(2, dtype=torch.float64)
    step = lambda w, _: (w + batch_norm(mean, w), None)  # noqa: E731
    Auto("1MiB").choose(step, W, length=3)
    assert not mean.any()


# In a block --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [Checkpointed(), Checkpointed("sqrt"), Truncated(9)], ids=repr)
def test_a_loss_of_what_was_computed_before_its_function_is_refused(adjoint: Any) -> None:
    """The gradient by way of ``z`` would be missing; a weight itself is a constant, an anchor."""
    net, x = nn.Linear(2, 2).double(), torch.randn(4, 2).double()
    anchor = list(net.parameters())
    with torchopt.inner_loop(net, torchopt.sgd(0.1), adjoint=adjoint) as inner:
        for _ in range(2):
            z = net(x)
            with pytest.raises(ValueError, match=r"reads 'z', which was computed from the present"):
                inner.step(lambda: (net(x).square() + z.sin()).mean())  # noqa: B023
            inner.step(
                lambda: (
                    (net(x).square() + z.detach().sin()).mean()  # noqa: B023
                    + sum((p - q).square().sum() for p, q in zip(net.parameters(), anchor))
                )
            )
