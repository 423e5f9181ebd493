"""The fused update under every way to differentiate and transform it, against the rule."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, every_fused_case, every_fused_kind, named
from conftest import nonzero
from fusing import kernel_calls_fixture, needs_library  # noqa: F401
from tolerances import GRADCHECK, assert_close
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap

import torchopt
from torchopt import OptState


pytestmark = needs_library
BATCH = 3
ADAM = named("adam-amsgrad-decay")


class Problem:
    """Third updates of two parameters, as functions of lists of tensors."""

    def __init__(self, case: Case, setting: bool | None) -> None:
        self.tx = case.smooth().with_accelerated_op(setting)
        torch.manual_seed(2)
        self.p = [nonzero(3), nonzero(2, 2)]
        self.state = self.tx.init(self.p)
        for _ in range(2):
            g = [nonzero(3), nonzero(2, 2)]
            _, self.state = self.tx.update(g, self.state, self.p, inplace=False)
        self.g = [nonzero(3), nonzero(2, 2)]
        self.slots = {name: list(slot) for name, slot in self.state.slots.items()}

    def update(self, g: Any = None, p: Any = None, slots: Any = None) -> list[Tensor]:
        """Updates and new slots."""
        slots = self.slots if slots is None else slots
        state = OptState(self.state.step, slots, self.state.counters)
        u, new = self.tx.update(g or self.g, state, p or self.p, inplace=False)
        return [*u, *(x for slot in new.slots.values() for x in slot if x is not None)]

    def total(self, g: Any = None, p: Any = None, slots: Any = None) -> Tensor:
        """A scalar that every output enters by itself, and not linearly.

        The gradients too: there are rules of which no output depends on them smoothly.
        """
        outputs = [*self.update(g, p, slots), *(x.square() for x in g or self.g)]
        return sum(((k + 1) * x.sin()).sum() for k, x in enumerate(outputs))  # pyright: ignore

    def of_first(self, x: Tensor) -> Tensor:
        """The scalar as a function of the first gradient only."""
        return self.total([x, self.g[1]])


def batched(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: torch.stack([x * (1 + 0.1 * k) for k in range(BATCH)]), tree
    )


def third_derivative(q: Problem) -> Any:
    first = lambda x: grad(q.of_first)(x).cos().sum()  # noqa: E731
    second = lambda x: grad(first)(x).sin().sum()  # noqa: E731
    return grad(second)(q.g[0])


def by_vjp(q: Problem, x: Tensor) -> Tensor:
    """The derivative, taken when the level that recorded it has ended."""
    value, vjp = torch.func.vjp(q.of_first, x)
    return vjp(torch.ones_like(value))[0]


def by_autograd_outside(q: Problem) -> list[Tensor]:
    x = q.g[0].clone().requires_grad_()
    first = grad(q.of_first)(x)
    return [first, *torch.autograd.grad(first.sin().sum(), x)]


def without_grad_mode(q: Problem) -> Any:
    with torch.no_grad():
        return grad(q.of_first)(q.g[0])


def partly_without_grad_mode(q: Problem) -> Any:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            constant = q.of_first(x)
        return q.of_first(x) * constant

    return grad(function)(q.g[0])


TRANSFORMS: dict[str, Callable[[Problem], Any]] = {
    "grad by gradients": lambda q: grad(q.total)(q.g),
    "grad by parameters": lambda q: grad(lambda p: q.total(None, p))(q.p),
    "grad by slots": lambda q: grad(lambda s: q.total(None, None, s))(q.slots) if q.slots else [],
    "third derivative": third_derivative,
    "jvp": lambda q: jvp(q.of_first, (q.g[0],), (torch.ones_like(q.g[0]),)),
    "jvp of grad": lambda q: jvp(grad(q.of_first), (q.g[0],), (torch.ones_like(q.g[0]),)),
    "grad of jvp": lambda q: grad(
        lambda x: jvp(q.of_first, (x,), (torch.ones_like(x),))[1],
    )(q.g[0]),
    "jacrev": lambda q: jacrev(lambda x: q.update([x, q.g[1]]))(q.g[0]),
    "jacrev of grad": lambda q: jacrev(grad(q.of_first))(q.g[0]),
    "jacfwd": lambda q: jacfwd(lambda x: q.update([x, q.g[1]]))(q.g[0]),
    "hessian": lambda q: hessian(q.of_first)(q.g[0]),
    "vmap over an ensemble": lambda q: vmap(q.update)(
        *map(batched, (q.g, q.p, q.slots)[: 3 if q.slots else 2])
    ),
    "vmap over gradients": lambda q: vmap(q.update)(batched(q.g)),
    "vmap over parameters": lambda q: vmap(lambda p: [*q.update(None, p), p[0]])(batched(q.p)),
    "vmap of some gradients": lambda q: vmap(lambda x: q.update([x, q.g[1]]))(batched(q.g[0])),
    "vmap of the last dimension": lambda q: vmap(
        lambda x: q.update([x, q.g[1]])[0], in_dims=1, out_dims=1
    )(batched(q.g[0]).t()),
    "vmap in pieces": lambda q: vmap(q.update, chunk_size=2)(batched(q.g)),
    "vmap of grad": lambda q: vmap(grad(q.total))(batched(q.g)),
    "vmap of grad, parameters shared": lambda q: vmap(
        grad(lambda p, g: q.total(g, p)), in_dims=(None, 0)
    )(q.p, batched(q.g)),
    "grad of vmap": lambda q: grad(
        lambda p: vmap(lambda g: q.total(g, p))(batched(q.g)).square().sum()
    )(q.p),
    "grad of vmap of grad": lambda q: grad(
        lambda p: vmap(grad(lambda g: q.total(g, p)))(batched(q.g))[0].sin().sum()
    )(q.p),
    "nested vmap": lambda q: vmap(
        vmap(lambda p, g: q.update(g, p), in_dims=(None, 0)), in_dims=(0, None)
    )(batched(q.p), batched(q.g)),
    "nested vmap of grad": lambda q: vmap(
        vmap(grad(lambda p, g: q.total(g, p)), in_dims=(None, 0)), in_dims=(0, None)
    )(batched(q.p), batched(q.g)),
    "vmap of hessian": lambda q: vmap(hessian(q.of_first))(batched(q.g[0])),
    "vjp": lambda q: by_vjp(q, q.g[0]),
    "grad of vjp": lambda q: grad(lambda x: by_vjp(q, x).sin().sum())(q.g[0]),
    "vmap of grad of vjp": lambda q: vmap(grad(lambda x: by_vjp(q, x).sin().sum()))(
        batched(q.g[0])
    ),
    "autograd of grad": by_autograd_outside,
    "grad without grad mode": without_grad_mode,
    "grad partly without grad mode": partly_without_grad_mode,
    "functionalize": lambda q: functionalize(q.update)(q.g),
    "hessian by batches": lambda q: torch.autograd.functional.hessian(
        q.of_first, q.g[0], vectorize=True
    ),
    "hessian forward over reverse": lambda q: torch.autograd.functional.hessian(
        q.of_first, q.g[0], vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
}
#: Those whose values come from kernels.
BY_RULES = ("jvp", "jac", "hessian", "functionalize")
FUSED = [name for name in TRANSFORMS if not any(x in name for x in BY_RULES)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TRANSFORMS)
@every_fused_case
def test_transform(case: Case, name: str, kernel_calls: list[int]) -> None:
    expected = TRANSFORMS[name](Problem(case, False))
    assert not kernel_calls
    problem = Problem(case, None)
    del kernel_calls[:]
    actual = TRANSFORMS[name](problem)
    if name in FUSED and (problem.slots or "slots" not in name):
        assert kernel_calls, "no kernel took part"
    flat = torch.utils._pytree.tree_leaves
    assert flat(expected) or not problem.slots
    assert_close(flat(actual), flat(expected), times=100)


@every_fused_kind
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    problem = Problem(case, None)
    slots = [x for slot in problem.slots.values() for x in slot]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        rest = list(inputs[4:])
        own = {name: [rest.pop(0), rest.pop(0)] for name in problem.slots}
        return tuple(problem.update(list(inputs[:2]), list(inputs[2:4]), own))

    inputs = [x.detach().clone().requires_grad_() for x in (*problem.g, *problem.p, *slots)]
    assert all("Fused" in x.grad_fn.name() for x in function(*inputs))  # pyright: ignore
    assert gradcheck(function, inputs, check_batched_grad=True, check_forward_ad=True, **GRADCHECK)
    assert gradgradcheck(
        function, inputs, check_batched_grad=True, check_fwd_over_rev=True, **GRADCHECK
    )


# Graphs -------------------------------------------------------------------------------------------


def leaves(problem: Problem) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in (*problem.g, *problem.p)]


@every_fused_case
def test_third_order_by_autograd(case: Case) -> None:
    found = []
    for setting in (None, False):
        problem = Problem(case, setting)
        inputs = leaves(problem)
        value, orders = problem.total(inputs[:2], inputs[2:]), []
        for _ in range(3):
            grads = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
            orders += grads
            value = sum(x.sin().sum() for x in grads)
            if not value.requires_grad:
                break
        found.append(orders)
    assert_close(found[0], found[1], times=100)


def test_only_what_is_used_is_differentiated() -> None:
    """Any part of the outputs, by any part of the inputs."""
    problem, rule = Problem(ADAM, None), Problem(ADAM, False)
    count = len(problem.update())
    for outputs in ([0], [1], [2], [count - 1], [0, 3], range(2, count)):
        for wanted in ([0], [1], [2, 3], [0, 3]):
            found = []
            for q in (problem, rule):
                inputs = [x.clone() for x in (*q.g, *q.p)]
                for k in wanted:
                    inputs[k].requires_grad_()
                values = q.update(inputs[:2], inputs[2:])
                total = sum(values[k].sin().sum() for k in outputs)
                own = [inputs[k] for k in wanted]
                found.append([torch.zeros_like(x) for x in own])
                if total.requires_grad:
                    found[-1] = list(torch.autograd.grad(total, own, materialize_grads=True))
            assert_close(found[0], found[1])


def test_what_needs_no_gradient_gets_none() -> None:
    problem = Problem(ADAM, None)
    u = problem.update()
    assert not any(x.requires_grad for x in u)
    g = [x.clone().requires_grad_() for x in problem.g]
    with torch.no_grad():
        assert not any(x.requires_grad for x in problem.update(g))
    with torch.inference_mode():
        assert all(x.is_inference() for x in problem.update(g))


def test_retain_graph_and_a_freed_graph() -> None:
    problem = Problem(ADAM, None)
    inputs = leaves(problem)
    total = problem.total(inputs[:2], inputs[2:])
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    assert_close(torch.autograd.grad(total, inputs), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, inputs)


def test_inputs_that_change_afterwards_are_noticed() -> None:
    problem = Problem(ADAM, None)
    g = [x.clone().requires_grad_() for x in problem.g]
    p = [x.clone() for x in problem.p]
    total = problem.total(g, p)
    p[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, g)


@every_fused_case
def test_batched_gradients(case: Case) -> None:
    found = []
    for setting in (None, False):
        problem = Problem(case, setting)
        x = problem.g[0].clone().requires_grad_()
        u, eye = problem.update([x, problem.g[1]])[0], torch.eye(3, dtype=x.dtype)
        rows = torch.autograd.grad(u, x, eye, is_grads_batched=True, retain_graph=True)[0]
        (slope,) = torch.autograd.grad(u.sin().sum(), x, create_graph=True)
        second = torch.zeros(3, 3)
        if slope.requires_grad:
            second = torch.autograd.grad(slope, x, eye, is_grads_batched=True)[0]
        found.append([rows, second.double()])
    assert_close(found[0], found[1], times=10)


@every_fused_case
def test_batched_gradients_can_be_differentiated(case: Case) -> None:
    """``torch.autograd.functional.jacobian(vectorize=True, create_graph=True)`` asks for them."""
    found = []
    for setting, batched in ((None, True), (False, True), (False, False)):
        problem = Problem(case, setting)
        by = [x.clone().requires_grad_() for x in (*problem.g, *problem.p)]
        first = sum((x.sin() * x.detach().cos()).sum() for x in problem.update(by[:2], by[2:]))
        first = first + sum(x.pow(3).sum() for x in by)  # there are rules without a slope
        grads = torch.autograd.grad(first, by, create_graph=True, materialize_grads=True)
        wanted = [x for x in grads if x.requires_grad]
        flat = torch.cat([x.flatten() for x in wanted])
        rows = torch.linspace(0.5, 1.5, 2 * len(flat), dtype=flat.dtype).view(2, -1)
        if batched:
            second = torch.autograd.grad(flat, by, rows, is_grads_batched=True, create_graph=True)
        else:
            each = [torch.autograd.grad(flat, by, r, create_graph=True) for r in rows]
            second = [torch.stack(column) for column in zip(*each)]
        total = sum(x.square().sum() for x in second)
        found.append([*second, *torch.autograd.grad(total, by)])  # pyright: ignore
    assert_close(found[0], found[1], times=100)
    assert_close(found[1], found[2], times=100)


@every_fused_case
def test_batches_of_first_gradients_can_be_differentiated(case: Case) -> None:
    found = []
    for setting in (None, False):
        problem = Problem(case, setting)
        by = [x.clone().requires_grad_() for x in (*problem.g, *problem.p)]
        values = problem.update(by[:2], by[2:])
        flat = torch.cat([x.sin().flatten() for x in (*values, *by)])
        rows = torch.linspace(0.5, 1.5, 2 * len(flat), dtype=flat.dtype).view(2, -1)
        first = torch.autograd.grad(flat, by, rows, is_grads_batched=True, create_graph=True)
        total = sum(x.square().sum() for x in first)
        found.append([*first, *torch.autograd.grad(total, by)])  # pyright: ignore
    assert_close(found[0], found[1], times=100)


def test_forward_mode_through_a_graph_recorded_before() -> None:
    """A cotangent may be dual although the update was not: its tangent is not zero."""
    found = []
    for setting in (None, False):
        problem = Problem(ADAM, setting)
        x = problem.g[0].clone().requires_grad_()
        u = problem.update([x, problem.g[1]])[0]
        with forward_ad.dual_level():
            bar = forward_ad.make_dual(torch.ones_like(x), torch.arange(3.0, dtype=x.dtype) + 1)
            (slope,) = torch.autograd.grad(u, x, bar)
            found.append([*forward_ad.unpack_dual(slope)])
    assert_close(found[0], found[1])


@every_fused_case
def test_nothing_is_saved_but_inputs(case: Case) -> None:
    """Zero bytes are kept for backward beyond tensors that exist anyway."""
    problem = Problem(case, None)
    g, p = leaves(problem)[:2], leaves(problem)[2:]
    slots = [x for slot in problem.slots.values() for x in slot]
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.data_ptr()) or x, lambda x: x
    ):
        outputs = problem.update(g, p)
    known = {x.data_ptr() for x in (*g, *p, *slots, *outputs)}
    assert saved
    assert set(saved) <= known


def test_saved_tensors_may_be_packed() -> None:
    problem = Problem(ADAM, None)
    expected = torch.autograd.grad(problem.total(*[(x := leaves(problem))[:2]]), x[:2])
    inputs = leaves(problem)
    with torch.autograd.graph.save_on_cpu():
        total = problem.total(inputs[:2])
    assert_close(torch.autograd.grad(total, inputs[:2]), expected)


def test_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    problem = Problem(ADAM, None)
    expected = grad(problem.total)(problem.g)
    inputs = leaves(problem)[:2]
    total = checkpoint(lambda *g: problem.total(list(g)), *inputs, use_reentrant=False)
    assert_close(list(torch.autograd.grad(total, inputs)), expected)


def test_graphs_are_freed() -> None:
    problem = Problem(ADAM, None)
    inputs = leaves(problem)
    outputs = problem.update(inputs[:2], inputs[2:])
    node = weakref.ref(outputs[0].grad_fn)
    gc.collect()
    del outputs
    assert node() is None


# Recording ----------------------------------------------------------------------------------------


def test_tensors_without_data(kernel_calls: list[int]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for setting in (None, True):
        tx = torchopt.adam(0.1).with_accelerated_op(setting)
        with FakeTensorMode():
            g = [torch.ones(3)]
            (u,), _ = tx.update(g, tx.init(g), inplace=False)
            assert u.shape == (3,)
    assert not kernel_calls


def test_traces_hold_the_rule_and_no_constants() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    problem = Problem(ADAM, None)
    function = lambda x: problem.update([x, problem.g[1]])[0]  # noqa: E731
    other = nonzero(3)
    traced = make_fx(function)(problem.g[0])
    assert_close(traced(other), function(other))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.trace(function, (problem.g[0],), check_trace=False)
    assert_close(scripted(other), function(other))


def test_compiled() -> None:
    """``torch.compile`` takes the rules, which it fuses itself."""
    tx = torchopt.adam(0.1)
    g, state = [nonzero(5)], tx.init([nonzero(5)])

    def step(g: Any, state: Any) -> Any:
        return tx.update(g, state, inplace=False)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (actual,), new = compiled(g, state)
    (expected,), _ = step(g, state)
    assert_close(actual, expected)
    (again,), _ = compiled(g, new)
    assert_close(again, step(g, new)[0][0])
