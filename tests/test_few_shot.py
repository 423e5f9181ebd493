"""The main job, at tiny size: the real code path, a kill at any moment, damaged files."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "few_shot.py"
OMNIGLOT = ROOT.parent / "shared" / "omniglot"

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.usefixtures("examples_on_path")

TINY = [
    *("--ways", "3", "--shots", "2", "--queries", "3", "--inner-steps", "2", "--meta-batch", "4"),
    *("--channels", "6", "--blocks", "2", "--pretrain-iterations", "20", "--test-tasks", "20"),
    *("--threads", "1", "--time-budget", "0"),
]


def run_here(*options: str) -> dict:
    import few_shot

    return few_shot.main([*TINY, *options])


@pytest.fixture
def no_comparison(monkeypatch, no_figures):
    """Leave out the comparison with fine-tuning and most of the curves, which take long."""
    import few_shot
    from common.maml import Accuracy

    monkeypatch.setattr(few_shot, "fine_tuned", lambda *_, **__: (Accuracy(torch.ones(20)), ""))
    monkeypatch.setattr(few_shot, "CURVE_TASKS", 2)


def start(*options: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *TINY, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def metrics_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def zip_of_characters(path: Path, alphabets: dict[str, int], drawings: int = 20, size: int = 105):
    """Write a small file of the official layout with strokes at random places."""
    generator = torch.Generator().manual_seed(0)
    with zipfile.ZipFile(path, "w") as archive:
        for alphabet, characters in alphabets.items():
            for character in range(1, characters + 1):
                pattern = torch.rand(7, 7, generator=generator) < 0.35
                for drawing in range(1, drawings + 1):
                    noise = torch.rand(7, 7, generator=generator) < 0.05
                    ink = (pattern ^ noise).repeat_interleave(15, 0).repeat_interleave(15, 1)
                    pixels = (~ink[:size, :size]).to(torch.uint8).mul(255).numpy()
                    stream = io.BytesIO()
                    image_module.fromarray(pixels).convert("1").save(stream, "PNG")
                    folder = f"images/{alphabet}/character{character:02d}"
                    name = f"{folder}/{character:04d}_{drawing:02d}.png"
                    archive.writestr(name, stream.getvalue())


class TestDigits:
    @pytest.mark.thorough
    def test_loss_falls_and_everything_is_written(self, tmp_path, monkeypatch):
        import few_shot

        monkeypatch.setattr(few_shot, "CURVE_TASKS", 10)
        results = run_here("--iterations", "120", "--output", str(tmp_path))
        losses = [row["loss"] for row in metrics_of(tmp_path)]
        assert len(losses) == 120
        assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        accuracies = {name: r["mean"] for name, r in results["results"].items()}
        assert set(accuracies) == {"no meta-training", "pre-training, then fine-tuning", "MAML"}
        assert accuracies["MAML"] > 100 / 3 + 15  # far above chance
        assert all(r["tasks"] == 20 for r in results["results"].values())
        assert json.loads((tmp_path / "results.json").read_text()) == results
        (claim,) = results["claims"]
        better = max(a for name, a in accuracies.items() if name != "MAML")
        assert not claim["holds"] or accuracies["MAML"] > better
        assert f"{accuracies['MAML']:.1f}" in claim["measured"]

    @pytest.mark.parametrize(("gain", "holds"), [(0.5, True), (0.05, False), (-0.5, False)])
    def test_the_claim_compares_task_by_task(self, gain, holds):
        import few_shot
        from common.maml import Accuracy

        generator = torch.Generator().manual_seed(0)
        draw = lambda: torch.randn(400, generator=generator, dtype=torch.float64)  # noqa: E731
        difficulty, noise = 10 * draw(), draw()  # tasks differ by far more than learners do
        tested = [
            ("no meta-training", Accuracy(50 + difficulty), ""),
            ("pre-training", Accuracy(40 + difficulty), ""),
            ("MAML", Accuracy(50 + difficulty + noise - noise.mean() + gain), ""),
        ]
        claim = few_shot.claim(tested)
        assert claim["holds"] is holds
        half_width = 1.96 * noise.std().item() / 20
        assert (
            f"difference over the same 400 tasks {gain:.2f} ± {half_width:.2f}"
            in (claim["measured"])
        )

    @pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
    @pytest.mark.parametrize("order", [[], ["--first-order"]], ids=["second", "first"])
    def test_inner_optimizers_and_learned_rates(self, tmp_path, optimizer, order):
        import few_shot

        options = ["--iterations", "6", "--output", str(tmp_path), "--inner-optimizer", optimizer]
        args = few_shot.parse([*TINY, *options, "--learn-lr", "--inner-lr", "0.05", *order])
        run = few_shot.FewShotRun(args)
        before = {name: rate.item() for name, rate in run.training.rates.items()}
        for _ in range(6):
            loss, _ = run.training.step()
            assert math.isfinite(loss)
        assert any(rate.item() != before[name] for name, rate in run.training.rates.items())

    def test_first_order_differs_from_second_order(self, tmp_path):
        import few_shot

        options = [*TINY, "--iterations", "6"]
        gradients = []
        for k, extra in enumerate(([], ["--first-order"])):
            args = few_shot.parse([*options, "--output", str(tmp_path / str(k)), *extra])
            run = few_shot.FewShotRun(args)
            run.training.step()
            gradients.append(torch.cat([p.grad.flatten() for p in run.training.params.values()]))
        difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
        assert difference > 1e-3

    @pytest.mark.usefixtures("no_comparison")
    def test_tensorboard_events(self, tmp_path):
        pytest.importorskip("tensorboard")
        run_here("--iterations", "3", "--output", str(tmp_path), "--tensorboard")
        assert list((tmp_path / "tensorboard").glob("events.*"))


class TestResume:
    @pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.thorough)])
    @pytest.mark.thorough
    def test_sigkill_at_random_moments_gives_the_numbers_of_an_uninterrupted_run(
        self, tmp_path, times
    ):
        options = ["--iterations", "60", "--checkpoint-every", "2"]
        straight = run_here(*options, "--output", str(tmp_path / "straight"))
        folder = tmp_path / "killed"
        kills = 0
        while kills < times:
            process = start(*options, "--output", str(folder), "--resume")
            deadline = time.monotonic() + 60
            target = 12 * (kills + 1)
            while process.poll() is None and time.monotonic() < deadline:
                lines = (
                    (folder / "metrics.jsonl").read_text()
                    if folder.exists() and (folder / "metrics.jsonl").exists()
                    else ""
                )
                if lines.count("\n") >= target:
                    break
                time.sleep(0.01)
            assert process.poll() is None, process.communicate()[0]
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        resumed = run_here(*options, "--output", str(folder), "--resume")
        assert resumed["results"] == straight["results"]
        assert metrics_of(folder) == metrics_of(tmp_path / "straight")

    def test_interrupted_writes_leave_the_old_checkpoint(self, tmp_path):
        from common.checkpoints import load_checkpoint, save_checkpoint

        path = tmp_path / "checkpoint.pt"
        save_checkpoint(path, {"settings": {}, "iteration": 1})
        (tmp_path / "checkpoint.pt.partial").write_bytes(path.read_bytes()[:100])  # killed midway
        assert load_checkpoint(path, torch.device("cpu"))["iteration"] == 1

    def test_a_metrics_line_cut_off_by_a_kill_is_dropped(self, tmp_path):
        from common.checkpoints import MetricsFile

        path = tmp_path / "metrics.jsonl"
        path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iterat')
        assert MetricsFile(path, keep_until=5).rows == [{"iteration": 1}, {"iteration": 2}]
        assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'

    @pytest.mark.usefixtures("no_comparison")
    def test_other_settings_are_refused(self, tmp_path):
        run_here("--iterations", "2", "--output", str(tmp_path))
        with pytest.raises(SystemExit, match=r"seed=0, this run has seed=1"):
            run_here("--iterations", "2", "--output", str(tmp_path), "--resume", "--seed", "1")

    def test_a_damaged_checkpoint_is_named(self, tmp_path):
        (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
        with pytest.raises(SystemExit, match=r"checkpoint\.pt is no checkpoint"):
            run_here("--iterations", "2", "--output", str(tmp_path), "--resume")

    def test_a_run_is_not_overwritten_unasked(self, tmp_path):
        (tmp_path / "checkpoint.pt").write_bytes(b"precious")
        with pytest.raises(SystemExit, match="--overwrite"):
            run_here("--iterations", "2", "--output", str(tmp_path))
        assert (tmp_path / "checkpoint.pt").read_bytes() == b"precious"


class TestBadInput:
    def test_unwritable_output_is_refused_before_time_is_spent(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit, match="Cannot write to the output folder"):
            run_here("--output", str(tmp_path / "file" / "folder"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--ways", "25"], "25-way tasks need 25 classes, but there are 24"),
            (["--ways", "5"], "5-way tasks need 5 classes, but there are 4"),
            (["--shots", "170", "--queries", "20"], "170 shots"),
        ],
        ids=["ways", "test-ways", "images"],
    )
    def test_tasks_that_the_data_cannot_fill(self, tmp_path, options, message):
        with pytest.raises(SystemExit, match=message):
            run_here("--output", str(tmp_path), *options)

    def test_omniglot_needs_a_folder(self, capsys):
        with pytest.raises(SystemExit):
            run_here("--data", "omniglot")
        assert "--root" in capsys.readouterr().err


class TestOmniglotFiles:
    def load(self, folder):
        from common.datasets import load_omniglot

        return load_omniglot(folder, 28)

    def test_split_by_alphabet(self, tmp_path):
        zip_of_characters(tmp_path / "images_background_small1.zip", {"Greek": 3, "Latin": 2})
        zip_of_characters(tmp_path / "images_background_small2.zip", {"Greek": 3, "Sanskrit": 4})
        split = self.load(tmp_path)
        assert {name.split("/")[0] for name in split.train.names} == {"Greek", "Latin"}
        assert {name.split("/")[0] for name in split.test.names} == {"Sanskrit"}
        assert len(split.train.with_rotations()) == 4 * 5
        image = split.test.images[0]
        assert image.shape == (20, 1, 28, 28)
        assert 0 <= image.min() < image.max() <= 1
        assert 0.1 < image.mean() < 0.6  # ink is bright on dark paper: a third of the cells

    @pytest.mark.thorough
    def test_trains_from_files(self, tmp_path):
        zip_of_characters(tmp_path / "images_background.zip", {"A": 4, "B": 3})
        zip_of_characters(tmp_path / "images_evaluation.zip", {"C": 5})
        options = ["--data", "omniglot", "--root", str(tmp_path), "--iterations", "40"]
        results = run_here(*options, "--output", str(tmp_path / "run"))
        assert results["results"]["MAML"]["mean"] > 100 / 3 + 10

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"images_background.*\.zip"):
            self.load(tmp_path)

    @pytest.mark.parametrize(
        "damage", ["no zip", "truncated", "flipped", "other tree", "missing drawing"]
    )
    def test_damaged_file_is_named(self, tmp_path, damage):
        path = tmp_path / "images_background.zip"
        zip_of_characters(tmp_path / "images_evaluation.zip", {"C": 2})
        drawings = 19 if damage == "missing drawing" else 20
        zip_of_characters(path, {"A": 3, "B": 3}, drawings)
        content = bytearray(path.read_bytes())
        if damage == "no zip":
            path.write_bytes(b"<html>not found</html>")
        elif damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "flipped":
            for position in range(60, len(content) // 2, 97):
                content[position] ^= 0xFF
            path.write_bytes(content)
        elif damage == "other tree":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("holiday/beach.png", b"sand")
        with pytest.raises(ValueError, match=r"images_background\.zip"):
            self.load(tmp_path)

    @pytest.mark.skipif(not OMNIGLOT.is_dir(), reason="the real files are not beside this clone")
    def test_the_real_files(self):
        split = self.load(OMNIGLOT)
        assert len(split.train) == 136
        assert len(split.test) == 106
        alphabets = {name.split("/")[0] for name in split.test.names}
        assert alphabets == {"Japanese_(katakana)", "Sanskrit", "Tagalog"}
        ink = torch.stack([images.mean() for images in split.train.images])
        assert 0.02 < ink.mean() < 0.3
