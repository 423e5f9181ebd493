"""The kernels for GPUs: their arithmetic in Triton's interpreter, their compilation, real GPUs.

No GPU is needed but for the last part: the interpreter runs the same text on the CPU, and Triton
compiles for a GPU that is not there. ``TRITON_INTERPRET`` is set for single tests only, since
others in this process may compile.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from pointwise import evaluate_kernel, program_of, user_optimizer
from tolerances import assert_close
from torch import Tensor

import torchopt
from torchopt.kernels import backends, device_tables, emit_triton, launch, native, triton_backend
from torchopt.kernels.catalogue import kernels
from torchopt.kernels.graph import OPERATIONS, TRUTH, Kernel, Node, input_node, make_kernel
from torchopt.packed import Packed, Packing


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


def type_of(stream: str, dtype: torch.dtype) -> torch.dtype:
    return dtype if stream in launch.OF_PARAMETERS else launch.slot_dtype(dtype)


def tensors_for(kernel: Kernel, dtype: torch.dtype, sizes: Sequence[int] = SIZES) -> Columns:
    """Random inputs: every third entry is zero, and slots are positive, as under a root."""
    columns: Columns = {}
    for stream in kernel.inputs:
        columns[stream] = []
        for size in sizes:
            x = torch.randn(size, dtype=torch.float64)
            x = x.abs() if stream.startswith("s") else x
            x[::3] = 0
            columns[stream].append(x.to(type_of(stream, dtype)))
    return columns


def rows_for(kernel: Kernel) -> list[list[float]]:
    return [[0.1 + 0.07 * k + row for k in range(len(kernel.numbers))] for row in range(2)]


def places_for(kernel: Kernel, like: Sequence[Tensor]) -> Columns:
    """Memory to write to, filled with a number that no kernel computes."""
    return {
        stream: [torch.full_like(x, 7.0, dtype=type_of(stream, x.dtype)) for x in like]
        for stream in kernel.outputs
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
        streams = {s: x[k] if given[s][k] is not None else 0 * x[k] for s, x in inputs.items()}
        wide = {s: x.to(launch.slot_dtype(dtype)) for s, x in streams.items()}
        for stream, value in evaluate_kernel(kernel, wide, numbers[row]).items():
            place = outputs[stream][k]
            if place is not None:
                assert_same(place, value.to(place.dtype), f"{kernel.text}\n{stream} of {sizes[k]}")
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
    for stream, column in outputs.items():
        others[stream] = [y if x is not None else None for x, y in zip(column, others[stream])]
    launch.run(kernel, inputs, others, like, numbers, rows)
    for stream, column in outputs.items():
        for x, y in zip(column, others[stream]):
            if x is not None:
                assert_same(x, y, f"{kernel.text}\n{stream}", exactly=True)


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
def test_half_precision_and_absent_streams(dtype: torch.dtype) -> None:
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
    check(kernel, dtype, {stream: pairs[stream] for stream in kernel.inputs})


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
    for stream, column in expected.items():
        assert torch.equal(flat[stream].flat, torch.cat(column))


@pytest.mark.usefixtures("interpreter")
def test_in_place() -> None:
    kernel = ADAM["apply"]
    inputs = tensors_for(kernel, torch.float64)
    expected = places_for(kernel, inputs["p"])
    numbers = rows_for(kernel)[:1]
    triton_backend.run(kernel, inputs, expected, inputs["p"], numbers, None)
    outputs = {stream: inputs["p" if stream == "u" else stream] for stream in expected}
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
    assert triton_backend.hindrance().startswith("TRITON_INTERPRET is set")


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


# Tables -------------------------------------------------------------------------------------------


class FakeGPU:
    """Stands in for torch.cuda: counts allocations of pinned memory."""

    def __init__(self) -> None:
        self.capturing = False
        self.stream = 1
        self.pinned: list[Tensor] = []

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def current_stream(self, device: torch.device) -> Any:
        return type("Stream", (), {"cuda_stream": self.stream})

    def allocate(self, size: int) -> Tensor:
        self.pinned.append(torch.empty(size, dtype=torch.uint8))
        return self.pinned[-1]


@pytest.fixture(name="gpu")
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    fake = FakeGPU()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", fake.is_current_stream_capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current_stream)
    monkeypatch.setattr(device_tables, "_pinned", fake.allocate)
    monkeypatch.setattr(device_tables, "_reserve", device_tables._Reserve())
    device_tables._kept.clear()
    yield fake
    device_tables._kept.clear()


def contents(*values: int) -> dict[Any, Callable[[], Tensor]]:
    return {
        ("integers", values): lambda: torch.tensor(values),
        ("numbers", values): lambda: torch.tensor(values, dtype=torch.float64) / 2,
        ("owners", values): lambda: torch.tensor(values, dtype=torch.int32),
    }


def tables(*values: int) -> list[Tensor]:
    return device_tables.tables_on(torch.device("cpu"), contents(*values))


def assert_tables(made: list[Tensor], *values: int) -> None:
    assert [x.dtype for x in made] == [torch.int64, torch.float64, torch.int32]
    assert [x.tolist() for x in made] == [list(values), [v / 2 for v in values], list(values)]
    assert all(x.data_ptr() % device_tables.ALIGNMENT == 0 for x in made)


def test_tables_are_copied_once_for_each_stream(gpu: FakeGPU) -> None:
    first = tables(1, 2, 3)
    assert_tables(first, 1, 2, 3)
    copies = len(gpu.pinned)
    assert all(x is y for x, y in zip(tables(1, 2, 3), first))
    assert len(gpu.pinned) == copies
    assert_tables(tables(4), 4)
    gpu.stream = 2
    assert all(x is not y for x, y in zip(tables(1, 2, 3), first))
    assert len(gpu.pinned) == copies + 2


def test_tables_are_forgotten_at_some_time(gpu: FakeGPU) -> None:
    for value in range(device_tables.KEPT):
        assert_tables(tables(value), value)
    assert len(device_tables._kept) == device_tables.KEPT


def test_captured_tables_have_memory_of_their_own(gpu: FakeGPU) -> None:
    eager = tables(1)
    gpu.capturing = True
    before = len(gpu.pinned)
    captured = [tables(1), tables(2), tables(1)]
    assert len(gpu.pinned) == before  # was allocated beforehand
    assert all(x is not y for x, y in zip(captured[0], eager))
    for made, value in zip(captured, (1, 2, 1)):
        assert_tables(made, value)
    memory = [x for x in gpu.pinned if x.numel() >= device_tables.RESERVE]
    assert device_tables._reserve._blocks[0] is memory[0]
    # the copies of a replay read what the host wrote at the capture
    sources = memory[0][:144].view(torch.int64).tolist()
    assert [sources[k] for k in (0, 6, 12)] == [1, 2, 1]
    gpu.capturing = False
    assert all(x is y for x, y in zip(tables(1), eager))


def test_reserve_grows(gpu: FakeGPU) -> None:
    gpu.capturing = True
    big = range(device_tables.RESERVE // 8)
    taken = [device_tables._reserve.take(size) for size in (16, len(big) * 8, 32)]
    assert [x.numel() for x in taken] == [16, len(big) * 8, 32]
    assert len({x.data_ptr() for x in taken}) == 3


# Optimizers, by the interpreter and on GPUs -------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., torchopt.GradientTransformation]] = {
    "sgd": lambda **k: torchopt.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1, **k),
    "adam": lambda **k: torchopt.adam(0.1, weight_decay=0.1, amsgrad=True, **k),
    "adamw": lambda **k: torchopt.adamw(0.1, **k),
    "rmsprop": lambda **k: torchopt.rmsprop(0.1, momentum=0.9, centered=True, **k),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
on_gpu = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
)


@pytest.fixture(name="device", params=["cpu", on_gpu])
def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device whose fused updates Triton's kernels compute: on the CPU by its interpreter."""
    if request.param == "cpu":
        if isinstance(native.load(), native.UnavailableError):
            pytest.skip("nothing is fused on the CPU: its kernels are not loaded")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(launch, "run", triton_backend.run)
    return request.param


def parameters(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters so far from zero that no update cancels them: errors stay relative to them."""
    return [x + 8 * x.sign() for x in gradients(device, dtype, seed=0)[0]]


def gradients(device: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[list[Tensor]]:
    """Gradients of several shapes for three steps."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3,), (0,), (40, 60), (1025,), ()]
    return [
        [torch.randn(s, generator=generator).to(device, dtype) for s in shapes] for _ in range(3)
    ]


def steps(
    tx: torchopt.GradientTransformation, params: list[Tensor], grads: Sequence[list[Tensor]]
) -> list[Tensor]:
    """Return the parameters and the slots after pure steps."""
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return [*params, *(x for slot in state.slots.values() for x in slot if x is not None)]


@every_optimizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_against_the_rules(name: str, dtype: torch.dtype, device: str) -> None:
    params, grads = parameters(device, dtype), gradients(device, dtype)
    fused, plain = (OPTIMIZERS[name](use_accelerated_op=use) for use in (True, False))
    # each of three steps may round differently; slots follow the parameters' last digits
    assert_close(steps(fused, params, grads), steps(plain, params, grads), dtype, times=4)


@every_optimizer
def test_derivatives_against_the_rules(name: str, device: str) -> None:
    def meta_gradients(use: bool) -> tuple[Tensor, ...]:
        params = [p.requires_grad_() for p in parameters(device, torch.float64)]
        grads = gradients(device, torch.float64)
        inputs = [*params, *(g.requires_grad_() for step in grads for g in step)]
        outputs = steps(OPTIMIZERS[name](use_accelerated_op=use), params, grads)
        loss = torch.stack([x.square().sum() for x in outputs]).sum()
        return torch.autograd.grad(loss, inputs)

    assert_close(meta_gradients(True), meta_gradients(False), times=100)


def test_differentiable_face_against_the_rules(device: str) -> None:
    def meta_gradients(use: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        net = torch.nn.Linear(30, 50, dtype=torch.float64).to(device)
        x = torch.randn(4, 30, dtype=torch.float64).to(device).requires_grad_()
        optimizer = torchopt.MetaAdam(net, lr=0.1, use_accelerated_op=use)
        start = list(net.parameters())
        for _ in range(3):
            optimizer.step(net(x).square().mean())
        return torch.autograd.grad(net(x).square().mean(), [x, *start])

    assert_close(meta_gradients(True), meta_gradients(False), times=100)


@pytest.mark.parametrize("device", [on_gpu])
@every_optimizer
def test_captured(name: str, device: str) -> None:
    """An inner loop of three steps is captured and replayed with other gradients."""
    tx = OPTIMIZERS[name](use_accelerated_op=True)
    params, grads = parameters(device), gradients(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps(tx, params, grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = steps(tx, params, grads)
    for seed in (10, 20):
        new = gradients(device, seed=seed)
        for old, values in zip(grads, new):
            torch._foreach_copy_(old, values)
        expected = steps(tx, params, new)  # reuses the memory that calls outside of the graph have
        graph.replay()
        assert_close(outputs, expected)


@pytest.mark.parametrize("device", [on_gpu])
@every_optimizer
def test_nothing_is_waited_for(name: str, device: str) -> None:
    tx = OPTIMIZERS[name](use_accelerated_op=True)
    params, grads = parameters(device), gradients(device)
    steps(tx, params, grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(tx, params, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
