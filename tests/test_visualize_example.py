"""examples/visualize.py: what it writes, and that what cannot be done ends in one line."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fusing import needs_library


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import visualize  # noqa: E402


BEGINNINGS = {
    "graph.html": b"<!DOCTYPE html>",
    "graph.dot": b"digraph",
    "graph.png": b"\x89PNG",
    "graph.PNG": b"\x89PNG",
    "graph.svg": b"<?xml",
}


@pytest.fixture(name="run")
def run_fixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Run it in an empty folder; return its exit code and what it has printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["visualize", *arguments])
        code = 0
        try:
            visualize.main()
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


@needs_library
@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_ending_says_what_is_written(run: Any, tmp_path: Path, name: str) -> None:
    pytest.importorskip("graphviz")
    if name.lower().endswith(("png", "svg")) and shutil.which("dot") is None:
        pytest.skip("the program dot is missing")
    code, out, _ = run("--output", f"new/{name}", "--steps", "1")
    assert code == 0
    assert (tmp_path / "new" / name).read_bytes().startswith(BEGINNINGS[name])
    lr = torch.tensor(0.1, requires_grad=True)
    (gradient,) = torch.autograd.grad(visualize.adapt(1, lr)[0], lr)
    assert f"its gradient arrives; its norm is {abs(gradient.item()):.3g}." in out
    assert "took the number 0.1" in out
    assert max(map(len, out.splitlines())) <= 90


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "graph.xyz"), "must end in one of png, svg, pdf, html, dot, got 'graph.xyz'"),
        (("--output", "graph"), "must end in one of"),
        (("--output", ""), "must end in one of"),
        (("--output", "folder.png"), "folder.png is a folder"),
        (("--output", "file/graph.html"), "file is a file, not a folder"),
        (("--output", "file/deeper/graph.html"), "file is a file, not a folder"),
        (("--output", "a.html", "--dpi", "-5"), "argument --dpi: must be at least 1, got -5"),
        (("--output", "a.html", "--dpi", "5"), "--dpi must be from 10 to 1000, got 5"),
        (("--output", "a.html", "--steps", "0"), "argument --steps: must be at least 1, got 0"),
        (("--step", "many"), "argument --steps: must be a whole number, got 'many'"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(
    run: Any, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("kept")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("visualize: ")
    assert err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"folder.png", "file"}
    assert (tmp_path / "file").read_text() == "kept"


def test_a_missing_dot_ends_in_one_line_that_says_what_works(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run("--output", "graph.png")
    assert (code, err.count("\n")) == (2, 1)
    assert "apt install graphviz" in err
    assert "--output graph.html" in err
    assert run("--output", "graph.html", "--steps", "1")[0] == 0
    assert (tmp_path / "graph.html").exists()


def test_quick_writes_a_page_of_one_step_without_dot(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        assert run("--quick")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["gradient_graph-quick.html"]
    page = (tmp_path / "gradient_graph-quick.html").read_text()
    assert "1 step of MetaAdam" in page
    code, out, _ = run("--help")
    assert code == 0
    assert "--steps 1" in out
    assert "--dpi" in out


def test_the_picture_is_of_as_many_steps_as_were_asked_for(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("graphviz")
    for steps in (1, 3):
        assert run("--output", "graph.dot", "--steps", str(steps))[0] == 0
        source = (tmp_path / "graph.dot").read_text()
        labels = [f'"Adam step {k}"' in source for k in range(1, 5)]
        assert labels == [k <= steps for k in range(1, 5)]
