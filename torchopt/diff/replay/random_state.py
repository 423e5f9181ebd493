"""What a step reads from outside of its arguments, and a replay has to put back.

The random states of the CPU and of the GPUs in use, and autocast. Grad mode is the business of
whoever runs a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The states of the default generators: of the CPU, and of some GPUs."""

    cpu: Tensor
    cuda: dict[int, Tensor]

    @staticmethod
    def now(devices: Iterable[int], like: RandomState | None = None) -> RandomState:
        """Return the states; ``like`` itself if nothing was drawn since: one state takes 5 KB."""
        state = RandomState(
            torch.get_rng_state(), {index: torch.cuda.get_rng_state(index) for index in devices}
        )
        return like if like is not None and state.same(like) else state

    def same(self, other: RandomState) -> bool:
        """Whether two states are equal."""
        return (
            self.cuda.keys() == other.cuda.keys()
            and torch.equal(self.cpu, other.cpu)
            and all(torch.equal(state, other.cuda[index]) for index, state in self.cuda.items())
        )

    def put_back(self) -> None:
        """Let the generators go on from here."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)


def cuda_devices(tensors: Iterable[object]) -> list[int]:
    """Return the GPUs that tensors are on."""
    devices = {t.device for t in tensors if isinstance(t, Tensor)}
    return sorted(d.index or 0 for d in devices if d.type == "cuda")


@contextlib.contextmanager
def undisturbed(devices: list[int]) -> Iterator[None]:
    """Leave the generators, afterwards, as they are now."""
    state = RandomState.now(devices)
    try:
        yield
    finally:
        state.put_back()


#: The context in which nothing is different.
AS_IT_IS = contextlib.nullcontext()


class Autocast:
    """The setting of autocast at one moment, to be entered again.

    Autocast's cache of converted weights is left out: a copy that was made while nothing is
    recorded would be used again where something is, and would cut the graph.
    """

    def __init__(self) -> None:
        self.kinds = _kinds()
        on = filter(torch.is_autocast_enabled, self.kinds)
        self.settings = {kind: torch.get_autocast_dtype(kind) for kind in on}

    def again(self) -> contextlib.AbstractContextManager[None]:
        """Return the context with this setting."""
        if not self.settings and not any(map(torch.is_autocast_enabled, self.kinds)):
            return AS_IT_IS
        return self._set(self.settings.keys() | filter(torch.is_autocast_enabled, self.kinds))

    @contextlib.contextmanager
    def _set(self, kinds: Iterable[str]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind in kinds:
                dtype = self.settings.get(kind)
                setting = torch.autocast(
                    kind, dtype=dtype, enabled=dtype is not None, cache_enabled=False
                )
                stack.enter_context(setting)
            yield


def _kinds() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
