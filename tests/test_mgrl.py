"""Meta-gradient reinforcement learning: returns, meta-gradients, the real run at tiny size."""

import importlib
import json
import sys
from dataclasses import fields, replace

import pytest
import torch

import torchopt


pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("gymnasium")

pytestmark = pytest.mark.usefixtures("examples_on_path")

TINY = [
    *("--seeds", "2", "--rounds", "3", "--copies", "4", "--steps", "8", "--fixed", "0.5", "0.9"),
    *("--fixed-traces", "0.95", "--start", "0.5", "--threads", "1"),
]


def run_here(*options):
    import mgrl

    return mgrl.main([*TINY, *options])


def random_experience(seed, seeds=2, copies=3, steps=6):
    """Return experience in double precision, with ends of both kinds."""
    from common.mgrl_agent import Experience

    generator = torch.Generator().manual_seed(seed)
    shape = (seeds, copies, steps)
    observations = torch.randn(
        seeds, copies, steps + 1, 4, generator=generator, dtype=torch.float64
    )
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    chance = torch.rand(shape, generator=generator)
    actions = torch.randint(2, shape, generator=generator)
    terminated, truncated = chance < 0.2, chance > 0.85
    valid = torch.rand(shape, generator=generator) < 0.9
    return Experience(observations, actions, rewards, terminated, truncated, valid)


def double_agent(seeds=2):
    from common.mgrl_agent import ActorCritic

    return ActorCritic(seeds, 4, 2, 5, torch.Generator().manual_seed(0)).double()


def n_step_mixture(experience, values, discount, trace, index, t):
    """Return the lambda-return by its definition: a mixture of n-step returns."""
    rewards, total, weight = experience.rewards[index], 0.0, 1.0
    steps, accumulated, factor = len(rewards), 0.0, 1.0
    for k in range(t, steps):
        accumulated += factor * rewards[k].item()
        factor *= discount
        if experience.terminated[index][k]:
            return total + weight * accumulated
        whole = accumulated + factor * values[index][k + 1].item()
        if k == steps - 1 or experience.truncated[index][k]:
            return total + weight * whole
        total += weight * (1 - trace) * whole
        weight *= trace
    raise AssertionError


class TestReturns:
    @pytest.mark.parametrize(("discount", "trace"), [(0.9, 0.7), (0.5, 0.0), (1.0, 1.0)])
    def test_they_are_mixtures_of_n_step_returns(self, discount, trace):
        from common.mgrl_agent import lambda_returns

        experience = random_experience(1)
        assert experience.terminated.any()
        assert experience.truncated.any()
        values = torch.randn(2, 3, 7, dtype=torch.float64)
        both = (torch.full((2,), x, dtype=torch.float64) for x in (discount, trace))
        found = lambda_returns(experience, values, *both)
        for index in ((s, c) for s in range(2) for c in range(3)):
            for t in range(6):
                expected = n_step_mixture(experience, values, discount, trace, index, t)
                assert found[index][t].item() == pytest.approx(expected, rel=1e-10)

    def test_derivatives_in_discount_and_trace(self):
        from common.mgrl_agent import lambda_returns

        experience = random_experience(2)
        values = torch.randn(2, 3, 7, dtype=torch.float64)
        both = [torch.rand(2, dtype=torch.float64).requires_grad_() for _ in range(2)]
        function = lambda g, l: lambda_returns(experience, values, g, l)  # noqa: E731
        assert torch.autograd.gradcheck(function, both)


class TestMetaGradient:
    def outer(self, logits, reference):
        """Return agent and outer loss after three inner steps, as in one round of the example."""
        from common.mgrl_agent import actor_critic_loss, policy_loss

        agent = double_agent()
        inner = torchopt.MetaAdam(agent, lr=0.05)
        for step in range(3):
            discount, trace = logits.sigmoid()
            inner.step(actor_critic_loss(agent, random_experience(step), discount, trace).sum())
        return agent, policy_loss(agent, random_experience(9), *reference)

    def test_against_central_differences(self, monkeypatch):
        from common import mgrl_agent

        torch.manual_seed(0)
        reference = torch.full((2, 2), 0.97, dtype=torch.float64)
        logits = torch.randn(2, 2, dtype=torch.float64)
        honest, recorded = mgrl_agent.constant_values, []

        def record(*args):
            recorded.append(honest(*args))
            return recorded[-1]

        def outer(at):
            # the values in returns are constants to all gradients: hold them as they were
            values = iter(recorded)
            monkeypatch.setattr(mgrl_agent, "constant_values", lambda *_: next(values))
            return self.outer(at, reference)[1].sum().item()

        monkeypatch.setattr(mgrl_agent, "constant_values", record)
        leaf = logits.clone().requires_grad_()
        (found,) = torch.autograd.grad(self.outer(leaf, reference)[1].sum(), leaf)
        h = 1e-5
        for i in range(2):
            for j in range(2):
                shift = torch.zeros_like(logits)
                shift[i, j] = h
                slope = (outer(logits + shift) - outer(logits - shift)) / (2 * h)
                assert found[i, j].item() == pytest.approx(slope, rel=1e-6)
                assert slope != 0

    def test_seeds_do_not_touch_each_other(self):
        reference = torch.full((2, 2), 0.97, dtype=torch.float64)
        logits = torch.zeros(2, 2, dtype=torch.float64)
        other = logits.clone()
        other[:, 0] = 1.5
        agents = [self.outer(x, reference)[0] for x in (logits, other)]
        for one, two in zip(*(agent.parameters() for agent in agents)):
            assert torch.equal(one[1], two[1])
        # the biases of the policy sum to zero gradient, so look where the discount must matter
        assert not torch.equal(agents[0].critic_out[0], agents[1].critic_out[0])
        leaf = logits.clone().requires_grad_()
        loss = self.outer(leaf, reference)[1]
        (found,) = torch.autograd.grad(loss[0], leaf)
        assert (found[:, 0] != 0).all()
        assert (found[:, 1] == 0).all()


class TestSampler:
    def test_it_goes_on_where_it_was_and_marks_resets(self):
        from common.mgrl_agent import ActorCritic, Experience, Sampler

        agent = ActorCritic(2, 4, 2, 8, torch.Generator().manual_seed(0))
        sampler = Sampler("CartPole-v1", 2, 3, 50, 0, torch.device("cpu"), 0.5)
        first, second = sampler.collect(agent), sampler.collect(agent)
        assert torch.equal(first.observations[:, :, -1], second.observations[:, :, 0])
        joined = {
            f.name: torch.cat([getattr(first, f.name), getattr(second, f.name)], 2)
            for f in fields(Experience)
            if f.name != "observations"
        }
        ends = joined["terminated"] | joined["truncated"]
        assert ends.any()  # an untrained agent falls within 100 steps
        assert torch.equal(~joined["valid"][:, :, 1:], ends[:, :, :-1])
        assert torch.equal(joined["rewards"] == 0.5, joined["valid"])
        lengths = [r for r in sampler.latest.flatten().tolist() if r == r]
        assert all(5 < length < 200 for length in lengths)


class TestRun:
    def test_everything_is_written(self, tmp_path):
        results = run_here("--output", str(tmp_path))
        assert (tmp_path / "mgrl.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((tmp_path / "results.json").read_text()) == results
        assert len(results["claims"]) == 2
        assert all(set(claim) == {"claim", "measured", "holds"} for claim in results["claims"])

    @pytest.mark.thorough
    def test_a_discount_too_low_rises_and_a_fixed_one_stays(self):
        import mgrl

        args = mgrl.parse(["--seeds", "3", "--rounds", "25"])
        names = mgrl.Settings.__annotations__
        settings = mgrl.Settings(**{n: {**vars(args), "device": "cpu"}[n] for n in names})
        rows = mgrl.lived(settings, mgrl.Method(True, 0.5, 0.95), lambda _: None)
        assert all(gamma > 0.55 for gamma in rows[-1]["gamma"])
        *_, (_, discount, trace) = mgrl.live(replace(settings, rounds=2), (0.5, 0.95), False)
        torch.testing.assert_close(discount, torch.full((3,), 0.5))
        torch.testing.assert_close(trace, torch.full((3,), 0.95))

    @pytest.mark.usefixtures("no_figures")
    def test_interrupted_and_resumed_is_as_uninterrupted(self, tmp_path, monkeypatch):
        import mgrl

        run_here("--output", str(tmp_path / "straight"))
        honest, calls = mgrl.lived, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return honest(*args)

        monkeypatch.setattr(mgrl, "lived", interrupted)
        with pytest.raises(SystemExit, match="--resume"):
            run_here("--output", str(tmp_path / "cut"))
        run_here("--output", str(tmp_path / "cut"), "--resume")
        texts = [(tmp_path / k / "metrics.jsonl").read_text() for k in ("straight", "cut")]
        assert texts[0] == texts[1]
        assert len(calls) == 4  # the first of the three lives was not lived again

    def test_other_settings_are_not_resumed(self, tmp_path):
        run_here("--output", str(tmp_path))
        with pytest.raises(SystemExit, match="--overwrite"):
            run_here("--output", str(tmp_path))
        with pytest.raises(SystemExit, match="rounds=3, this run has rounds=4"):
            run_here("--output", str(tmp_path), "--resume", "--rounds", "4")


class TestBadInput:
    @pytest.mark.parametrize("option", ["--start", "--fixed-traces", "--outer-discount", "--trace"])
    @pytest.mark.parametrize("value", ["0", "1", "-0.5"])
    def test_no_probability(self, option, value, capsys):
        with pytest.raises(SystemExit):
            run_here(f"{option}={value}")
        assert "strictly between 0 and 1" in capsys.readouterr().err

    def test_unwritable_output(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit, match="Cannot write to the output folder"):
            run_here("--output", str(tmp_path / "file" / "folder"))

    def test_missing_gymnasium_names_the_extra(self, monkeypatch):
        import common.mgrl_agent

        monkeypatch.setitem(sys.modules, "gymnasium", None)
        with pytest.raises(SystemExit, match=r"torchopt\[examples\]"):
            importlib.reload(common.mgrl_agent)
