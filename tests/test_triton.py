"""The kernels for GPUs: their arithmetic in Triton's interpreter, and their compilation.

No GPU is needed: the interpreter runs the same text on the CPU, and Triton
compiles for a GPU that is not there. ``TRITON_INTERPRET`` is set for single tests only, since
others in this process may compile.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from catalogue import kernels
from pointwise import evaluate_kernel, program_of, user_optimizer
from tolerances import assert_close
from torch import Tensor

import torchopt
from torchopt.core.packed import Packed, Packing
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.backends import cpu as native
from torchopt.kernels.backends import gpu as triton_backend
from torchopt.kernels.backends import launch
from torchopt.kernels.backends.memory import OF_PARAMETERS, slot_dtype
from torchopt.kernels.generate import emit_triton
from torchopt.kernels.generate.graph import OPERATIONS, TRUTH, Kernel, Node, input_node, make_kernel


pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="triton is not installed (pip install 'torchopt[gpu]')",
    ),
    # the interpreter computes with numpy, which tells what a GPU does silently
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning"),
]

#: Less than one block, one block and a part, and two blocks, of 1024 entries.
SIZES = (0, 1, 1023, 1025, 2048)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-42, -1e-42)
Columns = dict[str, list[Any]]


@pytest.fixture(name="interpreter")
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def type_of(operand: str, dtype: torch.dtype) -> torch.dtype:
    return dtype if operand in OF_PARAMETERS else slot_dtype(dtype)


def tensors_for(kernel: Kernel, dtype: torch.dtype, sizes: Sequence[int] = SIZES) -> Columns:
    """Random inputs: every third entry is zero, and slots are positive, as under a root."""
    columns: Columns = {}
    for operand in kernel.inputs:
        columns[operand] = []
        for size in sizes:
            x = torch.randn(size, dtype=torch.float64)
            x = x.abs() if operand.startswith("s") else x
            x[::3] = 0
            columns[operand].append(x.to(type_of(operand, dtype)))
    return columns


def rows_for(kernel: Kernel) -> list[list[float]]:
    return [[0.1 + 0.07 * k + row for k in range(len(kernel.numbers))] for row in range(2)]


def places_for(kernel: Kernel, like: Sequence[Tensor]) -> Columns:
    """Memory to write to, filled with a number that no kernel computes."""
    return {
        operand: [torch.full_like(x, 7.0, dtype=type_of(operand, x.dtype)) for x in like]
        for operand in kernel.outputs
    }


def like_of(sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(size, dtype=dtype) for size in sizes]


def check(kernel: Kernel, dtype: torch.dtype, inputs: Columns, absent: bool = False) -> None:
    """Compare Triton's interpreter with torch, and with the kernels of the CPU if there are any."""
    sizes = [len(x) for x in next(iter(inputs.values()))]
    like, numbers = like_of(sizes, dtype), rows_for(kernel)
    rows = [k % 2 for k in range(len(sizes))]
    given = {s: list(column) for s, column in inputs.items()}
    outputs = places_for(kernel, like)
    if absent:
        for position, column in enumerate([*given.values(), *outputs.values()]):
            column[-1 - position % 3] = None
    triton_backend.run(kernel, given, outputs, like, numbers, rows)
    for k, row in enumerate(rows):
        operands = {s: x[k] if given[s][k] is not None else 0 * x[k] for s, x in inputs.items()}
        wide = {s: x.to(slot_dtype(dtype)) for s, x in operands.items()}
        for operand, value in evaluate_kernel(kernel, wide, numbers[row]).items():
            place = outputs[operand][k]
            if place is not None:
                assert_same(place, value.to(place.dtype), f"{kernel.text}\n{operand} of {sizes[k]}")
    if not isinstance(native.load(), native.UnavailableError):
        assert_same_as_on_cpu(kernel, given, outputs, like, numbers, rows)


def assert_same(actual: Tensor, expected: Tensor, what: str, exactly: bool = False) -> None:
    """Assert that ``nan`` and infinities are the same, and the rest equal or close.

    Roots on the CPU are not correctly rounded by torch, but are by the interpreter and in C. The
    interpreter cuts off the last digits of bfloat16 where a GPU rounds.
    """
    finite = expected.isfinite()
    assert torch.equal(actual.isnan(), expected.isnan()), what
    assert torch.equal(actual.isfinite(), finite), what
    assert torch.equal(actual.nan_to_num(0)[~finite], expected.nan_to_num(0)[~finite]), what
    if exactly and actual.dtype != torch.bfloat16:
        assert torch.equal(actual[finite], expected[finite]), what
    assert_close(actual[finite], expected[finite], times=2, what=what)


def assert_same_as_on_cpu(
    kernel: Kernel,
    inputs: Columns,
    outputs: Columns,
    like: list[Tensor],
    numbers: list[list[float]],
    rows: list[int],
) -> None:
    if launch.backends.find(kernel.name) is None:
        return
    others = places_for(kernel, like)
    for operand, column in outputs.items():
        others[operand] = [y if x is not None else None for x, y in zip(column, others[operand])]
    launch.run(kernel, inputs, others, like, numbers, rows)
    for operand, column in outputs.items():
        for x, y in zip(column, others[operand]):
            if x is not None:
                assert_same(x, y, f"{kernel.text}\n{operand}", exactly=True)


CATALOGUE = kernels()
ADAM = program_of(torchopt.adam(0.1, weight_decay=0.1, amsgrad=True)).kernels


# The arithmetic -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreter")
@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("part", range(4))
def test_every_kernel_of_the_catalogue(dtype: torch.dtype, part: int) -> None:
    # only roots and quotients are written in another way for float64
    for kernel in CATALOGUE[part :: 4 if dtype == torch.float32 else 12]:
        check(kernel, dtype, tensors_for(kernel, dtype, (0, 1, 1023, 1025)))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_and_absent_operands(dtype: torch.dtype) -> None:
    for kernel in [*ADAM.values(), *CATALOGUE[::12]]:
        check(kernel, dtype, tensors_for(kernel, dtype), absent=True)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_infinities_and_nan(dtype: torch.dtype) -> None:
    for kernel in [*ADAM.values(), *CATALOGUE[::30]]:
        inputs = tensors_for(kernel, dtype, [1024 + len(SPECIAL) ** 2])
        for position, (column,) in enumerate(inputs.values()):
            repeat = len(SPECIAL) if position % 2 else 1
            pattern = torch.tensor(SPECIAL, dtype=column.dtype).repeat_interleave(repeat)
            column[: len(pattern)] = pattern
            column[-len(pattern) :] = pattern
        check(kernel, dtype, inputs)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", [op for op in OPERATIONS if op not in emit_triton.ABSENT])
def test_every_operation(op: str, dtype: torch.dtype) -> None:
    a, b = input_node("s0"), input_node("s1")
    arguments = (Node("less", (a, b)), a, b) if op == "where" else (a, b)[: OPERATIONS[op]]
    node = Node(op, arguments)
    if op in TRUTH:
        node = Node("where", (node, a, b))
    kernel = make_kernel({"s0": node, "s1": Node("add", (node, b))})
    numbers = torch.cat([torch.tensor(SPECIAL), torch.randn(5)]).to(dtype)
    pairs = {"s0": [numbers.repeat(12)], "s1": [numbers.repeat_interleave(12)]}
    check(kernel, dtype, {operand: pairs[operand] for operand in kernel.inputs})


def test_a_rule_with_an_operation_that_triton_has_not_is_not_fused_on_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "unavailable", lambda device_type: "")
    monkeypatch.setattr(backends, "_too_old", lambda device: "")
    device = torch.device("cuda", 0)
    for function, reason in ((torch.tanh, "no kernels with 'tanh' for GPUs"), (torch.exp, "")):
        cls = user_optimizer(lambda g, p, t, slots, f=function: (f(g), slots))
        found = backends.missing(device, program_of(cls()), "update")
        assert reason in found
        assert bool(reason) == bool(found)


@pytest.mark.usefixtures("interpreter")
def test_sign_of_zero() -> None:
    kernel = make_kernel({"u": Node("neg", (input_node("g"),))})
    g, u = torch.tensor([0.0, -0.0]), torch.empty(2)
    triton_backend.run(kernel, {"g": [g]}, {"u": [u]}, [g], [[]], None)
    assert torch.signbit(u).tolist() == [True, False]


# Layouts ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_that_are_not_aligned(dtype: torch.dtype) -> None:
    kernel = ADAM["apply"]
    inputs = tensors_for(kernel, dtype, (2049, 1025, 3))
    shifted = {s: [x[1:] for x in column] for s, column in inputs.items()}
    assert any(x.data_ptr() % emit_triton.ALIGNMENT for c in shifted.values() for x in c)
    check(kernel, dtype, shifted)


@pytest.mark.usefixtures("interpreter")
def test_packed_slots() -> None:
    kernel = ADAM["apply"]
    inputs = tensors_for(kernel, torch.float32, (5, 1030))
    packing = Packing([torch.Size([5]), torch.Size([1030])])
    packed = {s: Packed(packing.pack(c), packing) if s != "g" else c for s, c in inputs.items()}
    like, numbers = inputs["p"], rows_for(kernel)[:1]
    expected, actual = places_for(kernel, like), places_for(kernel, like)
    flat = {s: Packed(packing.pack(column), packing) for s, column in actual.items()}
    triton_backend.run(kernel, inputs, expected, like, numbers, None)
    triton_backend.run(kernel, packed, flat, like, numbers, None)
    for operand, column in expected.items():
        assert torch.equal(flat[operand].flat, torch.cat(column))


@pytest.mark.usefixtures("interpreter")
def test_in_place() -> None:
    kernel = ADAM["apply"]
    inputs = tensors_for(kernel, torch.float64)
    expected = places_for(kernel, inputs["p"])
    numbers = rows_for(kernel)[:1]
    triton_backend.run(kernel, inputs, expected, inputs["p"], numbers, None)
    outputs = {operand: inputs["p" if operand == "u" else operand] for operand in expected}
    triton_backend.run(kernel, inputs, outputs, inputs["p"], numbers, None)
    assert_close(outputs, expected)


@pytest.mark.usefixtures("interpreter")
def test_nothing_to_do() -> None:
    kernel = ADAM["update"]
    inputs = tensors_for(kernel, torch.float32, (0, 0))
    outputs = places_for(kernel, inputs["g"])
    before = dict(triton_backend._functions)
    triton_backend._functions.clear()
    triton_backend.run(kernel, inputs, outputs, inputs["g"], rows_for(kernel), [0, 1])
    assert not triton_backend._functions, "a kernel was made for nothing"
    triton_backend._functions.update(before)


def test_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_backend, "_functions", {})
    x = torch.ones(2)
    kernel = make_kernel({"u": input_node("g")})
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        triton_backend.run(kernel, {"g": [x]}, {"u": [x]}, [x], [[]], None)


def test_interpreter_is_refused_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.reason().startswith("TRITON_INTERPRET is set")


# The compiler -------------------------------------------------------------------------------------


def compiled_for_a_gpu(kernel: Kernel, dtype: str) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = triton_backend._define(emit_triton.source(kernel, dtype), kernel.name, dtype)
    tables = {"owners": "*i32", "records": "*i64", "numbers": "*fp64"}
    made = compile(
        ASTSource(function, tables),
        target=GPUTarget("cuda", 80, 32),
        options=dict(emit_triton.OPTIONS),
    )
    return made.asm["ptx"]


def test_exponentials_are_no_approximations(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    g, p = input_node("g"), input_node("p")
    choice = Node("not", (Node("and", (Node("less", (g, p)), Node("equal", (g, p)))),))
    node = Node("where", (choice, Node("exp", (g,)), Node("log", (p,))))
    kernel = make_kernel({"u": node, "s0": Node("sigmoid", (g,))})
    text = compiled_for_a_gpu(kernel, "float32")
    assert "f64" in text
    assert "approx" not in text


@pytest.mark.parametrize(("dtype", "widest"), [("float32", "v4.b32"), ("bfloat16", "v2.b32")])
def test_compiles_without_contraction(
    dtype: str, widest: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Triton compiles for a GPU that this machine has not; what it writes is looked at."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    text = compiled_for_a_gpu(ADAM["backward_apply"], dtype)
    assert not re.search(r"\bfma\.|approx|div\.full", text)
    assert "div.rn.f32" in text
    assert "sqrt.rn.f32" in text
    assert f"ld.global.{widest}" in text
    assert f"st.global.{widest}" in text
