"""The trainer of tutorial 8: as short as it is said to be, with the plain loop's derivative."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import torchopt


TUTORIAL = Path(__file__).resolve().parents[1] / "tutorials" / "8_long_unrolls.md"
STEPS, BATCH, LR = 9, 6, 0.05


def source() -> str:
    """Return the cell that is the trainer."""
    cells = re.findall(r"```\{code-cell\} python\n(.*?)```", TUTORIAL.read_text("utf-8"), re.DOTALL)
    (cell,) = (cell for cell in cells if "def trained(" in cell)
    return cell.strip()


@pytest.fixture(scope="module")
def trained() -> Callable[..., dict[str, Tensor]]:
    namespace: dict[str, Any] = {}  # of no module, as in the shell of a debugger
    exec(compile(source(), str(TUTORIAL), "exec"), namespace)
    return namespace["trained"]


def problem() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return a network of which a layer is frozen and one has a buffer, data, and weights."""
    torch.manual_seed(3)
    net = nn.Sequential(
        *(nn.Linear(2, 4), nn.BatchNorm1d(4).eval(), nn.Tanh(), nn.Dropout(0.3)),
        nn.Linear(4, 1),
    ).double()
    net[0].requires_grad_(False)
    x, y = torch.randn(20, 2).double(), torch.randn(20, 1).double()
    return net, x, y, (0.5 + torch.rand(20).double()).requires_grad_()


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 5 * (outputs - targets).square().mean(1)


def influence(trained: Any, folder: Path, parts: int, progress: Any) -> list[Tensor]:
    net, x, y, weights = problem()
    options = {"steps": STEPS, "batch": BATCH, "micro_batches": parts, "lr": LR}
    params = trained(net, squares, x, y, weights, folder, progress=progress, **options)
    outer = functional_call(net, params, (x,)).square().mean()
    starts = [p for p in net.parameters() if p.requires_grad]
    return list(torch.autograd.grad(outer, [weights, *starts]))


def plain(parts: int) -> list[Tensor]:
    """Return the same derivatives of a loop that is recorded, batch by batch."""
    net, x, y, weights = problem()
    starts = {name: p for name, p in net.named_parameters() if p.requires_grad}
    tx = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adamw(LR, eps_root=1e-8))
    params: dict[str, Tensor] = dict(starts)
    state = tx.init(params)
    torch.manual_seed(0)
    for index in torch.randint(len(x), (STEPS, BATCH)):
        total = torch.zeros(()).double()
        for part in index.split(BATCH // parts):
            outputs = functional_call(net, params, (x[part],))
            total = total + (weights[part] * squares(outputs, y[part])).sum() / BATCH
        found = torch.autograd.grad(total, list(params.values()), create_graph=True)
        grads = dict(zip(params, found))
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
    outer = functional_call(net, params, (x,)).square().mean()
    return list(torch.autograd.grad(outer, [weights, *starts.values()]))


def test_it_has_at_most_forty_lines() -> None:
    lines = source().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("parts", [1, 3])
def test_its_derivative_is_that_of_the_plain_loop(trained: Any, tmp_path: Path, parts: int) -> None:
    told: list[tuple[str, int, int]] = []
    found = influence(trained, tmp_path, parts, lambda *place: told.append(place))
    for ours, expected in zip(found, plain(parts), strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert told[-1] == ("backward", STEPS, STEPS)
    assert ("forward", STEPS, STEPS) in told
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="there is neither fork nor SIGKILL")
def test_it_goes_on_after_a_kill_in_both_directions(trained: Any, tmp_path: Path) -> None:
    expected = influence(trained, tmp_path / "other", 3, False)
    for place in (("forward", 5), ("backward", 4)):

        def progress(direction: str, done: int, _: int, place: Any = place) -> None:
            if (direction, done) == place:
                os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if child == 0:
            influence(trained, tmp_path / "run", 3, progress)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    told: list[tuple[str, int, int]] = []
    found = influence(trained, tmp_path / "run", 3, lambda *seen: told.append(seen))
    assert told[0][0] == "backward"
    assert told[0][1] > 1  # not from the end
    assert all(map(torch.equal, found, expected))
