"""The operators ``torch.ops.torchopt``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, every_fused_kind, every_fused_state, named
from fusing import SHAPES, data, kernel_calls_fixture, needs_library  # noqa: F401
from pointwise import program_of, values_of
from tolerances import assert_close
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import torchopt
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


@pytest.mark.sampled(5, each=0, by="family")
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


def test_batched_gradients_of_the_operator_can_be_differentiated() -> None:
    found = []
    for function in (of_operator(ADAM), of_rules(ADAM)):
        x = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64, requires_grad=True)
        y = torch.stack([function(x), function(2 * x)])
        rows = torch.tensor([[1.0, 0.5], [0.2, -1.0]], dtype=torch.float64)
        (first,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), x)])
    assert_close(found[0], found[1], times=100)


def test_derivatives_that_it_has_not_are_refused() -> None:
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
