"""Sums over all parameters where some are distributed tensors: estimated distances, and SAM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CASES, Case
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


tensors = pytest.importorskip("torch.distributed.tensor")
meshes = pytest.importorskip("torch.distributed.device_mesh")
ROWS = [case for case in CASES if case.algorithm.size == "all"]


@pytest.fixture(name="processes", scope="module")
def processes_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process."""
    file = Path(tmp_path_factory.mktemp("group")) / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def spread(x: Tensor) -> Tensor:
    mesh = meshes.init_device_mesh("cpu", (1,))
    return tensors.distribute_tensor(x, mesh, [tensors.Shard(0)])


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, tensors.DTensor) else x).detach()


def ends(make: Any, params: list[Tensor], grads: list[list[Tensor]], way: Any) -> list[Tensor]:
    """Return parameters, of which the first is ``way``, after some steps."""
    own = [nn.Parameter(way(params[0])), nn.Parameter(params[1].clone())]
    optimizer = make(own)
    for g in grads:
        own[0].grad, own[1].grad = way(g[0]), g[1].clone()
        optimizer.step()
    return list(map(whole, own))


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_the_estimate_is_of_the_whole(case: Case) -> None:
    params, first = ([nonzero(3, 2), nonzero(2)] for _ in range(2))
    grads = [[g * (1 + 0.3 * nonzero(*g.shape)) for g in first] for _ in range(4)]

    def make(own: Any) -> torchopt.Optimizer:
        return case.cls(own, **case.kwargs)

    found, expected = (ends(make, params, grads, way) for way in (spread, torch.clone))
    assert_close(found, expected, times=10)


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_the_norm_of_sam_is_that_of_all(adaptive: bool) -> None:
    values = [nonzero(3, 2), nonzero(2)]
    found = []
    for way in (spread, torch.clone):
        own = [nn.Parameter(way(values[0])), nn.Parameter(values[1].clone())]
        optimizer = torchopt.SAM(own, torchopt.sgd(0.1), 0.5, adaptive)

        def closure(own: Any = own, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            for p in own:
                (p**4).sum().backward()

        optimizer.step(closure)
        closure()
        optimizer.first_step()
        closure()
        optimizer.second_step()
        found.append(list(map(whole, own)))
    assert_close(found[0], found[1])
