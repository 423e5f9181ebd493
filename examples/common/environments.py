"""Families of reinforcement-learning tasks, registered with Gymnasium as vector environments.

Importing this module registers ``torchopt/TabularMDP-v0`` and ``torchopt/PointNavigation-v0``. One
vector environment holds several tasks: ``sample_tasks`` draws them, and ``reset`` divides its
copies evenly between those of ``options={"tasks": tasks}``, the copies of a task side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from common.endings import missing


try:
    import gymnasium
    import numpy as np
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
    from numpy.typing import NDArray
except ImportError as error:
    missing("Reinforcement learning needs gymnasium", error)

Tasks = TypeVar("Tasks", bound=tuple)
Array = NDArray[np.float64]


class MDPs(NamedTuple):
    """Finite Markov decision processes.

    Attributes:
        transitions: Probabilities ``[tasks, states, actions, next states]``.
        rewards: Mean rewards ``[tasks, states, actions]``.
    """

    transitions: Array
    rewards: Array


class Goals(NamedTuple):
    """Places to reach in the plane.

    Attributes:
        places: ``[tasks, 2]``.
    """

    places: Array


class EpisodeVectorEnv(VectorEnv):
    """Copies of one environment that all run for ``horizon`` steps and are then reset together.

    Args:
        num_envs: Number of copies.
        horizon: Steps of an episode.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": []}

    def __init__(
        self, num_envs: int, horizon: int, observation: spaces.Box, action: spaces.Space[Any]
    ) -> None:
        self.num_envs, self.horizon = num_envs, horizon
        self.single_observation_space, self.single_action_space = observation, action
        self.observation_space = batch_space(observation, num_envs)
        self.action_space = batch_space(action, num_envs)
        self.elapsed = horizon  # nothing to step through before the first reset

    def divided(self, tasks: Tasks | None, default: Tasks) -> tuple[Tasks, NDArray[np.int64]]:
        """Return the tasks and the number of the task of each copy.

        Raises:
            ValueError: If the copies cannot be divided evenly.
        """
        tasks = default if tasks is None else tasks
        count = len(tasks[0])
        if self.num_envs % count:
            raise ValueError(f"{self.num_envs} copies cannot be divided evenly by {count} tasks.")
        return tasks, np.repeat(np.arange(count), self.num_envs // count)

    def advance(self) -> NDArray[np.bool_]:
        """Count a step and return which copies are truncated: all of them at the horizon.

        Raises:
            RuntimeError: If the episode is over.
        """
        if self.elapsed >= self.horizon:
            raise RuntimeError(f"The episode of {self.horizon} steps is over: call reset first.")
        self.elapsed += 1
        return np.full(self.num_envs, self.elapsed == self.horizon)


class TabularMDPVectorEnv(EpisodeVectorEnv):
    """Random Markov decision processes, as in Duan et al. 2016 (RL^2).

    Transitions are drawn from a flat Dirichlet distribution, mean rewards from a normal
    distribution of mean and variance 1; a reward is normal around its mean, with variance 1. An
    episode begins in state 0. Observations are one-hot vectors.

    Args:
        num_envs: Number of copies.
        horizon: Steps of an episode.
        states: Number of states.
        actions: Number of actions.
    """

    def __init__(
        self, num_envs: int = 1, horizon: int = 10, states: int = 10, actions: int = 5
    ) -> None:
        observation = spaces.Box(0.0, 1.0, (states,), np.float32)
        super().__init__(num_envs, horizon, observation, spaces.Discrete(actions))
        self.states, self.actions = states, actions

    def sample_tasks(self, count: int, generator: np.random.Generator) -> MDPs:
        """Draw processes."""
        shape = (count, self.states, self.actions)
        transitions = generator.dirichlet(np.ones(self.states), size=shape)
        return MDPs(transitions, generator.normal(1.0, 1.0, shape))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode in each copy, in the processes of ``options["tasks"]`` or a new one."""
        super().reset(seed=seed)
        given = (options or {}).get("tasks")
        tasks, self.task = self.divided(given, given or self.sample_tasks(1, self.np_random))
        self.cumulative, self.rewards = tasks.transitions.cumsum(-1), tasks.rewards
        self.state = np.zeros(self.num_envs, dtype=np.int64)
        self.elapsed = 0
        return self._observation(), {}

    def step(self, actions: NDArray[np.int64]) -> tuple[Any, ...]:
        """Take one action in each copy."""
        truncated = self.advance()
        place = (self.task, self.state, actions)
        reward = self.np_random.normal(self.rewards[place], 1.0)
        below = self.np_random.random((self.num_envs, 1)) >= self.cumulative[place]
        self.state = np.minimum(below.sum(-1), self.states - 1)
        return self._observation(), reward, np.zeros_like(truncated), truncated, {}

    def _observation(self) -> NDArray[np.float32]:
        return np.eye(self.states, dtype=np.float32)[self.state]


class PointNavigationVectorEnv(EpisodeVectorEnv):
    """Find an unseen goal in the plane, as in Finn, Abbeel and Levine 2017 (MAML), section 5.3.

    A point starts at the origin, sees its own position only, and moves by up to 0.1 in each
    direction a step. The reward is minus the squared distance to the goal, which is uniform in the
    square ``[-0.5, 0.5]^2``. An episode always takes ``horizon`` steps, also at the goal.

    Args:
        num_envs: Number of copies.
        horizon: Steps of an episode; 100 in the paper.
    """

    LIMIT = 0.1

    def __init__(self, num_envs: int = 1, horizon: int = 20) -> None:
        observation = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        action = spaces.Box(-self.LIMIT, self.LIMIT, (2,), np.float32)
        super().__init__(num_envs, horizon, observation, action)

    def sample_tasks(self, count: int, generator: np.random.Generator) -> Goals:
        """Draw goals."""
        return Goals(generator.uniform(-0.5, 0.5, (count, 2)))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode in each copy, with the goals of ``options["tasks"]`` or a new one."""
        super().reset(seed=seed)
        given = (options or {}).get("tasks")
        tasks, task = self.divided(given, given or self.sample_tasks(1, self.np_random))
        self.goal = tasks.places[task]
        self.position = np.zeros((self.num_envs, 2))
        self.elapsed = 0
        return self.position.astype(np.float32), {}

    def step(self, actions: NDArray[np.float32]) -> tuple[Any, ...]:
        """Move each copy; actions beyond the limits are clipped to them."""
        truncated = self.advance()
        self.position = self.position + np.clip(actions, -self.LIMIT, self.LIMIT)
        reward = -np.square(self.position - self.goal).sum(-1)
        observation = self.position.astype(np.float32)
        return observation, reward, np.zeros_like(truncated), truncated, {}


def best_navigation_return(goals: Goals, horizon: int) -> Array:
    """Return the highest return for each goal ``[tasks]``: straight there in each direction."""
    steps = np.arange(1, horizon + 1) * PointNavigationVectorEnv.LIMIT
    left = np.maximum(np.abs(goals.places)[:, None] - steps[None, :, None], 0.0)
    return -np.square(left).sum((1, 2))


for _name, _entry in (
    ("torchopt/TabularMDP-v0", TabularMDPVectorEnv),
    ("torchopt/PointNavigation-v0", PointNavigationVectorEnv),
):
    if _name not in gymnasium.registry:
        gymnasium.register(_name, vector_entry_point=_entry)
