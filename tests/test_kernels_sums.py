"""Sums over the entries of a kernel's output: exact to float64, and the same bits everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fusing import needs_library, sets_fixture  # noqa: F401
from torch import Tensor

import torchopt
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.backends import cpu as native
from torchopt.kernels.backends.launch import SUM, launch
from torchopt.kernels.generate.graph import Kernel
from torchopt.kernels.generate.learned import NUMBER, SINGLE
from torchopt.kernels.generate.program import build


pytestmark = needs_library

#: Around the blocks and the chunks of the engine.
SIZES = [0, 1, 15, 17, 255, 257, 4095, 4096, 4097, 70_001]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def kernel() -> Kernel:
    """The derivative of SGD by gradient and learning rate: compiled, and of programs."""
    tx = torchopt.sgd(0.5)
    rows = [part.hyperparameters() for part in tx.parts]
    kinds = (NUMBER, NUMBER, NUMBER, SINGLE)
    program = build(tx.parts, rows, 1, [False], has_params=True, kinds=kinds)
    (operand,) = program.hypers("update")
    return program.backward("update", frozenset({operand}))[0]


def run(gs: list[Tensor], bars: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    own = kernel()
    *_, summed = own.output_operands
    wanted = {operand: SUM if operand == summed else None for operand in own.output_operands}
    outputs = launch(own, {"g": gs, "bar_u": bars}, gs, wanted, [(-0.5, 1.0, -1.0)], None)  # pyright: ignore[reportArgumentType]
    return list(outputs["g"]), outputs[summed]  # pyright: ignore[reportReturnType]


def tensors(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    return tuple([torch.randn(n).to(dtype) for n in SIZES] for _ in range(2))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_every_size(dtype: torch.dtype) -> None:
    gs, bars = tensors(dtype)
    others, sums = run(gs, bars)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert sums.dtype == torch.float64
    for g, bar, other, found in zip(gs, bars, others, sums):
        products = (bar.to(wide) * (g.to(wide) * 1.0)) * -1.0
        scale = products.double().abs().sum().item()
        assert abs(found.item() - products.double().sum().item()) <= 1e-15 * scale
        assert torch.equal(other, (bar.to(wide) * -0.5).to(dtype))


def test_instruction_sets_and_threads_give_the_same_bits(sets: list[str]) -> None:
    gs, bars = tensors(torch.float32)
    results = []
    for name in sets:
        native.library().select(name)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            # many of them, so that there is enough work to share
            results.append(run(gs * 40, bars * 40)[1])
    assert all(torch.equal(results[0], other) for other in results[1:])
    first = results[0].view(40, -1)
    assert torch.equal(first, first[:1].expand_as(first)), "the place in the call plays no part"


def test_an_interpreted_kernel_sums_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    gs, bars = tensors(torch.float32)
    compiled = run(gs, bars)[1]
    monkeypatch.setattr(backends, "find", lambda name: None)
    monkeypatch.setattr(backends, "_programs", {})
    function = backends.function_of(kernel())
    assert not isinstance(function, int)
    facts = (native.library(), function, 3, 1)
    monkeypatch.setattr("torchopt.kernels.backends.launch._facts", lambda k: facts)
    assert torch.equal(run(gs, bars)[1], compiled)


def test_infinite_and_nan_entries_reach_the_sum() -> None:
    for value in (float("inf"), float("nan")):
        gs, bars = tensors(torch.float32)
        gs[-1][12_345] = value
        sums = run(gs, bars)[1]
        assert not sums[-1].isfinite()
        assert bool(sums[:-1].isfinite().all())
