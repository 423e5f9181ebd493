"""What kernels for GPUs read: tables that are copied once, and kept for captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from torchopt.kernels.backends import device_tables


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
