"""A run in a folder: killed and gone on with, digit for digit; refused where it is another one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchopt.diff import Checkpointed, Unrolled, unroll


LENGTH = 9


def run(
    adjoint: Any, rate: float = 0.1, seed: int = 0, length: int = LENGTH
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Return results, an outer loss, and what to differentiate it by."""
    torch.manual_seed(seed)
    start = torch.tensor([[0.3, -0.5], [0.8, 0.1]], dtype=torch.float64, requires_grad=True)
    momentum = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    xs = (torch.arange(4.0 * length).reshape(length, 2, 2).double() / 9).sin().requires_grad_()

    def step(carry: Any, x: Tensor) -> Any:
        w, m, count = carry
        y = torch.dropout((x @ w).tanh(), 0.3, True)
        (g,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
        m = momentum * m + g / (count + 1)
        return (w - rate * m, m, count + 1), {"loss": y.sum(), "count": count}

    (w, _, count), ys = unroll(step, (start, torch.zeros_like(start), 0), xs, adjoint=adjoint)
    assert count == length
    results = [w.detach(), ys["loss"].detach(), ys["count"], torch.rand(2)]
    return results, w.square().sum() + ys["loss"].square().sum(), [start, momentum, xs]


def finished(adjoint: Any, **settings: Any) -> list[Tensor]:
    results, loss, by = run(adjoint, **settings)
    return [*results, *torch.autograd.grad(loss, by)]


def in_child(function: Callable[[], Any]) -> int:
    """Call a function in another process; return the status that this ends with."""
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="there is neither fork nor SIGKILL")
def test_a_killed_run_goes_on_in_both_directions(tmp_path: Path) -> None:
    import torch.distributed.checkpoint

    expected = finished(Unrolled())
    killed_at = [("forward", 5), ("backward", 2), ("backward", 7)]
    for place in killed_at:

        def progress(direction: str, done: int, _: int, place: Any = place) -> None:
            if (direction, done) == place:
                os.kill(os.getpid(), signal.SIGKILL)

        killed = Checkpointed("log", store=tmp_path, progress=progress)
        assert in_child(lambda a=killed: finished(a)) == -signal.SIGKILL
        assert list(tmp_path.iterdir())
    told: list[tuple[str, int, int]] = []
    resumed = Checkpointed("log", store=tmp_path, progress=lambda *seen: told.append(seen))
    found = finished(resumed)
    assert told[0] == ("backward", 7, LENGTH)  # the forward sweep was whole, and two thirds back
    assert told[-1] == ("backward", LENGTH, LENGTH)
    assert all(map(torch.equal, found, expected))
    assert not list(tmp_path.iterdir())


class StoppedError(Exception):
    pass


def interrupted(folder: Path, direction: str = "forward", steps: int = 5, **settings: Any) -> None:
    def progress(where: str, done: int, _: int) -> None:
        if (where, done) == (direction, steps):
            raise StoppedError

    with pytest.raises(StoppedError):
        finished(Checkpointed(3, store=folder, progress=progress), **settings)


@pytest.mark.parametrize(
    ("every", "settings", "message"),
    [
        (3, {"length": 8}, r"the number of steps \(9 there, 8 here\)"),
        (4, {}, r"the adjoint \(every=3, slots=None, .* there, every=4"),
        (3, {"rate": 0.2}, "differs: step .its code, or what it closes over"),
    ],
)
def test_another_run_is_refused(
    tmp_path: Path, every: int, settings: dict[str, Any], message: str
) -> None:
    interrupted(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        run(Checkpointed(every, store=tmp_path), **settings)
    assert sorted(tmp_path.iterdir()) == before


def test_other_random_numbers_are_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(ValueError, match="draw random numbers"):
        run(Checkpointed(3, store=tmp_path), seed=1)


def test_what_had_got_nowhere_begins_with_the_random_numbers_of_today(tmp_path: Path) -> None:
    interrupted(tmp_path, steps=2)
    assert list(tmp_path.glob("*carry"))
    found = finished(Checkpointed(3, store=tmp_path), seed=1)
    assert all(map(torch.equal, found, finished(Unrolled(), seed=1)))


def test_another_loss_is_refused_where_the_way_back_had_begun(tmp_path: Path) -> None:
    interrupted(tmp_path, "backward")
    _, loss, by = run(Checkpointed(3, store=tmp_path))
    with pytest.raises(RuntimeError, match="differentiated another loss"):
        torch.autograd.grad(2 * loss, by)


def test_nothing_is_left_by_a_graph_that_is_kept(tmp_path: Path) -> None:
    """A Hessian-vector product needs the graph twice; the files go with it."""
    expected = second_derivative(Unrolled())
    found = second_derivative(Checkpointed(3, store=tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not list(tmp_path.iterdir())


def second_derivative(adjoint: Any) -> list[Tensor]:
    _, loss, by = run(adjoint)
    grads = torch.autograd.grad(loss, by, create_graph=True)
    return list(torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), by))


def test_torch_func_is_refused(tmp_path: Path) -> None:
    adjoint = Checkpointed(store=tmp_path)

    def loss(w: Tensor) -> Tensor:
        return unroll(lambda c, _: (c.sin(), None), w, length=3, adjoint=adjoint)[0].sum()

    with pytest.raises(RuntimeError, match=r"inside torch\.func"):
        torch.func.grad(loss)(torch.ones(2))


def test_a_carry_of_other_things_than_numbers_is_refused(tmp_path: Path) -> None:
    w = torch.ones(2, requires_grad=True)

    def step(carry: Any, _: None) -> Any:
        return {"w": carry["w"].sin(), "text": carry["text"] + "."}, None

    with pytest.raises(TypeError, match="leaf 'text' of the carry is"):
        unroll(step, {"w": w, "text": ""}, length=3, adjoint=Checkpointed(store=tmp_path))


def test_progress_needs_rich_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r'pip install "torchopt\[progress\]"'):
        finished(Checkpointed(progress=True))


def test_progress_is_told_in_both_directions(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, int, int]] = []
    finished(Checkpointed("sqrt", progress=lambda *seen: told.append(seen)))
    forward = [("forward", n, LENGTH) for n in range(1, LENGTH + 1)]
    assert told == forward + [("backward", n, LENGTH) for n in range(1, LENGTH + 1)]
    pytest.importorskip("rich")
    finished(Checkpointed("sqrt", progress=True))
    shown = capsys.readouterr().out
    assert f"{LENGTH}/{LENGTH}" in shown
    assert "backward" in shown
