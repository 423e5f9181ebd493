"""The functional example at tiny size: equal styles, equal members, the run, what it refuses."""

import copy
import json
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812


pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.usefixtures("examples_on_path")

TINY = [
    *("--compared-steps", "20", "--members", "4", "--rates", "0.003", "0.01", "--steps", "60"),
    *("--seeds", "2", "--timed-members", "2", "3", "--timed-steps", "2", "--rounds", "2"),
]


def run_here(*options: str) -> dict:
    import functional

    return functional.main([*TINY, *options])


class TestStyles:
    def test_all_styles_give_the_losses_of_torch_optim(self):
        import functional
        from common.functional_report import STYLES, largest_difference

        network = functional.make_networks(1, seed=0)[0].double()
        batches = [(torch.rand(8, 64).double(), torch.randint(10, (8,))) for _ in range(50)]
        compared = functional.compare_styles(network, batches, lr=0.01)
        losses = compared["losses"]
        for style in STYLES[:3]:
            assert largest_difference(losses, style) < 1e-13
        assert largest_difference(losses, "torch.optim.Adam") < 1e-12
        assert all(len(losses[style]) == 50 for style in STYLES)
        assert compared["slope"] == pytest.approx(compared["slope_by_differences"], rel=1e-6)

    def test_no_style_but_the_objects_changes_the_network(self):
        import functional

        network = functional.make_networks(1, seed=0)[0]
        before = copy.deepcopy(network.state_dict())
        batches = [(torch.rand(8, 64), torch.randint(10, (8,)))]
        functional.train_functional(network, batches, 0.1)
        assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
        functional.train_object_oriented(network, batches, 0.1)
        assert not any(torch.equal(p, before[name]) for name, p in network.named_parameters())


class TestEnsemble:
    """Members trained at once must be those that torch.optim trains one by one."""

    steps = 12

    def given(self):
        import functional

        networks = [n.double() for n in functional.make_networks(3, seed=1)]
        assert not torch.equal(networks[0][0].weight, networks[1][0].weight)
        rates = torch.tensor([0.001, 0.01, 0.1], dtype=torch.float64)
        x = torch.rand(self.steps, 3, 8, 64, dtype=torch.float64)
        y = torch.randint(10, (self.steps, 3, 8))
        return networks, rates, list(zip(x, y))

    def by_torch(self, networks, rates, batches):
        """Return losses ``[steps, members]`` and trained networks."""
        losses = torch.zeros(self.steps, len(networks), dtype=torch.float64)
        networks = copy.deepcopy(networks)
        for k, network in enumerate(networks):
            optimizer = torch.optim.Adam(network.parameters(), lr=rates[k].item())
            for step, (x, y) in enumerate(batches):
                optimizer.zero_grad()
                loss = F.cross_entropy(network(x[k]), y[k])
                loss.backward()
                optimizer.step()
                losses[step, k] = loss.item()
        return losses, networks

    def test_at_once_or_one_by_one(self):
        import functional

        given = self.given()
        params, state, losses = functional.train_together(*given)
        expected, networks = self.by_torch(*given)
        torch.testing.assert_close(losses, expected, rtol=1e-11, atol=0)
        for k, network in enumerate(networks):
            for name, p in network.named_parameters():
                torch.testing.assert_close(params[name][k], p.detach(), rtol=1e-10, atol=1e-12)
        assert set(state.step.tolist()) == {self.steps}  # one for each member
        in_turn = functional.train_in_turn(*given, functional.train_functional)
        torch.testing.assert_close(in_turn, expected, rtol=1e-11, atol=0)

    def test_a_state_that_does_not_advance_would_be_seen(self, monkeypatch):
        import functional

        step = functional.train_step

        def forgetful(params, state, *rest):
            params, _, loss = step(params, state, *rest)
            return params, state, loss

        given = self.given()
        expected, _ = self.by_torch(*given)
        monkeypatch.setattr(functional, "train_step", forgetful)
        _, state, losses = functional.train_together(*given)
        assert set(state.step.tolist()) == {0}
        assert ((losses - expected).abs() / expected).max() > 1e-2

    def test_the_vote(self, tmp_path):
        """Accuracy and log loss against plain loops over images."""
        import functional

        args = functional.parse([*TINY, "--output", str(tmp_path)])
        row = functional.ensemble(args, seed=3)
        digits = functional.load_digits(args.device, 3)
        networks = functional.make_networks(4, 5)
        batches = digits.batches(60, (4, 32), torch.Generator().manual_seed(4))
        params, _, _ = functional.train_together(
            networks, functional.member_rates(args, 4), batches
        )
        logits = [
            torch.func.functional_call(networks[k], {n: p[k] for n, p in params.items()}, x)
            for k in range(4)
            for x in [(digits.test_x,)]
        ]
        losses = [F.cross_entropy(member, digits.test_y).item() for member in logits]
        assert row["log_losses"] == pytest.approx(losses, rel=1e-4)
        for k, members in enumerate(([0, 2], [1, 3], range(4))):
            mean = sum(logits[m].softmax(-1) for m in members) / len(members)
            hits = (mean.argmax(-1) == digits.test_y).double().mean().item()
            assert row["vote_accuracies"][k] == pytest.approx(100 * hits)
            log_loss = F.nll_loss(mean.log(), digits.test_y).item()
            assert row["vote_log_losses"][k] == pytest.approx(log_loss, rel=1e-4)
        assert len(row["losses"]) == 2
        assert row["losses"][1][-1] < 0.5 * row["losses"][1][0]
        assert row["vote_accuracies"][-1] > 60


class TestRun:
    def test_everything_is_written(self, tmp_path):
        results = run_here("--output", str(tmp_path))
        assert json.loads((tmp_path / "results.json").read_text()) == results
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        assert [claim["holds"] for claim in results["claims"][:2]] == [True, True]
        assert {(r["loop"], r["members"]) for r in results["speed"]} == {
            (loop, members)
            for loop in ("functional", "torchopt.Adam", "torch.optim.Adam")
            for members in (2, 3)
        }

    @pytest.mark.usefixtures("no_figures")
    def test_an_interrupted_run_goes_on_to_the_same_numbers(self, tmp_path, monkeypatch):
        import functional

        straight = run_here("--output", str(tmp_path / "straight"))
        ensemble, seeds = functional.ensemble, []

        def interrupted(args, seed):
            if seeds:
                raise KeyboardInterrupt
            seeds.append(seed)
            return ensemble(args, seed)

        folder = str(tmp_path / "interrupted")
        with monkeypatch.context() as patch:
            patch.setattr(functional, "ensemble", interrupted)
            with pytest.raises(SystemExit, match="--resume"):
                run_here("--output", folder)
        trained = []
        monkeypatch.setattr(
            functional, "ensemble", lambda args, seed: trained.append(seed) or ensemble(args, seed)
        )
        resumed = run_here("--output", folder, "--resume")
        assert trained == [100]  # the second seed's; the first one's is kept
        for key in ("member_accuracies", "vote_accuracies", "slope", "differences"):
            assert resumed[key] == straight[key]


class TestBadInput:
    def test_a_run_is_not_overwritten_unasked(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text("precious")
        with pytest.raises(SystemExit, match="--overwrite"):
            run_here("--output", str(tmp_path))
        assert (tmp_path / "metrics.jsonl").read_text() == "precious"

    def test_unwritable_output_is_refused_before_time_is_spent(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit, match="Cannot write to the output folder"):
            run_here("--output", str(tmp_path / "file" / "folder"))

    def test_a_missing_package_is_named_before_time_is_spent(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn", None)
        with pytest.raises(SystemExit, match=r"torchopt\[examples\]"):
            run_here("--output", str(tmp_path))

    @pytest.mark.parametrize(
        ("options", "message"),
        [(["--members", "1"], "2 --rates"), (["--compared-steps", "1"], "at least 2")],
    )
    def test_options_it_cannot_use(self, tmp_path, capsys, options, message):
        with pytest.raises(SystemExit):
            run_here("--output", str(tmp_path), *options)
        assert message in capsys.readouterr().err
