"""Files of the examples: two runs in one folder, files that do not belong there, a full disk."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


EXAMPLES = Path(__file__).parents[1] / "examples"

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.usefixtures("examples_on_path")

TINY = [
    *("--ways", "3", "--shots", "2", "--queries", "3", "--inner-steps", "1", "--meta-batch", "2"),
    *("--channels", "4", "--blocks", "1", "--pretrain-iterations", "2", "--test-tasks", "4"),
    *("--threads", "1", "--time-budget", "0", "--iterations", "4", "--checkpoint-every", "2"),
]
FILES = ("checkpoint.pt", "metrics.jsonl", "results.json", "curves.png")


def few_shot(*options: str) -> Any:
    """Run the example, but for the comparison with fine-tuning, which takes long."""
    import few_shot
    from common.maml import Accuracy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_shot, "fine_tuned", lambda *_, **__: (Accuracy(torch.ones(4)), ""))
        patch.setattr(few_shot, "CURVE_TASKS", 2)
        return few_shot.main([*TINY, *options])


def sinusoid(*options: str) -> Any:
    tiny = ("--iterations", "2", "--seeds", "2", "--test-waves", "3", "--threads", "1")
    import few_shot

    return few_shot.main(["--data", "sinusoid", *tiny, *options])


def refused(run: Callable[[], Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a run ends with one line that says why, and exit code 2."""
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    text = capsys.readouterr().err.strip()
    assert re.search(message, text), text
    assert text.count("\n") == 0
    assert "Traceback" not in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run, to be copied."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        folder = tmp_path_factory.mktemp("finished")
        few_shot("--output", str(folder))
    finally:
        sys.path.remove(str(EXAMPLES))
    return folder


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """Return a folder with the files of a run."""
    for name in FILES:
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


# Two runs -----------------------------------------------------------------------------------------

HOLD = """
import sys, time
sys.path.insert(0, {examples!r})
from pathlib import Path
from common.lock import FolderLock
lock = FolderLock(Path({folder!r}))
print("held", flush=True)
time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds a folder."""
    program = HOLD.format(examples=str(EXAMPLES), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("options", [["--resume"], ["--overwrite"], []])
def test_a_second_run_is_refused_and_told_who_is_there(
    run_folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before, process = contents(run_folder), hold(run_folder)
    try:
        message = rf"{run_folder} is in use by another run \(process {process.pid} on .*, since "
        refused(lambda: few_shot("--output", str(run_folder), *options), message, capsys)
        refused(lambda: sinusoid("--output", str(run_folder), *options), message, capsys)
        assert contents(run_folder) == before
    finally:
        process.kill()
        process.communicate()


def test_the_lock_of_a_killed_run_is_stale(run_folder: Path) -> None:
    process = hold(run_folder)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (run_folder / ".lock").read_text()
    assert few_shot("--output", str(run_folder), "--resume")["iterations"] == 4


def test_a_run_in_this_process_holds_the_folder_until_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from common.lock import FolderLock, release_all

    lock = FolderLock(tmp_path)
    refused(lambda: few_shot("--output", str(tmp_path)), f"process {os.getpid()} on", capsys)
    release_all()
    assert lock._file is None
    few_shot("--output", str(tmp_path))
    refused(lambda: few_shot("--output", str(tmp_path)), "holds a run already", capsys)
    few_shot("--output", str(tmp_path), "--overwrite")


def test_a_lock_file_of_others_says_nothing_and_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b"\xff not JSON")
    few_shot("--output", str(tmp_path))
    assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()


# Files that do not belong there -------------------------------------------------------------------


def damage_checkpoint(path: Path, how: str) -> None:
    content = path.read_bytes()
    saved = torch.load(path, weights_only=True)
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "flipped":
        path.write_bytes(bytes(b ^ 0x55 for b in content))
    elif how == "a module":
        torch.save(torch.nn.Linear(2, 2), path)
    elif how == "weights of others":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif how == "a list":
        torch.save([1, 2], path)
    elif how == "settings of others":
        torch.save({"settings": {"lr": 0.1}}, path)
    elif how == "settings only":
        torch.save({"settings": saved["settings"]}, path)
    elif how == "other shapes":
        saved["params"] = {name: torch.zeros(1, 1, 1, 9) for name in saved["params"]}
        torch.save(saved, path)
    elif how == "another optimizer":
        saved["outer"] = torch.optim.SGD([torch.zeros(1)], 0.1).state_dict()
        torch.save(saved, path)
    elif how == "no generator":
        saved["sampler"] = torch.zeros(3)
        torch.save(saved, path)
    else:
        assert how == "a wrong count"
        torch.save({**saved, "iteration": "four"}, path)


@pytest.mark.parametrize(
    "how",
    [
        *("truncated", "empty", "text", "flipped", "a module", "weights of others", "a list"),
        *("settings of others", "settings only", "other shapes", "another optimizer"),
        *("no generator", "a wrong count"),
    ],
)
def test_a_checkpoint_that_is_none_is_refused(
    run_folder: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_checkpoint(run_folder / "checkpoint.pt", how)
    before = contents(run_folder)
    resume = lambda: few_shot("--output", str(run_folder), "--resume")  # noqa: E731
    refused(resume, r"few_shot: .*checkpoint\.pt (is no checkpoint|was written with)", capsys)
    assert contents(run_folder) == before


FOREIGN = {
    "of another example": '{"settings": {"seed": 0}}\n{"seed": 1, "return": 3.0}\n',
    "a list": "[1, 2]\n",
    "a number": "3\n",
    "other fields": '{"iteration": 1, "seconds": 1.0, "reward": 2.0}\n',
    "text as loss": '{"iteration": 1, "seconds": 1.0, "loss": "low", "accuracy": 1.0}\n',
    "a gap": '{"iteration": 2, "seconds": 1.0, "loss": 1.0, "accuracy": 1.0}\n',
    "damaged in the middle": '{"iteration": 1, "sec\n{"iteration": 2, "loss": 1, "accuracy": 1}\n',
    "bytes": "\x80\x81\n",
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=list(FOREIGN))
@pytest.mark.parametrize("checkpoint", [True, False])
def test_foreign_metrics_are_refused(
    run_folder: Path, text: str, checkpoint: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "metrics.jsonl").write_text(text, "latin-1")
    if not checkpoint:
        (run_folder / "checkpoint.pt").unlink()
    before = contents(run_folder)
    resume = lambda: few_shot("--output", str(run_folder), "--resume")  # noqa: E731
    refused(resume, r"few_shot: .*metrics\.jsonl holds no metrics of this run \(line 1", capsys)
    assert contents(run_folder) == before
    refused(lambda: sinusoid("--output", str(run_folder)), "holds a run already", capsys)
    refused(
        lambda: sinusoid("--output", str(run_folder), "--resume"),
        r"metrics\.jsonl (is damaged|is not of this example|was written with)",
        capsys,
    )
    assert contents(run_folder) == before


def test_metrics_alone_are_a_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "checkpoint.pt").unlink()
    before = contents(run_folder)
    refused(lambda: few_shot("--output", str(run_folder)), "holds a run already", capsys)
    assert contents(run_folder) == before


# A full disk --------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk:
    """Let files of some names take a few bytes only, as on a full disk."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str) -> None:
        write_bytes, write_text = Path.write_bytes, Path.write_text

        def bytes_written(path: Path, data: Any) -> int:
            if path.name.startswith(name):
                write_bytes(path, bytes(data)[:10])
                full()
            return write_bytes(path, data)

        def text_written(path: Path, data: str, *args: Any) -> int:
            if path.name.startswith(name):
                write_text(path, data[:10])
                full()
            return write_text(path, data, *args)

        patch.setattr(Path, "write_bytes", bytes_written)
        patch.setattr(Path, "write_text", text_written)


@pytest.mark.parametrize("name", ["checkpoint.pt", "results.json", "curves.png", "metrics.jsonl"])
def test_a_full_disk_leaves_the_files_of_before(
    run_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run_folder)
    FullDisk(monkeypatch, name)
    refused(
        lambda: few_shot("--output", str(run_folder), "--overwrite"),
        rf"few_shot: No space left on device \(.*{name}\)\. What was written before is whole; ",
        capsys,
    )
    assert (run_folder / name).read_bytes() == before[name]
    assert not list(run_folder.glob("*.partial"))


def test_a_full_disk_in_the_middle_and_then_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run continues from the checkpoint before, with the numbers of one without trouble."""
    from common import meta_training

    straight = few_shot("--output", str(tmp_path / "straight"))
    save, folder = meta_training.save_checkpoint, tmp_path / "full"

    def save_once(path: Path, content: dict[str, Any]) -> None:
        if path.exists():
            FullDisk(patch, "checkpoint.pt")
        save(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(meta_training, "save_checkpoint", save_once)
        refused(lambda: few_shot("--output", str(folder)), "No space left on device", capsys)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"] == 2
    assert few_shot("--output", str(folder), "--resume")["results"] == straight["results"]


def test_resuming_says_that_there_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, name in ((few_shot, "few_shot"), (sinusoid, "sinusoid")):
        folder = tmp_path / name
        run("--output", str(folder), "--resume")
        assert f"{folder} holds no run yet; starting one.\n" in capsys.readouterr().out
        run("--output", str(folder), "--resume")
        assert "holds no run" not in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    """The operating system's own answer, where a line is appended."""
    from common.checkpoints import MetricsFile

    metrics = MetricsFile(tmp_path / "metrics.jsonl", None)
    metrics.path = Path("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        metrics.add({"iteration": 1})


def test_other_faults_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from common import meta_training

    def broken(*_: Any) -> None:
        raise KeyError("a fault of the program")

    monkeypatch.setattr(meta_training.MetaTraining, "step", broken)
    with pytest.raises(KeyError, match="a fault of the program"):
        few_shot("--output", str(tmp_path))


def test_the_other_examples_say_it_in_one_line_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import reproduce

    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "lola.json").write_text("{")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(reproduce, "FOLDER", tmp_path)
    (tmp_path / "README.md").write_text(f"{reproduce.BEGIN}\n{reproduce.END}\n")
    refused(lambda: reproduce.main(["--table-only"]), r"lola\.json is damaged", capsys)
    assert (tmp_path / "README.md").read_text() == f"{reproduce.BEGIN}\n{reproduce.END}\n"
    (tmp_path / "results" / "lola.json").unlink()
    (tmp_path / "lola.py").write_text("raise SystemExit('broken')")
    runs = ["lola", "--output", str(tmp_path / "runs")]
    refused(lambda: reproduce.main(runs), "python examples/lola.py has failed", capsys)


def test_a_picture_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("graphviz")
    import visualize

    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "graph.png"
    monkeypatch.setattr(sys, "argv", ["visualize", "--output", str(target)])
    refused(visualize.main, "visualize: ", capsys)
