"""MAML in reinforcement learning: exact returns, unbiased derivatives, the real run, tiny."""

import importlib
import itertools
import json
import sys

import pytest
import torch


pytest.importorskip("rich")
pytest.importorskip("matplotlib")
gymnasium = pytest.importorskip("gymnasium")
np = pytest.importorskip("numpy")

pytestmark = pytest.mark.usefixtures("examples_on_path")

TINY = [
    *("--seeds", "2", "--iterations", "4", "--meta-batch", "3", "--trajectories", "4"),
    *("--test-tasks", "5", "--test-steps", "2", "--hidden", "8", "--threads", "1"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    import maml_rl
    from common import maml_rl_experiment

    monkeypatch.setattr(maml_rl, "COUNTS", (10, 40))
    monkeypatch.setattr(maml_rl_experiment, "RATES", (0.01, 0.1))
    monkeypatch.setattr(maml_rl_experiment, "CHOICE_TASKS", 4)


def run_here(*options):
    import maml_rl

    return maml_rl.main([*TINY, *options])


class SmallProcess:
    """A process whose trajectories can all be listed: the oracle of this file."""

    states, actions, horizon, discount = 2, 2, 3, 0.9

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        shape = (self.states, self.actions)
        weights = torch.rand(*shape, self.states, generator=generator, dtype=torch.float64) + 0.1
        self.transitions = weights / weights.sum(-1, keepdim=True)
        self.rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.baseline = torch.randn(self.horizon, self.states, generator=generator).double()

    def trajectories(self):
        """Yield the states and actions of every trajectory."""
        for actions in itertools.product(range(self.actions), repeat=self.horizon):
            for later in itertools.product(range(self.states), repeat=self.horizon - 1):
                yield (0, *later), actions

    def expectation(self, logits, value):
        """Return the mean of ``value(log_probs, rewards, states)`` by listing all trajectories."""
        total = 0.0
        for states, actions in self.trajectories():
            log_probs = torch.stack([logits[s].log_softmax(-1)[a] for s, a in zip(states, actions)])
            chance = log_probs.sum().exp()
            for s, a, following in zip(states, actions, states[1:]):
                chance = chance * self.transitions[s, a, following]
            rewards = torch.stack([self.rewards[s, a] for s, a in zip(states, actions)])
            total = total + value(chance, log_probs, rewards, states)
        return total

    def discounted(self, rewards):
        return (rewards * self.discount ** torch.arange(self.horizon).double()).sum()

    def exact(self, logits):
        from common.maml_rl_exact import expected_return

        policy = logits.softmax(-1)
        return expected_return(self.transitions, self.rewards, policy, self.horizon, self.discount)


class TestExactReturns:
    def test_expected_return_is_the_mean_over_all_trajectories(self):
        process = SmallProcess()
        listed = process.expectation(
            process.logits, lambda p, _, rewards, __: p * process.discounted(rewards)
        )
        torch.testing.assert_close(process.exact(process.logits), listed, rtol=1e-12, atol=0)

    def test_optimal_return_is_the_best_of_all_plans(self):
        from common.maml_rl_exact import optimal_return

        process = SmallProcess()
        choices = list(itertools.product(range(process.actions), repeat=process.states))

        def value(plan, state=0, t=0):
            if t == process.horizon:
                return 0.0
            action = plan[t][state]
            later = [value(plan, s, t + 1) for s in range(process.states)]
            mean = sum(p * v for p, v in zip(process.transitions[state, action].tolist(), later))
            return process.rewards[state, action].item() + process.discount * mean

        best = max(value(plan) for plan in itertools.product(choices, repeat=process.horizon))
        found = optimal_return(
            process.transitions, process.rewards, process.horizon, process.discount
        )
        assert found.item() == pytest.approx(best, rel=1e-12)


class TestEstimators:
    def derivatives(self, estimator):
        """Return gradient and Hessian of the expected estimate, by listing all trajectories."""
        from common.maml_rl_learning import discounted_sums, return_estimate

        process = SmallProcess()
        discounts = process.discount ** torch.arange(process.horizon).double()

        def estimate(chance, log_probs, rewards, states):
            values = torch.stack([process.baseline[t, s] for t, s in enumerate(states)])
            advantages = discounted_sums(rewards, process.discount) - values
            weighted = advantages * discounts
            return chance.detach() * return_estimate(log_probs, weighted, estimator)

        mean = lambda logits: process.expectation(logits, estimate)  # noqa: E731
        gradient = torch.autograd.functional.jacobian(mean, process.logits).flatten()
        hessian = torch.autograd.functional.hessian(mean, process.logits).reshape(4, 4)
        exact = torch.autograd.functional.jacobian(process.exact, process.logits).flatten()
        exact_hessian = torch.autograd.functional.hessian(process.exact, process.logits)
        return gradient, hessian, exact, exact_hessian.reshape(4, 4)

    def test_dice_is_unbiased_in_both_orders_with_any_baseline(self):
        gradient, hessian, exact, exact_hessian = self.derivatives("dice")
        torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(hessian, exact_hessian, rtol=1e-10, atol=1e-12)

    def test_the_surrogate_is_unbiased_in_the_first_order_only(self):
        gradient, hessian, exact, exact_hessian = self.derivatives("surrogate")
        torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-12)
        assert (hessian - exact_hessian).norm() > 0.1 * exact_hessian.norm()

    def test_meta_gradient_against_central_differences(self):
        from common.maml_rl_learning import (
            Advantages,
            GaussianPolicy,
            Learner,
            Trajectories,
            for_each_task,
        )

        torch.manual_seed(0)
        policy = GaussianPolicy(2, 2, (4,), spread=0.5).double()
        learner = Learner(policy, Advantages(0.9, 0.8), "surrogate", 0.3)
        batches = [
            Trajectories(*(torch.randn(2, 3, 5, *d, dtype=torch.float64) for d in ((2,), (2,), ())))
            for _ in range(2)
        ]
        start = {n: torch.randn_like(p) for n, p in policy.named_parameters()}

        def outer(params):
            return learner.outer_loss(
                learner.adapt(for_each_task(params, 2), batches[0]), batches[1]
            )

        leaves = {n: p.clone().requires_grad_() for n, p in start.items()}
        grads = torch.autograd.grad(outer(leaves), list(leaves.values()))
        direction = {n: torch.randn_like(p) for n, p in start.items()}
        slope = sum((g * d).sum() for g, d in zip(grads, direction.values()))
        h = 1e-5
        ends = [outer({n: p + s * h * direction[n] for n, p in start.items()}) for s in (1, -1)]
        assert slope.item() == pytest.approx(((ends[0] - ends[1]) / (2 * h)).item(), rel=1e-7)

    @pytest.mark.parametrize("trace", [0.0, 0.6, 1.0])
    def test_advantages_are_their_definition(self, trace):
        from common.maml_rl_learning import Advantages, Trajectories

        torch.manual_seed(1)
        batch = Trajectories(torch.randn(2, 6, 4, 3), torch.zeros(2, 6, 4), torch.randn(2, 6, 4))
        advantages = Advantages(0.9, trace)
        values = advantages.baseline(batch)
        for t in range(4):
            expected = torch.zeros(2, 6)
            for k in range(t, 4):
                following = values[..., k + 1] if k < 3 else 0.0
                error = batch.rewards[..., k] + 0.9 * following - values[..., k]
                expected += (0.9 * trace) ** (k - t) * error
            torch.testing.assert_close(advantages(batch)[..., t], expected, rtol=1e-5, atol=1e-6)


class TestEnvironments:
    def test_sampled_processes_have_the_exact_return(self):
        from common.environments import TabularMDPVectorEnv
        from common.maml_rl_exact import expected_return

        copies = 20000
        env = TabularMDPVectorEnv(2 * copies)
        generator = np.random.default_rng(0)
        tasks = env.sample_tasks(2, generator)
        observation, _ = env.reset(seed=0, options={"tasks": tasks})
        policy = generator.dirichlet(np.ones(5), 10)
        total, truncated = np.zeros(2 * copies), np.zeros(1, dtype=bool)
        while not truncated.all():
            assert observation.sum(-1).all()
            cumulative = policy[observation.argmax(-1)].cumsum(-1)
            actions = (generator.random((2 * copies, 1)) >= cumulative[:, :-1]).sum(-1)
            observation, reward, _, truncated, _ = env.step(actions)
            total += reward
        exact = expected_return(*(torch.as_tensor(x) for x in tasks), torch.as_tensor(policy), 10)
        total = total.reshape(2, copies)
        errors = np.abs(total.mean(1) - exact.numpy()) / (total.std(1) / copies**0.5)
        assert (errors < 4).all()

    def test_the_best_navigation_walks_straight(self):
        from common.environments import PointNavigationVectorEnv, best_navigation_return

        env = gymnasium.make_vec("torchopt/PointNavigation-v0", num_envs=6, horizon=9).unwrapped
        assert isinstance(env, PointNavigationVectorEnv)
        goals = env.sample_tasks(6, np.random.default_rng(0))
        position, _ = env.reset(seed=0, options={"tasks": goals})
        total = np.zeros(6)
        for _ in range(9):
            position, reward, *_ = env.step((goals.places - position).astype(np.float32))
            total += reward
        np.testing.assert_allclose(total, best_navigation_return(goals, 9), rtol=1e-5)
        with pytest.raises(RuntimeError, match="call reset first"):
            env.step(position)

    def test_uneven_tasks_are_refused(self):
        from common.environments import PointNavigationVectorEnv

        env = PointNavigationVectorEnv(7)
        tasks = env.sample_tasks(2, np.random.default_rng(0))
        with pytest.raises(ValueError, match="7 copies cannot be divided evenly by 2"):
            env.reset(options={"tasks": tasks})


class TestRun:
    def test_everything_is_written(self, tmp_path):
        results = run_here("--output", str(tmp_path))
        assert (tmp_path / "maml_rl.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((tmp_path / "results.json").read_text()) == results
        assert len(results["claims"]) == 5
        assert all(set(claim) == {"claim", "measured", "holds"} for claim in results["claims"])
        assert set(results["returns"]) == {"tabular", "navigation"}

    @pytest.mark.thorough
    def test_maml_learns_to_learn(self):
        import maml_rl
        from common.maml_rl_experiment import Family, measured, meta_train

        options = ["--iterations", "60", "--meta-batch", "10", "--test-tasks", "30"]
        options += ["--test-steps", "1"]
        settings = maml_rl.settings_of(maml_rl.parse(options), "navigation")
        family = Family(settings, 0)
        params, log = meta_train(family, True, lambda *_: None)
        before, after = measured(family, params, [settings.inner_lr])["returns"]
        assert log[-1]["after"] > log[0]["after"]
        assert after > before + 1  # of about -4

    @pytest.mark.usefixtures("no_figures")
    def test_interrupted_and_resumed_is_as_uninterrupted(self, tmp_path, monkeypatch):
        import maml_rl

        options = ["--families", "navigation"]
        run_here("--output", str(tmp_path / "straight"), *options)
        honest, calls = maml_rl.measured, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return honest(*args)

        monkeypatch.setattr(maml_rl, "measured", interrupted)
        with pytest.raises(SystemExit, match="--resume"):
            run_here("--output", str(tmp_path / "cut"), *options)
        run_here("--output", str(tmp_path / "cut"), "--resume", *options)
        texts = [(tmp_path / k / "metrics.jsonl").read_text() for k in ("straight", "cut")]
        assert texts[0] == texts[1]
        assert len(calls) == 3 + 4  # two of the six jobs were not done again

    def test_other_settings_are_not_resumed(self, tmp_path):
        options = ["--families", "navigation", "--seeds", "1", "--output", str(tmp_path)]
        run_here(*options)
        with pytest.raises(SystemExit, match="--overwrite"):
            run_here(*options)
        with pytest.raises(SystemExit, match="families"):
            run_here(*options, "--resume", "--inner-lr", "0.2")


class TestBadInput:
    @pytest.mark.parametrize("option", ["--discount", "--trace"])
    def test_numbers_above_one(self, option, capsys):
        with pytest.raises(SystemExit):
            run_here(option, "1.5")
        assert "must be at most 1, got 1.5" in capsys.readouterr().err

    def test_unwritable_output(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit, match="Cannot write to the output folder"):
            run_here("--output", str(tmp_path / "file" / "folder"))

    def test_missing_gymnasium_names_the_extra(self, monkeypatch):
        import common.environments

        monkeypatch.setitem(sys.modules, "gymnasium", None)
        with pytest.raises(SystemExit, match=r"torchopt\[examples\]"):
            importlib.reload(common.environments)
