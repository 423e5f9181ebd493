"""Every kernel of the C library against torch, bit by bit: dtypes, sizes, threads, machines."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import catalogue
import pytest
import torch
from conftest import nonzero
from fusing import needs_library, run_kernel, sets_fixture  # noqa: F401
from pointwise import evaluate_kernel, other_kernels, program_of
from torch import Tensor

import torchopt
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.backends import cpu as native
from torchopt.kernels.backends.memory import OF_PARAMETERS, slot_dtype
from torchopt.kernels.generate.graph import Kernel


pytestmark = needs_library
DTYPES = list(native.DTYPES)
SIZES = (0, 1, 7, 255, 256, 257, 1023, 1025)
LARGE = (70000, 300001)  # more than one thread takes

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


@functools.cache
def all_kernels() -> list[Kernel]:
    """Compiled ones, and others that are run by the interpreter."""
    return [*catalogue.kernels(), *other_kernels()]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def dtype_of(operand: str, dtype: torch.dtype) -> torch.dtype:
    return dtype if operand in OF_PARAMETERS else slot_dtype(dtype)


def numbers_of(kernel: Kernel, row: int = 0) -> list[float]:
    return [0.9 - 0.07 * k + 0.013 * row for k in range(len(kernel.numbers))]


def make_inputs(kernel: Kernel, dtype: torch.dtype, sizes: Sequence[int]) -> dict[str, Any]:
    """One tensor of each size for each operand; second moments are positive."""
    return {
        operand: [
            (nonzero(size).abs() if operand[0] == "s" else nonzero(size)).to(
                dtype_of(operand, dtype)
            )
            for size in sizes
        ]
        for operand in kernel.inputs
    }


def run(
    kernel: Kernel,
    dtype: torch.dtype,
    inputs: dict[str, list[Tensor | None]],
    sizes: Sequence[int],
    rows: list[int] | None = None,
    dropped: Sequence[tuple[str, int]] = (),
) -> dict[str, list[Tensor]]:
    """Run a kernel by the library, into tensors that hold something else before."""
    outputs = {
        s: [torch.full((n,), 77.0, dtype=dtype_of(s, dtype)) for n in sizes] for s in kernel.outputs
    }
    numbers = [x for row in range(max(rows or [0]) + 1) for x in numbers_of(kernel, row)]
    run_kernel(
        native.library(),
        backends.function_of(kernel),
        native.DTYPES[dtype],
        sum(1 << k for k, s in enumerate(kernel.inputs) if s in OF_PARAMETERS),
        sum(1 << k for k, s in enumerate(kernel.outputs) if s in OF_PARAMETERS),
        list(sizes),
        [0 if x is None else x.data_ptr() for s in kernel.inputs for x in inputs[s]],
        [
            0 if (s, k) in dropped else x.data_ptr()
            for s in kernel.outputs
            for k, x in enumerate(outputs[s])
        ],
        numbers,
        rows,
        len(kernel.numbers),
    )
    return outputs


def expected_of(
    kernel: Kernel, dtype: torch.dtype, inputs: dict[str, Any], k: int, row: int = 0
) -> dict[str, Tensor]:
    """The same for tensor ``k`` by torch: half precision is computed in float32."""
    wide = {s: column[k].to(slot_dtype(dtype)) for s, column in inputs.items()}
    found = evaluate_kernel(kernel, wide, numbers_of(kernel, row), exact=True)
    return {s: x.to(dtype_of(s, dtype)) for s, x in found.items()}


def assert_equal(actual: Tensor, expected: Tensor, what: object) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.nan_to_num(5e4), expected.nan_to_num(5e4)), (what, actual, expected)


# Values -------------------------------------------------------------------------------------------


@every_dtype
def test_every_kernel_at_every_size(dtype: torch.dtype) -> None:
    for kernel in all_kernels():
        inputs = make_inputs(kernel, dtype, SIZES)
        outputs = run(kernel, dtype, inputs, SIZES)
        for k, size in enumerate(SIZES):
            expected = expected_of(kernel, dtype, inputs, k)
            for operand, value in expected.items():
                assert_equal(outputs[operand][k], value, (kernel.text, size, operand))


@every_dtype
def test_zero_and_infinite_and_nan(dtype: torch.dtype) -> None:
    """Special values of every operand come out as torch has them, in all combinations of two."""
    special = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 6e4, 1e-7])
    grid = [x.repeat(3) for x in torch.cartesian_prod(special, special).unbind(1)]
    for kernel in all_kernels():
        inputs: dict[str, Any] = {}
        for k, operand in enumerate(kernel.inputs):
            values = grid[k % 2].roll(5 * (k // 2)).to(dtype_of(operand, dtype))
            # below zero a root is nan, in torch and here; let it be so seldom
            inputs[operand] = [values.abs() if operand[0] == "s" else values.contiguous()]
        sizes = [len(grid[0])]
        outputs = run(kernel, dtype, inputs, sizes)
        for operand, value in expected_of(kernel, dtype, inputs, 0).items():
            assert_equal(outputs[operand][0], value, (kernel.text, operand))


@every_dtype
def test_instruction_sets_give_the_same_bits(dtype: torch.dtype, sets: list[str]) -> None:
    for kernel in all_kernels():
        inputs = make_inputs(kernel, dtype, (1025,))
        results = []
        for name in sets:
            native.library().select(name)
            assert native.library().instruction_set == name
            results.append(run(kernel, dtype, inputs, (1025,)))
        for other in results[1:]:
            for operand, column in other.items():
                assert torch.equal(column[0], results[0][operand][0]), (kernel.text, sets)


@every_dtype
def test_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    sizes = (5, *LARGE, 0, 333)
    for kernel in all_kernels()[::9]:
        inputs = make_inputs(kernel, dtype, sizes)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(kernel, dtype, inputs, sizes))
        for operand, column in results[0].items():
            for k, value in enumerate(column):
                assert torch.equal(results[1][operand][k], value)
                assert torch.equal(results[2][operand][k], value)
        k = sizes.index(LARGE[1])
        for operand, value in expected_of(kernel, dtype, inputs, k).items():
            assert_equal(results[1][operand][k], value, kernel.text)


# Half precision -----------------------------------------------------------------------------------

HALF = (torch.float16, torch.bfloat16)
ALL_BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


def copying_kernel() -> Kernel:
    """SGD's: ``s0 = momentum * s0 + ... g``, ``u = -lr * s0``."""
    return program_of(torchopt.sgd(0.1, momentum=0.5), 2).kernels["update"]


def run_with_numbers(
    kernel: Kernel, dtype: torch.dtype, inputs: dict[str, Tensor], row: Sequence[float]
) -> dict[str, Tensor]:
    size = next(iter(inputs.values())).numel()
    outputs = {s: torch.empty(size, dtype=dtype_of(s, dtype)) for s in kernel.outputs}
    run_kernel(
        native.library(),
        backends.function_of(kernel),
        native.DTYPES[dtype],
        sum(1 << k for k, s in enumerate(kernel.inputs) if s in OF_PARAMETERS),
        sum(1 << k for k, s in enumerate(kernel.outputs) if s in OF_PARAMETERS),
        [size],
        [inputs[s].data_ptr() for s in kernel.inputs],
        [x.data_ptr() for x in outputs.values()],
        row,
    )
    return outputs


@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
def test_all_half_numbers_widen_and_narrow_as_torch_does(dtype: torch.dtype) -> None:
    kernel = copying_kernel()
    values = ALL_BITS.view(dtype)
    nothing = torch.full((len(values),), -0.0)  # which changes nothing that is added to it
    inputs = {"g": values, "s0": nothing}
    outputs = run_with_numbers(kernel, dtype, inputs, [1.0] * len(kernel.numbers))
    wide, back = outputs["s0"], outputs["u"]
    nan = values.isnan()
    assert torch.equal(wide.isnan(), nan)
    assert torch.equal(back.isnan(), nan)
    assert torch.equal(wide[~nan].view(torch.int32), values.float()[~nan].view(torch.int32))
    assert torch.equal(back[~nan].view(torch.int16), ALL_BITS[~nan])


@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
def test_float32_rounds_to_half_as_torch_does(dtype: torch.dtype) -> None:
    """Half numbers, the middles between neighbours, both sides of the middles, and any bits."""
    halves = ALL_BITS.view(dtype).float()
    halves = halves[~halves.isnan()].sort().values
    middles = (halves[1:] + halves[:-1]) / 2
    bits = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32).view(torch.float32)
    inf = torch.tensor(float("inf"))
    edges = [halves, middles, torch.nextafter(middles, inf), torch.nextafter(middles, -inf), bits]
    # above the largest finite number and below the smallest, where rounding changes its rule
    largest = torch.finfo(dtype).max
    for value in (65519.9, 65520.0, 65520.1, 2.0**-25, 2.0**-24, 1.5 * 2.0**-24, largest):
        x = torch.tensor([value, -value])
        edges += [x, torch.nextafter(x, inf), torch.nextafter(x, -inf)]
    values = torch.cat(edges)
    kernel = copying_kernel()  # u = (g * n + s0 * n ...) * n
    row = [1.0] * len(kernel.numbers)
    outputs = run_with_numbers(
        kernel, dtype, {"g": torch.zeros(len(values), dtype=dtype), "s0": values}, row
    )
    expected = (values + 0.0).to(dtype)
    nan = expected.isnan()
    assert torch.equal(outputs["u"].isnan(), nan)
    zero = expected == 0  # -0 + 0 is 0
    usual = ~nan & ~zero
    assert torch.equal(outputs["u"][usual].view(torch.int16), expected[usual].view(torch.int16))
    assert (outputs["u"][zero] == 0).all()


# Calls --------------------------------------------------------------------------------------------


@every_dtype
def test_absent_inputs_read_as_zeros(dtype: torch.dtype) -> None:
    sizes = (3, 300, 1)
    for kernel in all_kernels()[::3]:
        inputs = make_inputs(kernel, dtype, sizes)
        zeros = {s: list(column) for s, column in inputs.items()}
        for k, operand in enumerate(kernel.inputs):
            position = k % len(sizes)
            zeros[operand][position] = torch.zeros_like(inputs[operand][position])
            inputs[operand][position] = None
        actual, expected = run(kernel, dtype, inputs, sizes), run(kernel, dtype, zeros, sizes)
        for operand, column in expected.items():
            for a, e in zip(actual[operand], column):
                assert_equal(a, e, kernel.text)


@every_dtype
def test_what_goes_nowhere_is_dropped(dtype: torch.dtype) -> None:
    sizes = (3, 300, 1025)
    for kernel in all_kernels()[::3]:
        inputs = make_inputs(kernel, dtype, sizes)
        expected = run(kernel, dtype, inputs, sizes)
        dropped = [(s, k % len(sizes)) for k, s in enumerate(kernel.outputs)]
        actual = run(kernel, dtype, inputs, sizes, dropped=dropped)
        for operand, column in expected.items():
            for k, value in enumerate(column):
                want = torch.full_like(value, 77.0) if (operand, k) in dropped else value
                assert torch.equal(actual[operand][k], want)


@every_dtype
def test_each_tensor_has_its_row_of_numbers(dtype: torch.dtype) -> None:
    sizes, rows = (5, 300, 7, 64), [2, 0, 1, 2]
    for kernel in all_kernels()[::3]:
        inputs = make_inputs(kernel, dtype, sizes)
        outputs = run(kernel, dtype, inputs, sizes, rows)
        for k, row in enumerate(rows):
            for operand, value in expected_of(kernel, dtype, inputs, k, row).items():
                assert_equal(outputs[operand][k], value, kernel.text)


@every_dtype
def test_outputs_may_be_inputs(dtype: torch.dtype) -> None:
    """In place: every output that has an input of its name overwrites it, at any size."""
    for kernel in all_kernels():
        pairs = {("p" if s == "u" else s): s for s in kernel.outputs}
        if "p" not in kernel.inputs or any(s.startswith("bar") for s in kernel.inputs):
            continue
        inputs = make_inputs(kernel, dtype, SIZES)
        expected = run(kernel, dtype, inputs, SIZES)
        own = {s: inputs[s] for s in pairs if s in inputs}
        scratch = {s: [x.clone() for x in expected[pairs[s]]] for s in pairs if s not in inputs}
        run_kernel(
            native.library(),
            backends.function_of(kernel),
            native.DTYPES[dtype],
            sum(1 << k for k, s in enumerate(kernel.inputs) if s in OF_PARAMETERS),
            sum(1 << k for k, s in enumerate(kernel.outputs) if s in OF_PARAMETERS),
            SIZES,
            [x.data_ptr() for s in kernel.inputs for x in inputs[s]],
            [x.data_ptr() for s in pairs for x in (own.get(s) or scratch[s])],
            numbers_of(kernel),
        )
        for operand, column in own.items():
            for a, e in zip(column, expected[pairs[operand]]):
                assert_equal(a, e, (kernel.text, operand))


def test_calls_without_sense_are_refused_and_write_nothing() -> None:
    library, kernel = native.library(), all_kernels()[0]
    inputs = [torch.ones(4) for _ in kernel.inputs]
    outputs = [torch.full((4,), 77.0) for _ in kernel.outputs]
    given, taken = [x.data_ptr() for x in inputs], [x.data_ptr() for x in outputs]
    row = numbers_of(kernel)
    for bad in (
        {"kernel": -1},
        {"kernel": -2},
        {"kernel": len(all_kernels()) + 1000},
        {"dtype": -1},
        {"dtype": 4},
        {"sizes": [-1]},
        {"sizes": [-(2**62)]},
    ):
        call = {"kernel": library.find(kernel.name), "dtype": 1, "sizes": [4]} | bad
        first = (call["kernel"], call["dtype"], 0, 0, call["sizes"])
        with pytest.raises(RuntimeError, match=r"refused a call \(code -"):
            run_kernel(library, *first, given, taken, row, None, len(row))
        assert all((x == 77.0).all() for x in outputs), bad
    run_kernel(library, backends.function_of(kernel), 1, 0, 0, [4], given, taken, row)
    assert not any((x == 77.0).any() for x in outputs)


def test_no_tensors_at_all() -> None:
    kernel = all_kernels()[0]
    run_kernel(
        native.library(), backends.function_of(kernel), 1, 0, 0, [], [], [], numbers_of(kernel)
    )


def test_unknown_instruction_set_is_refused() -> None:
    before = native.library().instruction_set
    with pytest.raises(ValueError, match="'sse9'"):
        native.library().select("sse9")
    assert native.library().instruction_set == before
