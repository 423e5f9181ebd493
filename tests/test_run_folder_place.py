"""The folder of a run: whether it can be written to, whose it is, and what else lies there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchopt.diff import Checkpointed, unroll
from torchopt.diff.replay import files, place


W = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
CALLS: list[int] = []


def step(w: Tensor, _: None) -> Any:
    return w.sin() * 1.1, w.sum()


def gradient(folder: Any, progress: Any = False) -> Tensor:
    w, ys = unroll(step, W, length=9, adjoint=Checkpointed("log", store=folder, progress=progress))
    return torch.autograd.grad(w.sum() + ys.sum(), W)[0]


EXPECTED = torch.autograd.grad([x.sum() for x in unroll(step, W, length=9)], W)[0]


def other_process(folder: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, torch; from torchopt.diff import Checkpointed, unroll\n"
        "w = torch.ones(2, requires_grad=True)\n"
        "step = lambda w, _: (w.sin(), None)\n"
        "unroll(step, w, length=9, adjoint=Checkpointed(store=sys.argv[1]))\n"
    )
    return subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)


def stop_at(direction: str, step: int, then: Callable[[], Any]) -> Callable[[str, int, int], None]:
    def progress(way: str, done: int, _: int) -> None:
        if (way, done) == (direction, step):
            then()

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "sub"):
        with pytest.raises(OSError, match=r"nothing can be written there.*Nothing has been run"):
            gradient(folder, stop_at("forward", 1, interrupt))
    assert file.read_text() == "mine"


def test_too_full_a_disk_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Usage", (), {"free": 20})
    monkeypatch.setattr(place.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(OSError, match=r"take 80 bytes, and .* has room for 20 bytes"):
        gradient(tmp_path, stop_at("forward", 1, interrupt))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_keeps_what_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if "step6" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device.*start the same program again"):
        gradient(tmp_path)
    monkeypatch.undo()
    reached: list[tuple[str, int]] = []
    found = gradient(tmp_path, lambda *seen: reached.append(seen[:2]))
    assert reached[0] == ("forward", 4)
    assert torch.equal(found, EXPECTED)


@pytest.mark.parametrize("content", ["not json", "[1, 2]"])
def test_foreign_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert torch.equal(gradient(tmp_path), EXPECTED)  # what has another name is left alone
    (tmp_path / "T9-settings").write_text(content)
    with pytest.raises(ValueError, match="T9-settings is no file of a run"):
        gradient(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["T9-settings", "notes.txt"]


def test_a_finished_run_and_a_damaged_one(tmp_path: Path) -> None:
    for _ in range(2):
        assert torch.equal(gradient(tmp_path), EXPECTED)
        assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        gradient(tmp_path, stop_at("backward", 4, interrupt))
    damaged = next(tmp_path.glob("*-end"))
    for path in damaged.iterdir():
        path.write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"-step9-end is damaged.*to start over"):
        gradient(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="locks are those of POSIX")
def test_two_processes_at_once(tmp_path: Path) -> None:
    told: list[str] = []
    ask = lambda: told.append(other_process(tmp_path).stderr)  # noqa: E731
    assert torch.equal(gradient(tmp_path, stop_at("forward", 5, ask)), EXPECTED)
    assert f"in use by another process (number {os.getpid()})" in told[0]
    assert not list(tmp_path.iterdir())
