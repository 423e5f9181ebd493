"""MAML on sine waves at tiny size: its gradients, its errors, the run and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import torchopt


pytest.importorskip("rich")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.usefixtures("examples_on_path")

TINY = [
    *("--seeds", "2", "--meta-batch", "5", "--iterations", "60", "--outer-lr", "5e-3"),
    *("--test-waves", "20", "--test-steps", "2", "--test-shots", "5", "10"),
]
MEAN_AMPLITUDE = (0.1 + 5) / 2


@pytest.fixture(autouse=True)
def _few_validation_waves(monkeypatch):
    from common import sinusoid_tasks

    monkeypatch.setattr(sinusoid_tasks, "VALIDATION_WAVES", 10)


def run_here(*options: str) -> dict:
    import few_shot

    return few_shot.main(["--data", "sinusoid", *TINY, *options])


def maml_loss(folder: Path, *options: str):
    """Return MAML's loss, with weights, waves and points in double precision."""
    from common import sinusoid
    from common.sinusoid_tasks import Waves, sample_points, sample_waves

    args = sinusoid.parse([*TINY, "--output", str(folder), *options])
    training = sinusoid.trainings(args)["MAML"]
    params = {k: p.detach().double().requires_grad_(True) for k, p in training.params.items()}
    generator = torch.Generator().manual_seed(3)
    waves = sample_waves((2, 5), generator)
    waves = Waves(waves.amplitude.double(), waves.phase.double())
    return training.loss, params, waves, sample_points((2, 5), 20, generator).double()


class TestGradients:
    def test_meta_gradient_against_central_differences(self, tmp_path):
        loss, params, waves, x = maml_loss(tmp_path, "--inner-steps", "2")
        grads = torch.autograd.grad(loss(params, waves, x).sum(), list(params.values()))
        for _ in range(4):
            direction = [torch.randn_like(p) for p in params.values()]
            exact = sum((g * d).sum() for g, d in zip(grads, direction)).item()

            def moved(h: float, direction: list = direction) -> float:
                there = {k: p + h * d for (k, p), d in zip(params.items(), direction)}
                return loss(there, waves, x).sum().item()

            h = 1e-7  # so small that hardly a unit crosses its kink
            differences = (moved(h) - moved(-h)) / (2 * h)
            assert differences == pytest.approx(exact, rel=1e-5)

    def test_seeds_and_waves_at_once_are_those_one_by_one(self, tmp_path):
        """The oracle is a loop in the differentiable style."""
        from common.sinusoid_tasks import make_network

        loss, params, waves, x = maml_loss(tmp_path, "--inner-steps", "2")
        losses = loss(params, waves, x)
        grads = torch.autograd.grad(losses.sum(), list(params.values()))
        y = waves(x)
        for seed in range(2):
            network = make_network().double()
            network.load_state_dict({k: p[seed].detach() for k, p in params.items()})
            total = 0.0
            for k in range(5):
                with torchopt.inner_loop(network, torchopt.sgd(lr=0.01)) as inner:
                    for _ in range(2):
                        inner.step(F.mse_loss(network(x[seed, k, :10]), y[seed, k, :10]))
                    total += F.mse_loss(network(x[seed, k, 10:]), y[seed, k, 10:]) / 5
            assert losses[seed].item() == pytest.approx(total.item(), rel=1e-12)
            own = torch.autograd.grad(total, list(network.parameters()))
            for all_seeds, one in zip(grads, own):
                torch.testing.assert_close(all_seeds[seed], one, rtol=1e-9, atol=1e-12)

    def test_first_order_leaves_out_second_derivatives(self, tmp_path):
        gradients = []
        for options in ([], ["--first-order"]):
            loss, params, waves, x = maml_loss(tmp_path, *options)
            grads = torch.autograd.grad(loss(params, waves, x).sum(), list(params.values()))
            gradients.append(torch.cat([g.flatten() for g in grads]))
        assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


class TestErrors:
    def test_the_distribution_is_the_paper_s(self):
        from common.sinusoid_tasks import Condition

        waves, x = Condition(7).draw(2, 5000, seed=0)
        assert 0.1 <= waves.amplitude.min() < 0.15
        assert 4.95 < waves.amplitude.max() <= 5
        assert 0 <= waves.phase.min() < 0.05
        assert 3.1 < waves.phase.max() <= math.pi
        assert x.shape == (2, 5000, 7, 1)
        assert -5 <= x.min() < -4.99
        assert 4.99 < x.max() <= 5

    @pytest.mark.parametrize("half", [False, True])
    def test_the_best_that_knows_no_points(self, half):
        """The mean of all waves is 2/pi E[A] cos x; its error is an integral."""
        from common.sinusoid_tasks import GRID, Condition

        condition = Condition(10, half)
        waves, x = condition.draw(2, 20000, seed=0)
        assert not half or x.min() >= 0
        mean = 2 / math.pi * MEAN_AMPLITUDE * torch.cos(GRID.flatten())
        predictions = mean.expand(2, 20000, 1, -1)
        mean_square = (5**3 - 0.1**3) / (3 * 4.9)  # of the amplitude
        cosine_square = 0.5 + math.sin(10) / 20  # mean over the range, and over each half
        expected = mean_square / 2 - (2 / math.pi * MEAN_AMPLITUDE) ** 2 * cosine_square
        measured = condition.errors(predictions, waves)
        assert measured.shape == (2, 1)
        assert measured.mean().item() == pytest.approx(expected, rel=0.02)
        truth = waves(GRID.flatten())
        assert condition.errors(truth, waves).max() == 0
        wrong_right_half = truth + (GRID.flatten() > 0)
        assert (condition.errors(wrong_right_half, waves) == 0).all() == half

    def test_pre_training_learns_the_mean_wave(self, tmp_path):
        from common import sinusoid
        from common.sinusoid_tasks import GRID, Condition, fits

        options = ["--iterations", "400", "--meta-batch", "100", "--output", str(tmp_path)]
        training = sinusoid.trainings(sinusoid.parse([*TINY, *options]))["pre-training"]
        training.run(lambda iteration, loss: None)
        waves, x = Condition(10).draw(2, 1, seed=0)
        predictions = fits(training.params, waves, x, lr=0.01, steps=0)[:, 0, 0]
        mean = 2 / math.pi * MEAN_AMPLITUDE * torch.cos(GRID.flatten())
        assert (predictions - mean).square().mean().sqrt() < 0.25
        assert mean.square().mean().sqrt() > 1


class TestRun:
    def test_maml_adapts_and_everything_is_written(self, tmp_path):
        options = ["--iterations", "400", "--test-waves", "100", "--output", str(tmp_path)]
        results = run_here(*options)
        errors = {
            (row["learner"], row["condition"]): torch.tensor(row["errors"]).mean(0)
            for row in results["results"]
        }
        maml, pretrained = errors["MAML", "10 points"], errors["pre-training", "10 points"]
        assert maml.shape == (3,)
        assert maml[1] < 0.7 * maml[0]
        assert maml[1] < pretrained[2]
        assert errors["oracle", "10 points"] < 0.5
        assert len(results["claims"]) == 3
        assert "after 1 step" in results["claims"][0]["measured"]
        assert json.loads((tmp_path / "results.json").read_text()) == results
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert {json.loads(line)["learner"] for line in lines[1:]} == {
            "MAML",
            "pre-training",
            "oracle",
        }

    @pytest.mark.usefixtures("no_figures")
    @pytest.mark.thorough
    def test_an_interrupted_run_goes_on_to_the_same_numbers(self, tmp_path, monkeypatch):
        from common import sinusoid

        monkeypatch.setattr(sinusoid, "CHECKPOINT_EVERY", 10)
        straight = run_here("--output", str(tmp_path / "straight"))
        step, left = sinusoid.Training.step, [0] * (60 + 35)  # midway through pre-training

        def interrupted(self):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return step(self)

        folder = str(tmp_path / "interrupted")
        with monkeypatch.context() as patch:
            patch.setattr(sinusoid.Training, "step", interrupted)
            with pytest.raises(SystemExit, match="--resume"):
                run_here("--output", folder)
        calls = []
        monkeypatch.setattr(sinusoid.Training, "step", lambda self: calls.append(0) or step(self))
        resumed = run_here("--output", folder, "--resume")
        assert resumed["results"] == straight["results"]
        assert len(calls) == 30 + 60  # from the last checkpoint on, then the oracle

    def test_a_claim_holds_only_beyond_its_interval(self):
        from common.sinusoid_report import Tested, claims

        def of(*errors: float) -> list:
            return [Tested("MAML", "here", 0.1, [[3.0, e, e] for e in errors])]

        pretrained = Tested("pre-training", "here", 0.1, [[3.0, 2.0, 2.0]] * 3)
        sure, unsure, worse = (
            claims([*of(*errors), pretrained], "here", "nowhere")[0]["holds"]
            for errors in ((1.0, 1.1, 1.2), (0.1, 1.9, 3.0), (2.1, 2.2, 2.1))
        )
        assert sure
        assert not unsure
        assert not worse


class TestBadInput:
    @pytest.mark.usefixtures("no_figures")
    def test_a_run_is_not_overwritten_unasked(self, tmp_path):
        run_here("--iterations", "2", "--output", str(tmp_path))
        with pytest.raises(SystemExit, match="--overwrite"):
            run_here("--iterations", "2", "--output", str(tmp_path))
        with pytest.raises(SystemExit, match="iterations=2, this run has iterations=3"):
            run_here("--iterations", "3", "--output", str(tmp_path), "--resume")
        results = run_here("--iterations", "3", "--output", str(tmp_path), "--overwrite")
        assert results["settings"]["iterations"] == 3

    def test_unwritable_output_is_refused_before_time_is_spent(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit, match="Cannot write to the output folder"):
            run_here("--output", str(tmp_path / "file" / "folder"))

    @pytest.mark.parametrize("options", [["--shots", "0"], ["--inner-lr", "-1"], ["--ways", "5"]])
    def test_options_it_cannot_use(self, tmp_path, capsys, options):
        with pytest.raises(SystemExit):
            run_here("--output", str(tmp_path), *options)
        assert options[0] in capsys.readouterr().err

    def test_help_tells_of_it(self, capsys):
        import few_shot

        with pytest.raises(SystemExit):
            few_shot.main(["--help"])
        assert "sinusoid" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            few_shot.main(["--help", "--data=sinusoid"])
        assert "--test-waves" in capsys.readouterr().out
