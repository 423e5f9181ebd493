"""Programs: any graph by the interpreter of the C library, bit by bit; and bad programs."""

from __future__ import annotations

import math
import random
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import catalogue
import pytest
import torch
from conftest import nonzero
from fusing import needs_library, run_kernel, sets_fixture  # noqa: F401
from pointwise import (
    INEXACT,
    assert_equal,
    constant_value,
    evaluate_kernel,
    other_kernels,
    program_of,
    signed_adam,
    single_operation,
    user_optimizer,
)
from tolerances import assert_close
from torch import Tensor

import torchopt
from torchopt.kernels import why
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.backends import cpu as native
from torchopt.kernels.generate import bytecode
from torchopt.kernels.generate.bytecode import INSTRUCTION, MAX_STREAMS, Code, TooLargeError
from torchopt.kernels.generate.graph import (
    OPERATIONS,
    TRUTH,
    Kernel,
    Node,
    constant,
    input_node,
    make_kernel,
)


pytestmark = needs_library
SIZES = (0, 1, 15, 16, 17, 511, 512, 513, 1300)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def run(
    function: int | Code,
    kernel: Kernel,
    inputs: dict[str, list[Tensor]],
    row: Sequence[float],
    in_place: bool = False,
) -> dict[str, list[Tensor]]:
    like = next(iter(inputs.values()))
    inputs = {s: [x.clone() for x in column] for s, column in inputs.items()}
    outputs = {s: [torch.full_like(x, 77.0) for x in like] for s in kernel.outputs}
    if in_place:
        outputs |= {s: inputs[s] for s in outputs if s in inputs}
        outputs |= {"u": inputs["p"]} if "p" in inputs else {}
    run_kernel(
        native.library(),
        function,
        native.DTYPES[like[0].dtype],
        0,
        0,
        [x.numel() for x in like],
        [x.data_ptr() for s in kernel.inputs for x in inputs[s]],
        [x.data_ptr() for s in kernel.outputs for x in outputs[s]],
        row,
    )
    return outputs


def interpreted(kernel: Kernel) -> Code:
    return Code(kernel.listing, native.library().operations)


def inputs_of(kernel: Kernel, dtype: torch.dtype, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    return {
        s: [(nonzero(n).abs() if s[0] == "s" else nonzero(n)).to(dtype) for n in sizes]
        for s in kernel.inputs
    }


def numbers_of(kernel: Kernel) -> list[float]:
    return [0.9 - 0.07 * k for k in range(len(kernel.numbers))]


# Values -------------------------------------------------------------------------------------------


@BOTH
def test_programs_have_the_bits_of_compiled_kernels(dtype: torch.dtype, sets: list[str]) -> None:
    for kernel in catalogue.kernels():
        inputs, row = inputs_of(kernel, dtype), numbers_of(kernel)
        compiled = native.library().find(kernel.name)
        assert compiled is not None
        expected = run(compiled, kernel, inputs, row)
        for name in sets:
            native.library().select(name)
            found = run(interpreted(kernel), kernel, inputs, row)
            for operand, column in expected.items():
                assert all(map(torch.equal, found[operand], column)), (kernel.text, name, operand)


@BOTH
def test_every_operation_at_special_values(dtype: torch.dtype, sets: list[str]) -> None:
    special = [0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan, 1e-40, 3e38, 0.3]
    grid = torch.cartesian_prod(*[torch.tensor(special, dtype=dtype)] * 3).unbind(1)
    inputs: dict[str, Tensor] = dict(zip(("g", "p", "s0"), map(Tensor.contiguous, grid)))
    for op in OPERATIONS:
        kernel = make_kernel(single_operation(op))
        own = {s: inputs[s] for s in kernel.inputs}
        if op in ("sqrt", "root_slope", "sign"):  # torch.sign(nan) is nan or 0, by its build
            own = {s: x.nan_to_num(4.0).abs() for s, x in own.items()}
        row = [0.25] if op in TRUTH else []
        expected = evaluate_kernel(kernel, own, row, exact=True)["u"].to(dtype)
        results = []
        for name in sets:
            native.library().select(name)
            columns = {s: [x] for s, x in own.items()}
            results.append(run(interpreted(kernel), kernel, columns, row)["u"][0])
            assert_equal(results[-1], expected, kernel)
            assert torch.equal(results[-1].nan_to_num(7e7), results[0].nan_to_num(7e7)), (op, name)


def random_graph(source: random.Random, size: int) -> dict[str, Node]:
    """A graph that uses values more than once, numbers on every side, and inputs as outputs."""
    values = [input_node(s) for s in ("g", "p", "s0", "s1")]
    numbers = [constant(c) for c in (0.3, -1.7, 2.0, 1.0, 0.0)]
    operations = [op for op in OPERATIONS if op not in INEXACT | TRUTH]

    def truth() -> Node:
        op = source.choice(sorted(TRUTH))
        if op in ("and", "or", "not"):
            return Node(op, tuple(truth() for _ in range(OPERATIONS[op])))
        return Node(op, (pick(), source.choice([*values, *numbers])))

    def pick() -> Node:
        return source.choice([*values, *values[-3:]])

    for _ in range(size):
        op = source.choice(operations)
        arguments = [source.choice([pick(), pick(), source.choice(numbers)]) for _ in range(3)]
        if op == "where":
            arguments[0] = truth()
        values.append(Node(op, tuple(arguments[: OPERATIONS[op]])))
    return {"u": values[-1], "s0": source.choice(values), "s1": source.choice(values)}


@pytest.mark.parametrize("seed", range(8))
def test_random_graphs(seed: int) -> None:
    """Against torch, one operation after the other; and in place, where every order matters."""
    source = random.Random(seed)
    for size in range(1, 40):
        kernel = make_kernel(random_graph(source, size))
        if not kernel.inputs:
            continue
        dtype = source.choice([torch.float32, torch.float64])
        inputs = inputs_of(kernel, dtype, (1, 37, 600))
        row = [constant_value(n) for n in kernel.numbers]
        found = run(interpreted(kernel), kernel, inputs, row)
        in_place = run(interpreted(kernel), kernel, inputs, row, in_place=True)
        for k in range(3):
            single = {s: column[k] for s, column in inputs.items()}
            expected = evaluate_kernel(kernel, single, row, exact=True)
            for operand, column in found.items():
                value, same = column[k].nan_to_num(7e7), in_place[operand][k].nan_to_num(7e7)
                assert torch.equal(value, same), (kernel.text, interpreted(kernel).instructions)
                if "sign" not in kernel.text:  # torch.sign(nan) is nan or 0, by its build
                    assert_equal(column[k], expected[operand].to(dtype), kernel)


IN_PLACE: dict[str, dict[str, Node]] = {
    "swapped": {"u": input_node("g"), "s0": input_node("s1"), "s1": input_node("s0")},
    "rotated": {"u": input_node("s0"), "s0": input_node("s1"), "s1": input_node("p")},
    "kept": {"u": Node("add", (input_node("p"), input_node("g"))), "s0": input_node("p")},
    "twice": {s: Node("mul", (input_node("p"), input_node("g"))) for s in ("u", "s0", "s1")},
    "number": {"u": constant(2.0), "s0": input_node("p")},
    "read late": {
        "s0": Node("neg", (input_node("s0"),)),
        "s1": Node("mul", (input_node("g"), input_node("s0"))),
        "u": Node("add", (input_node("p"), Node("add", (input_node("s0"), input_node("s1"))))),
    },
}


@pytest.mark.parametrize("graph", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_an_output_that_is_an_input_is_written_when_nothing_reads_it(graph: Any) -> None:
    kernel = make_kernel(graph)
    inputs, row = inputs_of(kernel, torch.float64), [constant_value(n) for n in kernel.numbers]
    found = run(interpreted(kernel), kernel, inputs, row, in_place=True)
    for k in range(len(SIZES)):
        expected = evaluate_kernel(kernel, {s: c[k] for s, c in inputs.items()}, row)
        for operand, value in expected.items():
            assert torch.equal(found[operand][k], value.double()), operand


def test_registers_are_used_again() -> None:
    """A long graph has as many registers as values at a time, not as operations."""
    value = input_node("g")
    for k in range(300):
        value = Node("add", (Node("mul", (value, constant(1.0 + k))), Node("abs", (value,))))
    code = interpreted(make_kernel({"u": value}))
    registers = {i.result for i in code.instructions if i.result[0] == "%"}
    assert len(code.instructions) >= 300
    assert len(registers) <= 2


def test_pairs_of_operations_become_one() -> None:
    kernel = program_of(torchopt.adam(0.1)).kernels["apply"]
    code = interpreted(kernel)
    assert len(kernel.listing.statements) == 14
    assert len(code.instructions) <= 8
    assert not [i for i in code.instructions if i.operation == "copy_v"]


# Rules --------------------------------------------------------------------------------------------


def signed(setting: bool | None) -> Any:
    cls = user_optimizer(signed_adam, ("m", "v"), lr=0.1, b1=0.9, b2=0.99, eps=1e-3)
    return cls().with_accelerated_op(setting)


def ten_rules(setting: bool | None) -> Any:
    """Ten rules in a row that nobody has foreseen, two of them the user's own."""
    return torchopt.chain(
        torchopt.trace(0.9),
        user_optimizer(lambda g, p, t, s: (torch.tanh(g) * torch.exp(-g.abs()), s))(),
        torchopt.scale_by_adam(eps=1e-3),
        torchopt.add_decayed_weights(0.1),
        signed(None),
        torchopt.scale_by_stddev(eps=1e-3),
        torchopt.trace(0.5, nesterov=True),
        user_optimizer(lambda g, p, t, s, a: (g * torch.sigmoid(p) ** (1 + a), s), a=0.25)(),
        torchopt.scale_by_rms(eps=1e-3),
        torchopt.scale(-0.1),
    ).with_accelerated_op(setting)


@pytest.mark.parametrize("make", [signed, ten_rules])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rules_of_ones_own_are_fused_and_right(make: Any, dtype: torch.dtype) -> None:
    """In the functional API with derivatives, and in place; where fusion is required."""
    assert not why(make(None), [torch.ones(2)], params=[torch.ones(2)])
    results = []
    for setting in (True, False):
        torch.manual_seed(3)
        tx = make(setting)
        params = [nonzero(*shape).to(dtype).requires_grad_() for shape in ((7,), (3, 5), ())]
        grads = [nonzero(*p.shape).to(dtype).requires_grad_() for p in params]
        state = tx.init(params)
        values = params
        for _ in range(2):
            updates, state = tx.update(grads, state, values, inplace=False)
            values = torchopt.apply_updates(values, updates, inplace=False)
        total: Any = sum((v * nonzero(*v.shape).to(dtype)).sum() for v in values)
        derivatives = torch.autograd.grad(total, [*grads, *params])
        own = [torch.nn.Parameter(p.detach().clone()) for p in params]
        optimizer = torchopt.Optimizer(own, make(setting))
        for _ in range(3):
            for p, g in zip(own, grads):
                p.grad = g.detach().clone()
            optimizer.step()
        results.append([*values, *derivatives, *own])
    half = dtype == torch.bfloat16
    assert_close(*results, times=4 if half else 100)


def test_a_graph_that_is_too_large_is_run_in_parts() -> None:
    tx = torchopt.chain(*[torchopt.scale_by_adam(eps=0.1)] * 40)
    g = [nonzero(3)]
    (u,), _ = tx.update(g, tx.init(g), inplace=False)
    tx = tx.with_accelerated_op(False)
    (expected,), _ = tx.update(g, tx.init(g), inplace=False)
    assert_close(u, expected, times=100)


# Programs that make no sense ----------------------------------------------------------------------


def test_programs_that_make_no_sense_are_refused_and_write_nothing() -> None:
    """Places that are not there, blocks where numbers belong, and the other way round."""
    kernel = make_kernel({"u": Node("mul", (input_node("g"), constant(2.0)))})
    library, outside = native.library(), 10**6
    sound = interpreted(kernel)
    mul, last = library.operations["mul_vn"], len(library.operations)
    code = [mul, 1, 0, 2, 0, 0]  # places: g, out u, the number, the register
    sizes = [1, 1, 1, 1, 1]

    def call(sizes: Sequence[int], code: Sequence[int] | None, width: int = 1) -> Tensor:
        memory = array("i", code or [])
        at = memory.buffer_info()[0] if code else 0
        program = array("q", [*sizes, at])
        sound.address = program.buffer_info()[0]
        out, g = torch.full((40,), 77.0), torch.ones(40)
        try:
            run_kernel(
                library, sound, 1, 0, 0, [40], [g.data_ptr()], [out.data_ptr()], [2.0], None, width
            )
        except RuntimeError:
            assert (out == 77.0).all()
            raise
        return out

    assert torch.equal(call(sizes, code), torch.full((40,), 2.0))
    assert len(code) == INSTRUCTION
    bad_codes = [
        [bad if k == at else x for k, x in enumerate(code)]
        for at in range(INSTRUCTION)
        for bad in (-1, 4, outside, -outside, struct.unpack("i", b"\0\0\0\x80")[0])
        if not (at == 0 and bad == 4)
    ]
    bad_codes += [
        [last, *code[1:]],
        [mul, 0, 0, 2, 0, 0],  # into an input
        [mul, 2, 0, 2, 0, 0],  # into a number
        [mul, 1, 2, 2, 0, 0],  # a number as a block
        [mul, 1, 0, 0, 0, 0],  # a block as a number
        [mul, 1, 0, 3, 0, 0],  # a register as a number
        [mul, 1, 0, 2, 1, 0],  # an argument that the operation does not have
    ]
    refused = r"refused a call \(code -2\)"
    for bad in bad_codes:
        with pytest.raises(RuntimeError, match=refused):
            call(sizes, bad)
    for at in range(5):
        for bad in (-1, outside, 2**62, -(2**62)):
            with pytest.raises(RuntimeError, match=refused):
                call([bad if k == at else x for k, x in enumerate(sizes)], code)
    with pytest.raises(RuntimeError, match=refused):
        call([0, 0, 0, 0, 0], None)
    with pytest.raises(RuntimeError, match=refused):
        call(sizes, None)
    with pytest.raises(RuntimeError, match=refused):
        call([1, 1, 2, 0, 1], code, width=1)  # rows that are too short


def test_limits_are_those_of_the_engine_and_give_a_reason() -> None:
    header = (Path(__file__).resolve().parents[1] / "csrc" / "engine.h").read_text()
    for name in ("MAX_STREAMS", "MAX_NUMBERS", "MAX_REGISTERS", "MAX_LENGTH", "INSTRUCTION"):
        assert int(header.split(f"#define {name} ")[1].split()[0]) == getattr(bytecode, name)
    total = input_node("g")
    for k in range(MAX_STREAMS):
        total = Node("add", (total, input_node(f"s{k}")))
    kernel = make_kernel({"u": total})
    with pytest.raises(TooLargeError, match="64 inputs, kernels on the CPU have at most 63"):
        interpreted(kernel)
    assert "64 inputs" in backends.unsupported("cpu", kernel)
    many = [Node("exp", (Node("mul", (input_node("g"), constant(k))),)) for k in range(300)]
    total = many[0]
    for value in many[1:] + many:
        total = Node("add", (total, value))
    with pytest.raises(TooLargeError, match="values at a time"):
        interpreted(make_kernel({"u": total}))


def test_programs_are_kept_by_their_text_and_are_not_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_programs", {})
    monkeypatch.setattr(backends, "PROGRAMS", 4)
    kernels = other_kernels()
    first = [backends.function_of(kernel) for kernel in kernels[:4]]
    again = [backends.function_of(make_kernel(kernel.outputs)) for kernel in kernels[:4]]
    assert all(a is b for a, b in zip(first, again))
    for kernel in kernels:
        assert isinstance(backends.function_of(kernel), Code)
        assert len(backends._programs) <= 4
