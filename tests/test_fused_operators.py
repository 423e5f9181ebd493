"""The operators ``torch.ops.torchopt``, and compiled calls that require kernels."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, every, every_fused_kind, every_fused_state, named, rows, state_kind
from fusing import SHAPES, data, kernel_calls_fixture, needs_library  # noqa: F401
from pointwise import program_of, user_optimizer, values_of
from tolerances import assert_close
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import torchopt
from torchopt.base import tree
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.generate import bytecode
from torchopt.kernels.generate.written import read, write
from torchopt.kernels.library import operators as operators  # registers them


pytestmark = needs_library

ADAM = named("adam").tx
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str
)
recorded = pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires-grad"])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(
    make: Any, dtype: torch.dtype, requires_grad: bool = False, mode: str = "update"
) -> tuple[Any, ...]:
    """Arguments of ``torch.ops.torchopt.update``; one tensor is transposed."""
    tx = make()
    kernel = program_of(tx).kernels[mode]
    torch.manual_seed(0)
    tensors = []
    for operand in kernel.inputs:
        own = dtype if operand in "gp" or dtype == torch.float64 else torch.float32
        for shape in (*SHAPES, (2, 3)):
            x = torch.rand(shape, dtype=own) + 0.1
            tensors.append((x.mT if shape == (2, 3) else x).requires_grad_(requires_grad))
    return tensors, write(kernel), values_of(tx), None, [2], None


# The operators ------------------------------------------------------------------------------------


@pytest.mark.sampled(5)
@every_fused_state
@every_dtype
@recorded
def test_opcheck_of_the_update(case: Case, dtype: torch.dtype, requires_grad: bool) -> None:
    torch.library.opcheck(torch.ops.torchopt.update, arguments(case.tx, dtype, requires_grad))


@pytest.mark.sampled(5)
@every_fused_state
@every_dtype
@recorded
def test_opcheck_of_its_backward(case: Case, dtype: torch.dtype, requires_grad: bool) -> None:
    given = arguments(case.tx, dtype, requires_grad)
    bars: list[Any] = [
        torch.rand_like(x).detach().requires_grad_(requires_grad)
        for x in torch.ops.torchopt.update(*given)
    ]
    bars[1] = None
    wanted = [True] * (len(read(given[1]).backward.output_operands) * (len(SHAPES) + 1))
    wanted[2] = False
    torch.library.opcheck(torch.ops.torchopt.update_backward, (bars, *given, wanted))


def test_opcheck_with_rows_and_values_in_a_tensor() -> None:
    tensors, text, values, _, _, _ = arguments(ADAM, torch.float64, True)
    live = torch.tensor([*values, *(0.5 * v for v in values)], dtype=torch.float64)
    rows = [0, 1, 1, 0]
    given = (tensors, text, [], live, [2, 7], rows)
    torch.library.opcheck(torch.ops.torchopt.update, given)
    found = torch.ops.torchopt.update(*given)
    same = torch.ops.torchopt.update(tensors, text, live.tolist(), None, [2, 7], rows)
    assert all(map(torch.equal, found, same))


@every_fused_kind
@pytest.mark.parametrize("mode", ["update", "apply"])
def test_a_text_says_all_of_a_kernel(case: Case, mode: str) -> None:
    program = program_of(case.tx())
    written = read(write(program.kernels[mode]))
    assert written.forward.name == program.kernels[mode].name
    assert written.backward.name == program.kernels[f"backward_{mode}"].name
    assert written.passes == program.passes[f"backward_{mode}"]
    values = values_of(case.tx())
    assert written.numbers(values, 3) == program.numbers[mode](values, 3)
    assert written.backward_numbers(values, 3) == program.numbers[f"backward_{mode}"](values, 3)


def of_operator(make: Any) -> Callable[[Tensor], Tensor]:
    """A loss through the operator, whose tensors are multiples of its argument."""
    tx = make()
    kernel = program_of(tx, step=3).kernels["apply"]
    text, values = write(kernel), values_of(tx, step=3)

    def function(x: Tensor) -> Tensor:
        tensors = [x * (k + 1) for k, _ in enumerate(sorted(kernel.inputs))]
        by_operand = dict(zip(sorted(kernel.inputs), tensors))
        given = [by_operand[operand] for operand in kernel.inputs]
        outputs = torch.ops.torchopt.update(given, text, values, None, [3], None)
        by_name = dict(zip(kernel.output_operands, outputs))
        return sum((k + 1) * (by_name[s] ** 2).sum() for k, s in enumerate(sorted(by_name)))  # pyright: ignore[reportReturnType]

    return function


def of_rules(make: Any) -> Callable[[Tensor], Tensor]:
    """The same by the rules."""
    tx = make(use_accelerated_op=False)
    kernel = program_of(tx, step=3).kernels["apply"]
    names = list(tx.slot_names())

    def function(x: Tensor) -> Tensor:
        operands = sorted(kernel.inputs)
        given = {s: x * (k + 1) for k, s in enumerate(operands)}
        slots = {name: [given[f"s{k}"]] for k, name in enumerate(names) if f"s{k}" in kernel.inputs}
        state = torchopt.OptState(2, slots, tx.init([]).counters)
        (u,), new = tx.update([given["g"]], state, [given["p"]], inplace=False)
        outputs = {"u": given["p"] + u}
        outputs |= {f"s{k}": new.slots[name][0] for k, name in enumerate(names) if name in slots}
        return sum((k + 1) * (outputs[s] ** 2).sum() for k, s in enumerate(sorted(outputs)))  # pyright: ignore[reportReturnType]

    return function


def _by_autograd(f: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad((first**2).sum(), x)[0]


def _dual(f: Any, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def _grad_with_captured(f: Any, x: Tensor) -> Tensor:
    return grad(lambda y: grad(lambda z: f(z * y))(x).square().sum())(x)


def _autograd_of_grad(f: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(grad(f)(x).square().sum(), x)[0]


DERIVATIVES: dict[str, Callable[[Any, Tensor], Any]] = {
    "autograd-twice": _by_autograd,
    "grad": lambda f, x: grad(f)(x),
    "grad-grad": lambda f, x: grad(lambda y: grad(f)(y).square().sum())(x),
    "grad-grad-captured": _grad_with_captured,
    "autograd-grad": _autograd_of_grad,
    "vmap": lambda f, x: vmap(f)(torch.stack([x, 2 * x], 1).mT),
    "vmap-grad": lambda f, x: vmap(grad(f), in_dims=1)(torch.stack([x, 2 * x], 1)),
    "grad-vmap": lambda f, x: grad(lambda y: vmap(f)(y).sum())(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
    "hessian": lambda f, x: hessian(f)(x),
    "jacrev-jacrev": lambda f, x: jacrev(jacrev(f))(x),
    "jacrev-jacfwd": lambda f, x: jacrev(jacfwd(f))(x),
    "forward-ad": _dual,
}


@every_fused_kind
@pytest.mark.parametrize("take", DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_derivatives_of_the_operator_are_those_of_the_rules(case: Case, take: Any) -> None:
    x = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)
    found, expected = take(of_operator(case.tx), x), take(of_rules(case.tx), x)
    assert_close(found, expected, times=100)
    leaves = torch.utils._pytree.tree_leaves(expected)
    assert all(leaf.abs().max() > 0 for leaf in leaves), "zeros would show nothing"


def test_derivatives_that_it_has_not_are_refused() -> None:
    function = of_operator(ADAM)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = torch.stack([function(x), function(2 * x)])
    with pytest.raises(NotImplementedError, match="is_grads_batched"):
        torch.autograd.grad(y, x, torch.eye(2, dtype=torch.float64), is_grads_batched=True)
    tensors, text, values, _, _, _ = arguments(ADAM, torch.float64)
    live = torch.tensor(values, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no derivative by hyperparameters"):
        torch.ops.torchopt.update(tensors, text, [], live.requires_grad_(), [2], None)
    with pytest.raises(NotImplementedError, match="no batch of hyperparameters"):
        vmap(lambda v: torch.ops.torchopt.update(tensors, text, [], v, [2], None))(
            torch.stack([live.detach()] * 2)
        )


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "count": (lambda x, *rest: (x[:-1], *rest), "same number of"),
    "shape": (lambda x, *rest: ([x[0].mT, *x[1:]], *rest), "shape"),
    "dtype": (lambda x, *rest: ([x[0].float(), *x[1:]], *rest), "float32"),
    "values": (lambda x, text, v, *rest: (x, text, v[:1], *rest), "reads more"),
    "shares": (lambda x, text, v, live, *rest: (x, text, v[:5], live, [1, 2], None), "shared out"),
    "rows": (lambda x, text, v, live, t, rows: (x, text, v, live, t, [0, 0, 0, 5]), "rows must"),
    "no text": (lambda x, text, *rest: (x, "", *rest), "must say"),
    "operation": (lambda x, text, *rest: (x, "x0 = erf g\nu <- x0", *rest), "no operation 'erf'"),
    "order": (lambda x, text, *rest: (x, "x0 = neg x1\nu <- x0", *rest), "before it is computed"),
    "more rows": (
        lambda x, text, v, live, t, rows: (x, text, 9 * v, live, [1] * 9, [0, 1, 2, 8]),
        "9 rows .* for 4 parameters",
    ),
    **{
        f"number {number:.20}": (
            lambda x, text, *rest, n=number: (x, f"n0 := {n}\n{text.split(chr(10), 1)[1]}", *rest),
            message,
        )
        for number, message in {
            "(t+8.0)**(t+8.0)**(t+8.0)": "numbers cannot be computed",
            "(t+8)**(t+8)**(t+8)": "constants are numbers such as 1.0, got 8",
            "'a'*1000000000000.0": "constants are numbers such as 1.0",
            "1.0 / (t - 2.0)": "numbers cannot be computed",
            "(-t) ** 0.5": "not real",
            "abs(h)": "no such Name",
            "h[t]": "no such Subscript",
            "t.real": "no such Attribute",
            "float('1' * 9)": "no such Call",
            "(" * 900 + "t" + ")" * 900: "no expression",
            "-" * 1900 + "t": "no line of a kernel's text",
            "t" + " + t" * 1000: "at most 2000 characters",
        }.items()
    },
    "code": (
        lambda x, text, *rest: (x, "n0 := __import__('os').getpid()\nu <- n0", *rest),
        "no line of a kernel's text",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_arguments_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    given = change(*arguments(ADAM, torch.float64))
    with pytest.raises(ValueError, match=message):
        torch.ops.torchopt.update(*given)


def test_a_graph_that_is_too_large_is_refused() -> None:
    lines = [f"x{k} = add {f'x{k - 1}' if k else 'g'} s{k}" for k in range(63)]
    text = "\n".join([*lines, "u <- x62"])
    with pytest.raises(RuntimeError, match="64 inputs, kernels on the CPU have at most 63"):
        torch.ops.torchopt.update([torch.ones(3)] * 64, text, [], None, [1], None)
    text = "\n".join([*lines[:62], "u <- x61"])
    (u,) = torch.ops.torchopt.update([torch.ones(3)] * 63, text, [], None, [1], None)
    assert torch.equal(u, torch.full((3,), 63.0))


# torch.compile ------------------------------------------------------------------------------------

COMPILED: dict[str, Callable[[bool], Any]] = {
    "schedule": lambda required: torchopt.adam(
        torchopt.schedules.linear(0.1, 0.0, 40), use_accelerated_op=required
    ),
    "rows": lambda required: torchopt.sgd(
        {"0": 0.1, "1": 0.2, "2": 0.2}, momentum=0.9, use_accelerated_op=required
    ),
    "after-clipping": lambda required: torchopt.chain(
        torchopt.clip_grad_norm(0.5), torchopt.adam(0.1, use_accelerated_op=required)
    ),
    "two-optimizers": lambda required: torchopt.chain(
        torchopt.adam(0.1, use_accelerated_op=required),
        torchopt.sgd(0.1, momentum=0.9, use_accelerated_op=required),
    ),
    "rows-and-schedule-after-clipping": lambda required: torchopt.chain(
        torchopt.clip_grad_norm(0.5),
        torchopt.adam(torchopt.schedules.linear(0.1, 0.0, 40), use_accelerated_op=required),
        torchopt.sgd({"0": 0.1, "1": 0.2, "2": 0.2}, momentum=0.9, use_accelerated_op=required),
    ),
    # more slots than a kernel can have
    "two-kernels": lambda required: torchopt.chain(*[torchopt.trace(0.5)] * 64).with_accelerated_op(
        required
    ),
}
#: Compiled by ``make test-all`` only; ``make test`` has them together, and smaller ones.
ALONE = ("schedule", "rows", "after-clipping", "two-optimizers", "two-kernels")


def _required(case: Case, required: bool) -> Any:
    return case.tx(use_accelerated_op=required)


compiles = pytest.mark.skipif(
    not tree._COMPILER_KNOWS_OPTREE, reason="torch.compile takes kernels from torch 2.13 on"
)


def compiles_with_kernels(case: Case) -> bool:
    """Whether kernels serve inside of a compiled function, where counters are tensors."""
    return case.algorithm.fused and not case.kind.has_counters


def compiled_steps(
    tx: Any, dtype: torch.dtype, backend: str, steps: int = 5
) -> tuple[CompileCounterWithBackend, list[int]]:
    """Compare eager and compiled steps bit for bit; return the number of graphs after each."""
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def update(grads: Any, state: Any, params: Any) -> Any:
        return tx.update(grads, state, params, inplace=False)

    start, grads = data(dtype, steps)
    params = {str(k): p for k, p in enumerate(start)}
    state = twin = tx.init(params)
    graphs = []
    for own in grads:
        gradient = dict(zip(params, own))
        updates, state = update(gradient, state, params)
        expected, twin = tx.update(gradient, twin, params, inplace=False)
        assert all(torch.equal(updates[name], expected[name]) for name in params)
        for slot, column in twin.slots.items():
            assert all(torch.equal(state.slots[slot][name], x) for name, x in column.items())
        assert state.step == twin.step
        params = torchopt.apply_updates(params, expected, inplace=False)
        graphs.append(counter.frame_count)
    return counter, graphs


@compiles
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "make",
    [
        *(
            pytest.param(functools.partial(_required, *row.values), id=row.id, marks=row.marks)
            for row in rows(compiles_with_kernels, each=state_kind)
        ),
        *(
            pytest.param(make, id=name, marks=[pytest.mark.thorough] * (name in ALONE))
            for name, make in COMPILED.items()
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_compiled_calls_give_the_bits_of_eager_ones(make: Any, dtype: torch.dtype) -> None:
    """One graph for the first step and one for all later ones."""
    tx = make(True)
    if dtype == torch.bfloat16 and make is COMPILED["two-kernels"]:
        pytest.skip("two kernels in half precision are refused")
    _, graphs = compiled_steps(tx, dtype, "aot_eager")
    assert graphs[1:] == graphs[1:2] * 4
    assert graphs[-1] <= 3  # the compiler may begin one of them twice


@pytest.fixture(name="two_kernels")
def two_kernels_fixture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An optimizer of two kernels: a kernel has three inputs at most, or else 63 parts would do."""
    monkeypatch.setattr(bytecode, "MAX_STREAMS", 3)
    monkeypatch.setattr(backends, "_programs", {})
    return torchopt.chain(*[torchopt.trace(0.5)] * 3).with_accelerated_op(True)


@compiles
def test_compiled_calls_of_two_kernels(two_kernels: Any, kernel_calls: list[int]) -> None:
    g = [torch.ones(3)]
    two_kernels.update(g, two_kernels.init(g), inplace=False)
    assert len(kernel_calls) == 2
    _, graphs = compiled_steps(two_kernels, torch.float64, "aot_eager", steps=4)
    assert graphs[1:] == graphs[1:2] * 3
    assert graphs[-1] <= 3


@compiles
@pytest.mark.thorough
def test_compiled_calls_with_inductor() -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("the default backend needs a C++ compiler on the path")
    tx = ADAM(use_accelerated_op=True)
    _, graphs = compiled_steps(tx, torch.float32, "inductor")
    assert graphs[-1] <= 2


@compiles
def test_a_learning_rate_may_change() -> None:
    (g, *_), _ = data(torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    rate = [0.1]
    scheduled = torchopt.adam(lambda count: rate[0], use_accelerated_op=True)
    compiled = torch.compile(
        lambda g, s: scheduled.update(g, s, inplace=False), fullgraph=True, backend=counter
    )
    grads = {"w": g}
    state = scheduled.init(grads)
    _, state = scheduled.update(grads, state, inplace=False)
    for k in range(6):
        rate[0] = 0.1 / (k + 1)
        found, _ = compiled(grads, state)
        expected, _ = scheduled.update(grads, state, inplace=False)
        assert torch.equal(found["w"], expected["w"])
    assert counter.frame_count <= 2


def _by_autograd_of_compiled(steps: Any, compiles: Any, g: Tensor, p: Tensor, state: Any) -> Any:
    function = compiles(steps)
    inputs = [g.clone().requires_grad_(), p.clone().requires_grad_()]
    return torch.autograd.grad(function(*inputs, state), inputs)


#: How derivatives of compiled steps are taken: of the compiled function, or inside of it.
TAKEN: dict[str, Callable[..., Any]] = {
    "autograd": _by_autograd_of_compiled,
    "grad": lambda steps, compiles, g, p, s: compiles(grad(steps, argnums=(0, 1)))(g, p, s),
    "vmap-grad": lambda steps, compiles, g, p, s: compiles(
        vmap(grad(steps, argnums=(0, 1)), in_dims=(0, None, None))
    )(torch.stack([g, 2 * g]), p, s),
}


@compiles
@pytest.mark.sampled(3)
@every(compiles_with_kernels, each=state_kind)
@pytest.mark.parametrize("take", TAKEN.values(), ids=TAKEN.keys())
def test_gradients_through_compiled_calls(case: Case, take: Any) -> None:
    tx = case.tx(use_accelerated_op=True)

    def steps(g: Tensor, p: Tensor, state: Any) -> Tensor:
        params = {"w": p}
        for _ in range(3):
            updates, state = tx.update({"w": g * params["w"]}, state, params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return params["w"].square().sum()

    (p, *_), ((g, *_),) = data(torch.float64, steps=1)
    # torch.func takes a state apart, and then its count is a tensor: each has one of its own
    compiles = torch.compile(fullgraph=True, backend="aot_eager")
    found = take(steps, compiles, g, p, tx.init({"w": p}))
    expected = take(steps, lambda function: function, g, p, tx.init({"w": p}))
    assert all(map(torch.equal, found, expected))
    assert all(x.abs().max() > 0 for x in expected)


@compiles
def test_what_cannot_be_compiled_with_kernels_is_refused_by_name(two_kernels: Any) -> None:
    g = [torch.ones(3)]
    tx = torchopt.adam(0.1, use_accelerated_op=True)
    half = [torch.ones(3, dtype=torch.bfloat16)]
    large = user_optimizer(lambda g, p, t, slots: (sum(g * (t + k) for k in range(1100)), slots))
    cases: list[tuple[Any, Any, Any, str]] = [
        (torchopt.adam(torch.tensor(0.1), use_accelerated_op=True), g, None, "is a tensor"),
        (tx, g, torchopt.OptState(torch.tensor(0), tx.init(g).slots), "count is a tensor"),
        (torchopt.nadam(use_accelerated_op=True), g, None, "mu_product.*is a tensor"),
        (large().with_accelerated_op(True), g, None, "at most 1024"),
        (torchopt.clip_grad_norm(1.0).with_accelerated_op(True), g, None, "not elementwise"),
        (two_kernels, half, None, "half precision"),
    ]
    for tx, grads, state, message in cases:
        torch._dynamo.reset()
        state = tx.init(grads) if state is None else state

        def update(g: Any, s: Any, tx: Any = tx) -> Any:
            return tx.update(g, s, inplace=False)

        with pytest.raises(Exception, match=f"use_accelerated_op=True requires.*{message}"):
            torch.compile(update, fullgraph=True, backend="aot_eager")(grads, state)


def test_kernels_in_a_compiler_that_is_too_old_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tree, "_COMPILER_KNOWS_OPTREE", False)
    tx, g = torchopt.adam(0.1, use_accelerated_op=True), [torch.ones(3)]
    compiled = torch.compile(lambda g, s: tx.update(g, s, inplace=False), fullgraph=True)
    message = "use_accelerated_op=True requires .* from torch 2.13 on; this is torch .* Pass None"
    with pytest.raises(Exception, match=message):
        compiled(g, tx.init(g))


def test_other_tracers_see_the_operator() -> None:
    tx = torchopt.adam(0.1, use_accelerated_op=True)
    (g, *_), ((h, *_), *_) = data(torch.float64)
    state = tx.init([g])

    def update(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        slots = dict(zip(state.slots, ([m], [v])))
        return tx.update([g], torchopt.OptState(3, slots), inplace=False)[0][0]

    for mode in ("real", "symbolic"):
        traced = make_fx(update, tracing_mode=mode)(g, g.clone(), g.abs())
        assert "torchopt.update.default" in traced.code
        assert torch.equal(traced(h, g, h.abs()), update(h, g, h.abs()))
    with FakeTensorMode() as fakes:
        fake = fakes.from_tensor(g)
        assert update(fake, fake, fake).shape == g.shape
