"""What ``test_two_ranks.py`` runs in two processes: jobs by name, each beside a single process.

Each of them trains with its half of every batch; the oracle has whole batches and plain tensors.
"""

from __future__ import annotations

import datetime
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import Case
from conftest import nonzero
from frameworks import ROWS, loss_of, takes_all_shapes, train, weights
from tolerances import assert_close
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states

import torchopt


WORLD, STEPS, MAX_NORM = 2, 3, 0.3
SGD = torchopt.sgd(0.1, momentum=0.9)
#: What is found of a job where fully_shard asks the CPU for what GPUs have: torch 2.6.
SKIPPED = "this torch shards nothing on a CPU"
#: Of the classes of torch.optim, those that cannot step such shards (torch 2.13).
REFUSED_BY_TORCH = ("adafactor", "muon", "rprop")


# Networks and batches -----------------------------------------------------------------------------


def networks(n: int, bias: bool = True) -> list[nn.Sequential]:
    """Return equal networks. Of the last layer the second process has nothing if it is sharded."""
    found = []
    for _ in range(n):
        net = nn.Sequential(nn.Linear(3, 5, bias), nn.Tanh(), nn.Linear(5, 1, bias)).double()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(nonzero(*p.shape) * 0.5)
        if found:
            net.load_state_dict(found[0].state_dict())
        found.append(net)
    return found


def batches(n: int = STEPS) -> tuple[list[Any], list[Any]]:
    """Return batches, and the halves of this process."""
    all_of_them = [(nonzero(4, 3), nonzero(4, 1)) for _ in range(n)]
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    return all_of_them, [(x[own], y[own]) for x, y in all_of_them]


def sharded(net: nn.Sequential) -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def whole(x: Any) -> Any:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def whole_weights(net: nn.Module) -> list[Tensor]:
    return list(map(whole, weights(net)))


def mean_of_ranks(loss: Tensor) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / WORLD


# Laws ---------------------------------------------------------------------------------------------


def ddp(case: Case) -> None:
    """Copies of a network that exchange gradients take the step of the whole batch."""
    plain, net, beside = networks(3, takes_all_shapes(case))
    data, own = batches()
    train(plain, case.cls(plain.parameters(), **case.kwargs), data, max_norm=MAX_NORM)
    for module, cls in ((net, case.cls), (beside, case.torch_cls)):
        if cls is not None:
            copies = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
            optimizer = cls(copies.parameters(), **case.kwargs)
            train(copies, optimizer, own, max_norm=MAX_NORM, agree=mean_of_ranks)
            assert_close(weights(module), weights(plain), times=10, what=cls.__module__)


def fsdp(case: Case) -> None:
    """So do shards, with norms of the whole; and states are those of the whole."""
    bias = takes_all_shapes(case)
    plain, net, again, beside = networks(4, bias)
    data, own = batches(STEPS + 1)
    reference = case.cls(plain.parameters(), **case.kwargs)
    train(plain, reference, data[:STEPS], max_norm=MAX_NORM)
    optimizer = case.cls(sharded(net).parameters(), **case.kwargs)
    train(net, optimizer, own[:STEPS], max_norm=MAX_NORM)
    assert_close(whole_weights(net), weights(plain), times=10, what="weights")
    assert_states_are_spread(optimizer)

    expected = states.get_optimizer_state_dict(plain, reference)
    options = states.StateDictOptions(full_state_dict=True)
    full = states.get_optimizer_state_dict(net, optimizer, options=options)
    assert_close(full["state"], expected["state"], times=10, what="state")
    train(plain, reference, data[STEPS:], max_norm=MAX_NORM)
    # of a whole state to be shared out torch asks that it has a tensor with dimensions
    if any(x.dim() for entry in full["state"].values() for x in entry.values()):
        sharded(again).load_state_dict(net.state_dict())
        resumed = case.cls(again.parameters(), **case.kwargs)
        states.set_optimizer_state_dict(again, resumed, full, options=options)
        train(again, resumed, own[STEPS:], max_norm=MAX_NORM)
        assert_close(whole_weights(again), weights(plain), times=10, what="from a whole state")
    train(net, optimizer, own[STEPS:], max_norm=MAX_NORM)
    assert_close(whole_weights(net), weights(plain), times=10, what="a step more")
    if case.torch_cls is not None and case.algorithm.name not in REFUSED_BY_TORCH:
        theirs = case.torch_cls(sharded(beside).parameters(), **case.kwargs)
        train(beside, theirs, own, max_norm=MAX_NORM)
        assert_close(whole_weights(net), whole_weights(beside), times=10, what="torch.optim")


def fsdp_flat(case: Case) -> None:
    """Flattened states of shards come back."""
    net, again = map(sharded, networks(2, takes_all_shapes(case)))
    _, own = batches(STEPS + 1)
    optimizer = case.cls(net.parameters(), **case.kwargs)
    train(net, optimizer, own[:STEPS])
    again.load_state_dict(net.state_dict())
    resumed = case.cls(again.parameters(), **case.kwargs)
    options = states.StateDictOptions(flatten_optimizer_state_dict=True)
    saved = states.get_optimizer_state_dict(net, optimizer, options=options)
    states.set_optimizer_state_dict(again, resumed, saved, options=options)
    assert_close(whole_weights(again), whole_weights(net))
    for module, one in ((net, optimizer), (again, resumed)):
        train(module, one, own[STEPS:])
    assert_close(whole_weights(again), whole_weights(net))


def assert_states_are_spread(optimizer: Any) -> None:
    """Slots like the parameter are spread as it is; nothing is a sum still to be taken."""
    for p, entry in optimizer.state.items():
        for name, x in entry.items():
            if isinstance(x, Tensor) and x.shape == p.shape and x.dim():
                assert x.placements == p.placements, (name, x.placements, p.placements)
            assert not any(k.is_partial() for k in getattr(x, "placements", ())), name


def beside_one_process(make: Callable[[Any], Any]) -> None:
    """Assert that an optimizer goes the same way over shards as over whole tensors."""
    plain, net = networks(2)
    data, own = batches(4)
    train(plain, make(plain.parameters()), data)
    start = whole_weights(sharded(net))
    optimizer = make(net.parameters())
    train(net, optimizer, own)
    assert not torch.equal(start[0], whole_weights(net)[0])
    assert_close(whole_weights(net), weights(plain), times=10)
    assert_states_are_spread(optimizer)


def chained(*transformations: Any) -> Callable[[Any], Any]:
    return lambda params: torchopt.Optimizer(params, torchopt.chain(*transformations))


def projected(function: Any, *args: Any) -> Callable[[Any], Any]:
    return chained(SGD, torchopt.project(lambda tree: function(tree, *args)))


#: Transforms that look at more than one entry, and wrappers.
OTHERS = {
    "clip_grad_norm": chained(torchopt.clip_grad_norm(0.2), SGD),
    "clip_grad_norm-inf": chained(torchopt.clip_grad_norm(0.2, float("inf")), SGD),
    "clip_by_block_rms": chained(torchopt.clip_by_block_rms(0.1), SGD),
    "adaptive_grad_clip": chained(torchopt.adaptive_grad_clip(0.1), SGD),
    "centralize": chained(torchopt.centralize(), SGD),
    "scale_by_trust_ratio": chained(torchopt.scale_by_trust_ratio(), SGD),
    "add_noise": chained(torchopt.add_noise(0.1), SGD),
    "zero_nans": chained(torchopt.zero_nans(), SGD),
    "keep_params_nonnegative": chained(SGD, torchopt.keep_params_nonnegative()),
    "l2_ball": projected(torchopt.projections.projection_l2_ball),
    "l1_ball": projected(torchopt.projections.projection_l1_ball),
    "simplex": projected(torchopt.projections.projection_simplex),
    "reduce_on_plateau": chained(torchopt.reduce_on_plateau(factor=0.5, patience=1), SGD),
    "lookahead": chained(torchopt.lookahead(SGD, 2)),
    "MultiSteps": chained(torchopt.MultiSteps(SGD, 2)),
    "masked": chained(torchopt.masked(SGD, [True, False, True, True])),
    "tensor-lr": lambda params: torchopt.Adam(params, lr=torch.tensor(0.1)),
    "schedule": lambda params: torchopt.Adam(
        params, lr=torchopt.schedules.linear(0.1, 0.01, transition_steps=4)
    ),
    "partition": chained(
        torchopt.partition(
            {"matrix": torchopt.muon(0.1), "rest": torchopt.lamb(0.1)}, torchopt.matrices_and_rest
        )
    ),
    "sam": lambda params: torchopt.SAM(params, SGD, 0.1),
    "asam": lambda params: torchopt.SAM(params, SGD, 0.5, adaptive=True),
    "lbfgs": lambda params: torchopt.LBFGS(params, lr=0.1, max_iter=2),
}


def if_finite() -> None:
    """What one process has not finite, no process takes."""
    (net,) = networks(1)
    optimizer = chained(torchopt.apply_if_finite(SGD, 5))(sharded(net).parameters())
    _, own = batches(2)
    train(net, optimizer, own[:1])
    before = whole_weights(net)
    loss_of(net, own[1]).backward()
    if dist.get_rank() == 0:
        net[0].weight.grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    assert_close(whole_weights(net), before)
    for entry in optimizer.state.values():
        assert int(whole(entry["total_notfinite"])) == 1


def evaluation() -> None:
    """Weights to evaluate with, and back."""
    plain, net = networks(2)
    data, own = batches()
    results = []
    for module, batch in ((plain, data), (sharded(net), own)):
        optimizer = torchopt.AdamWScheduleFree(module.parameters(), 0.1)
        train(module, optimizer, batch)
        trained = whole_weights(module)
        optimizer.eval()
        results.append(whole_weights(module))
        optimizer.train()
        assert_close(whole_weights(module), trained)
        assert not torch.equal(results[-1][0], trained[0])
    assert_close(results[1], results[0], times=10)


JOBS: dict[str, Callable[[], None]] = {
    **{
        f"{law.__name__}-{case.name}": lambda law=law, case=case: law(case)
        for law in (ddp, fsdp, fsdp_flat)
        for case in ROWS
    },
    **{f"other-{n}": lambda make=make: beside_one_process(make) for n, make in OTHERS.items()},
    "other-apply_if_finite": if_finite,
    "other-evaluation": evaluation,
}


# The two processes --------------------------------------------------------------------------------


@contextmanager
def group(rank: int, store: str) -> Iterator[None]:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{store}", patience, WORLD, rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    dist.destroy_process_group()


def main(rank: int, folder: Path) -> None:
    """Run the jobs that a file names; write what went wrong with each."""
    found: dict[str, str] = {}
    with group(rank, str(folder / "store")):
        for name in json.loads((folder / "jobs.json").read_text()):
            default = torch.get_default_dtype()
            torch.manual_seed(20240)
            if any(c.algorithm.float64_scalars and name.endswith(f"-{c.name}") for c in ROWS):
                torch.set_default_dtype(torch.float64)
            try:
                JOBS[name]()
                found[name] = ""
            except Exception as error:
                found[name] = traceback.format_exc()
                if isinstance(error, AttributeError) and "record_event" in str(error):
                    found[name] = SKIPPED
            finally:
                torch.set_default_dtype(default)
            (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
