"""Parameters that are spread over processes, here over one: every rule takes them.

``test_two_ranks.py`` has two processes; but with one every operation meets distributed tensors too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case
from conftest import nonzero
from frameworks import every_optimizer, reads_loss, takes_all_shapes
from fusing import needs_library
from tolerances import assert_close
from torch import Tensor, nn

import torchopt
from torchopt.base.distributed import placed


tensors = pytest.importorskip("torch.distributed.tensor")
meshes = pytest.importorskip("torch.distributed.device_mesh")


@pytest.fixture(name="mesh", scope="module")
def mesh_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A mesh of one process."""
    file = Path(tmp_path_factory.mktemp("group")) / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield meshes.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, tensors.DTensor) else x


def step(optimizer: Any, given: dict[str, Any]) -> None:
    """Take a step; a torch from before 2.13 may lack what the rule asks of spread tensors."""
    try:
        optimizer.step(**given)
    except (NotImplementedError, RuntimeError) as error:
        lacks = "sharding strategy" in str(error) or "ReduceOp.AVG" in str(error)
        if lacks and torch.torch_version.TorchVersion(torch.__version__) < (2, 13):
            pytest.skip(f"torch {torch.__version__}: {error}")
        raise


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_optimizer()
def test_a_step_is_that_of_plain_tensors(case: Case, dtype: torch.dtype, mesh: Any) -> None:
    shapes = [(4, 3), (3,) if takes_all_shapes(case) else (2, 2)]
    start, *grads = ([nonzero(*s, dtype=dtype) for s in shapes] for _ in range(4))
    found = []
    for spreads in (False, True):

        def way(x: Tensor, spreads: bool = spreads) -> Any:
            if not spreads:
                return x.clone()
            return tensors.distribute_tensor(x, mesh, [tensors.Shard(0)])

        params = [nn.Parameter(way(x)) for x in start]
        optimizer = case.cls(params, **case.kwargs, use_accelerated_op=False)
        for given in grads:
            for p, g in zip(params, given):
                p.grad = way(g)
            step(optimizer, {"value": 0.7} if reads_loss(case) else {})
        slots = [list(optimizer.state[p].values()) for p in params]
        found.append(([whole(p.detach()) for p in params], [list(map(whole, x)) for x in slots]))
        assert not spreads or all(p.placements == (tensors.Shard(0),) for p in params)
    assert_close(found[1][0], found[0][0], times=10)
    assert_close(found[1][1], found[0][1], times=10)


def test_results_fall_as_parameters_do(mesh: Any) -> None:
    """Sums still to be taken are taken; what is whole is divided; other shapes stay."""
    x = nonzero(4, 3)
    like = tensors.distribute_tensor(x, mesh, [tensors.Shard(0)])
    partial = tensors.DTensor.from_local(x, mesh, [tensors.Partial()], run_check=False)
    for given in (x, partial, tensors.distribute_tensor(x, mesh, [tensors.Replicate()])):
        assert placed(given, like).placements == (tensors.Shard(0),)
        assert_close(placed(given, like).full_tensor(), x)
    row = tensors.DTensor.from_local(x[0], mesh, [tensors.Partial()], run_check=False)
    assert placed(row, like).placements == (tensors.Replicate(),)
    assert placed(x[0], like).data_ptr() == x.data_ptr()
    assert placed(x, x) is x
    assert placed(None, like) is None


@needs_library
def test_a_kernel_that_is_required_is_refused(mesh: Any) -> None:
    x = tensors.distribute_tensor(nonzero(4, 3), mesh, [tensors.Shard(0)])
    params = [nn.Parameter(x)]
    params[0].grad = x.clone()
    with pytest.raises(RuntimeError, match="DTensor is no plain tensor"):
        torchopt.Adam(params, fused=True).step()
