"""Clipping by norm where some gradients are distributed tensors, and others are not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


tensors = pytest.importorskip("torch.distributed.tensor")
meshes = pytest.importorskip("torch.distributed.device_mesh")


@pytest.fixture(name="processes", scope="module")
def processes_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process."""
    file = Path(tmp_path_factory.mktemp("group")) / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def spread(x: Tensor, k: int) -> Tensor:
    """Return a tensor as it is, sharded over one mesh, or over another one of two dimensions."""
    if k == 0:
        return x.clone()
    if k == 1:
        return tensors.distribute_tensor(
            x, meshes.init_device_mesh("cpu", (1,)), [tensors.Shard(0)]
        )
    mesh = meshes.init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    return tensors.distribute_tensor(x, mesh, [tensors.Replicate(), tensors.Shard(1)])


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("kinds", [(0, 1, 2), (1, 0), (2, 1), (1, 1)], ids=str)
def test_the_norm_is_that_of_all(order: float, kinds: tuple[int, ...]) -> None:
    values, grads = ([nonzero(3, 2) for _ in kinds] for _ in range(2))
    tx = torchopt.chain(torchopt.clip_grad_norm(0.25, order), torchopt.sgd(1.0))
    norm = torch.linalg.vector_norm(torch.cat(grads), order)
    params = [nn.Parameter(spread(x, k)) for x, k in zip(values, kinds)]
    for p, g, k in zip(params, grads, kinds):
        p.grad = spread(g, k)
    torchopt.Optimizer(params, tx).step()
    for p, x, g in zip(params, values, grads):
        whole = p.full_tensor() if isinstance(p, tensors.DTensor) else p
        assert_close(whole.detach(), x - g * 0.25 / (norm + 1e-6))
