"""LOLA and LOLA-DiCE on the iterated prisoner's dilemma, against closed forms, and its example."""

import json

import pytest
import torch


GAMMA = 0.96

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.usefixtures("examples_on_path")

TINY = [
    *("--iterations", "20", "--exact-pairs", "3", "--dice-pairs", "2", "--games", "4"),
    *("--first-games", "8", "--first-iterations", "2", "--rounds", "6", "--threads", "1"),
]


def run(*options: str) -> dict:
    import lola

    return lola.main([*TINY, *options])


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).logit(eps=1e-12)


def random_logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 5, dtype=torch.float64)


class TestExactReturns:
    @pytest.mark.parametrize(
        ("own", "other", "expected"),
        [
            ((1, 1, 0, 1, 0), (1, 1, 0, 1, 0), (-1.0, -1.0)),  # tit-for-tat with itself
            ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (-2.0, -2.0)),
            ((1, 1, 1, 1, 1), (0, 0, 0, 0, 0), (-3.0, 0.0)),
            ((0.5,) * 5, (0.5,) * 5, (-1.5, -1.5)),
        ],
    )
    def test_known_games(self, own, other, expected):
        from common.prisoners_dilemma import exact_returns

        values = exact_returns(logits(*own), logits(*other), GAMMA)
        assert [(1 - GAMMA) * v.item() for v in values] == pytest.approx(expected, abs=1e-6)

    def test_tit_for_tat_against_defection_loses_the_first_round_only(self):
        from common.prisoners_dilemma import exact_returns

        own, other = exact_returns(logits(1, 1, 0, 1, 0), logits(0, 0, 0, 0, 0), GAMMA)
        later = -2 * GAMMA / (1 - GAMMA)
        assert (own.item(), other.item()) == pytest.approx((-3 + later, 0 + later), abs=1e-6)

    def test_gradients_of_both_orders_against_differences(self):
        from common.prisoners_dilemma import exact_returns

        own, other = random_logits(2).requires_grad_(), random_logits(2).requires_grad_()
        value = lambda a, b: exact_returns(a, b, GAMMA)  # noqa: E731
        assert torch.autograd.gradcheck(value, (own, other))
        assert torch.autograd.gradgradcheck(value, (own, other))

    @pytest.mark.parametrize("gamma", [0.8, 0.96])
    def test_defecting_pays_from_the_forgiveness_limit_on(self, gamma):
        from common.prisoners_dilemma import exact_returns, forgiveness_limit

        limit = forgiveness_limit(gamma)
        for forgiveness, cooperate in ((limit - 0.02, True), (limit + 0.02, False)):
            own = logits(0.999, 0.999, 0.999, 0.999, 0.999).requires_grad_()
            forgiving = logits(1, 1, forgiveness, 1, 0)
            (slope,) = torch.autograd.grad(exact_returns(own, forgiving, gamma)[0].sum(), own)
            assert (slope[0, 1].item() > 0) is cooperate


@pytest.fixture(scope="module")
def estimates(examples_on_path):
    """Derivatives from many independent batches of games, and the exact ones."""
    from common.prisoners_dilemma import dice_returns, exact_returns, play

    batches, games, rounds, gamma = 400, 64, 30, 0.7  # 0.7 ** 30 = 2e-5: as if without an end
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    values = torch.full((batches, 5), -1.5 / (1 - gamma), dtype=torch.float64)

    def derivatives(value, count):
        own = start[:1].repeat(count, 1).requires_grad_()
        other = start[1:].repeat(count, 1).requires_grad_()
        mine, theirs = value(own, other)
        of_own, of_other = torch.autograd.grad(mine.sum(), (own, other), retain_graph=True)
        (slope,) = torch.autograd.grad(theirs.sum(), other, create_graph=True)
        mixed = [
            torch.autograd.grad(slope[:, k].sum(), own, retain_graph=True)[0] for k in range(5)
        ]
        return {
            "own": of_own,
            "other": of_other,
            "mixed": torch.stack(mixed, 1).flatten(1).detach(),
        }

    def sampled(baselines):
        def value(own, other):
            played = play(own, other, games, rounds, generator)
            return dice_returns(own, other, played, gamma, baselines)

        return derivatives(value, batches)

    exact = derivatives(lambda a, b: exact_returns(a, b, gamma), 1)
    return exact, sampled(None), sampled((values, values))


class TestDice:
    @pytest.mark.parametrize("which", [1, 2], ids=["plain", "baseline"])
    @pytest.mark.parametrize("name", ["own", "other", "mixed"])
    def test_mean_is_the_exact_derivative(self, estimates, which, name):
        exact, sampled = estimates[0][name][0], estimates[which][name]
        error = sampled.std(0) / len(sampled) ** 0.5
        assert ((sampled.mean(0) - exact).abs() < 4.5 * error + 1e-3).all()
        assert error.norm() < 0.5 * exact.norm()  # or the comparison would say nothing

    @pytest.mark.parametrize("name", ["own", "mixed"])
    def test_baseline_lowers_the_variance_of_both_orders(self, estimates, name):
        plain, better = (estimates[k][name].var(0).sum() for k in (1, 2))
        assert better < 0.5 * plain

    def test_value_is_the_mean_return_of_the_games(self):
        from common.prisoners_dilemma import dice_returns, play, rewards_of

        own, other = random_logits(2), random_logits(2)
        games = play(own, other, 5, 3, torch.Generator().manual_seed(0))
        mine, theirs = dice_returns(own, other, games, 0.5)
        weights = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
        for value, rewards in zip((mine, theirs), rewards_of(games, own)):
            assert torch.allclose(value, (rewards * weights).sum(-1).mean(-1))

    def test_observed_values_of_certain_games(self):
        from common.prisoners_dilemma import observed_values, play

        certain = logits(1, 1, 0, 1, 0)
        games = play(certain, certain, 4, 200, torch.Generator().manual_seed(0))
        values, mass = observed_values(games, 0.5, certain)
        assert values[0, :2].tolist() == pytest.approx([-2.0, -2.0], abs=1e-6)
        assert mass[0, 2:].tolist() == [0, 0, 0]


class TestLearning:
    def test_look_ahead_gradient_against_differences_through_the_opponents_step(self):
        from common.lola_learning import Exact, shaped_return, swapped
        from common.prisoners_dilemma import exact_returns

        start, lr = random_logits(2), 0.7

        def stepped(own):  # one step of the opponent by hand
            other = swapped(start).clone().requires_grad_()
            theirs = exact_returns(own, other, GAMMA)[1].sum()
            (slope,) = torch.autograd.grad(theirs, other)
            return exact_returns(own, other.detach() + lr * slope, GAMMA)[0].sum()

        own = start.clone().requires_grad_()
        (slope,) = torch.autograd.grad(shaped_return(own, 1, lr, Exact(GAMMA)).sum(), own)
        for index in range(5):
            shift = torch.zeros_like(start)
            shift[0, index] = 1e-5
            # the opponent of this player is the first one of `swapped`, which does not move
            difference = (stepped(start + shift) - stepped(start - shift)) / 2e-5
            assert slope[0, index].item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-6)

    def test_expansion_is_the_limit_of_the_step(self):
        from common.lola_learning import Exact, expanded_return, shaped_return

        own = random_logits(4)
        errors = []
        for lr in (1e-2, 1e-3):
            step = shaped_return(own.requires_grad_(), 1, lr, Exact(GAMMA))
            errors.append((step - expanded_return(own, lr, Exact(GAMMA))).abs().max().item())
        assert errors[1] < 0.02 * errors[0]  # what is left is of second order

    @pytest.mark.parametrize("look_aheads", [0, 1, 2, 3])
    def test_naive_learners_defect_and_lola_players_learn_tit_for_tat(self, look_aheads):
        import lola
        from common.lola_learning import Exact, is_tit_for_tat, learn

        generator = torch.Generator().manual_seed(0)
        steps = lola.STEPS["large"]
        *_, end = learn(Exact(GAMMA), steps, look_aheads, 5, 60, 60, GAMMA, generator)
        returns, policies = torch.tensor(end["returns"]), torch.tensor(end["policies"])
        if look_aheads == 0:
            assert (returns < -1.97).all()
        else:
            assert (returns > -1.02).all()
            assert is_tit_for_tat(policies).all()

    def test_dice_learns_the_signs_of_tit_for_tat(self):
        import lola
        from common.lola_learning import Dice, learn

        generator = torch.Generator().manual_seed(0)
        estimator = Dice(GAMMA, 1024, 1024, 1, 50, 0.1, generator)
        *_, end = learn(estimator, lola.STEPS["large"], 1, 3, 12, 12, GAMMA, generator)
        policies = torch.tensor(end["policies"]).mean((0, 1))
        assert policies[1] > 0.8
        assert policies[3] > 0.8
        assert policies[2] < 0.3
        assert policies[4] < 0.3


class TestExample:
    def test_everything_is_written(self, tmp_path):
        results = run("--output", str(tmp_path))
        assert (tmp_path / "lola.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((tmp_path / "results.json").read_text()) == results
        parts = {(p["gradients"], p["steps"], p["look_aheads"]) for p in results["parts"]}
        assert len(parts) == 4 + 4 + 3
        naive = next(p for p in results["parts"] if p["look_aheads"] == 0)
        shaping = next(p for p in results["parts"] if p["look_aheads"] == 1)
        assert naive["reward"] < -1.9
        assert shaping["reward"] > -1.1
        assert all({"claim", "measured", "holds"} <= claim.keys() for claim in results["claims"])

    def test_interrupted_and_resumed_is_the_same(self, tmp_path, monkeypatch):
        import lola

        options = ("--look-aheads", "0", "1", "--no-comparison")
        straight = run(*options, "--output", str(tmp_path / "straight"))
        learn, started = lola.learn, []

        def interrupted(*args):
            started.append(args)
            for row in learn(*args):
                if len(started) == 3 and row["iteration"] > 5:
                    raise KeyboardInterrupt
                yield row

        monkeypatch.setattr(lola, "learn", interrupted)
        folder = str(tmp_path / "interrupted")
        with pytest.raises(SystemExit, match="--resume"):
            run(*options, "--output", folder)
        monkeypatch.setattr(lola, "learn", learn)
        resumed = run(*options, "--output", folder, "--resume")
        assert resumed["parts"] == straight["parts"]
        lines = [(tmp_path / name / "metrics.jsonl") for name in ("straight", "interrupted")]
        assert lines[0].read_text() == lines[1].read_text()

    def test_a_run_is_not_overwritten_unasked(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text("precious")
        with pytest.raises(SystemExit, match="--overwrite"):
            run("--output", str(tmp_path))
        assert (tmp_path / "metrics.jsonl").read_text() == "precious"

    def test_unwritable_output_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit, match="Cannot write to the output folder"):
            run("--output", str(tmp_path / "file" / "folder"))

    def test_expansion_is_refused_where_it_makes_no_sense(self, tmp_path):
        with pytest.raises(SystemExit, match="Pass --look-aheads 0 1 --gradients exact"):
            run("--steps", "LOLA paper", "--output", str(tmp_path / "new"))
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        "options", [("--discount", "1"), ("--look-aheads", "-1"), ("--rounds", "0")]
    )
    def test_bad_numbers(self, options, capsys):
        with pytest.raises(SystemExit):
            run(*options)
        assert "must be" in capsys.readouterr().err
