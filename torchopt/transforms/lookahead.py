"""Lookahead: slow weights that follow the fast ones of another optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.base import misuse
from torchopt.core.engine import Leaves
from torchopt.core.gather import part_slots
from torchopt.core.hyper import hyper
from torchopt.core.slots import PARAM, Slot
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.transforms.inside import Wrapper, count_of, prepared
from torchopt.typing import Hyperparameter


@transformation
class Lookahead(Wrapper):
    """Draw the parameters back to slow weights; see :func:`lookahead`."""

    inner: GradientTransformation
    sync_period: int
    slow_step_size: Hyperparameter = hyper(0.5, ge=0, le=1)
    reset_state: bool = False

    @property
    def own_slots(self) -> tuple[Slot, ...]:
        """The slow weights."""
        return (Slot("slow", start=PARAM),)

    def takes_sparse(self, **hyperparameters: Any) -> bool:
        """No: every entry is drawn back."""
        return False

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """Run the inside; at every ``sync_period``-th step the slow weights move, and all meet."""
        k, everything = self.sync_period, range(len(leaves.g))
        counts = [count_of(t) for t in leaves.t]
        t = [(n - 1) % k + 1 for n in counts] if self.reset_state else counts
        updates, inside = self.run_inner(leaves, leaves.g, t, everything)
        slots = [[row[0], *new] for row, new in zip(leaves.slots, inside)]
        meeting = [i for i in everything if counts[i] % k == 0]
        slow_weights: list[Any] = []
        for i in meeting:
            p, slow = misuse.given_params("lookahead", leaves.p[i]), slots[i][0]
            slow = slow + leaves.hyper[i]["slow_step_size"] * (p + updates[i] - slow)
            updates[i] = slow - p
            slots[i][0] = slow
            slow_weights.append(slow)
        if self.reset_state and meeting:
            for i, row in zip(meeting, self._fresh(leaves, meeting, slow_weights)):
                slots[i][1:] = row
        return updates, [tuple(row) for row in slots]

    def _fresh(self, leaves: Leaves, positions: list[int], params: list[Any]) -> list[Any]:
        """Return the slots of the inside as they are before a first step from parameters."""
        rows = part_slots(self, leaves.subset(positions).with_tensors(params, params, None))
        return [row[1:] for row in rows]


def lookahead(
    fast_optimizer: GradientTransformation,
    sync_period: int,
    slow_step_size: Hyperparameter = 0.5,
    reset_state: bool = False,
) -> GradientTransformation:
    r"""Take steps of another optimizer, and every few steps keep only part of the way.

    .. math::
        p_t = p_{t-1} + u_t, \qquad\text{and for } k \mid t: \quad
        s \leftarrow s + \alpha\,(p_t - s), \quad p_t \leftarrow s

    (Zhang et al., 2019, https://arxiv.org/abs/1907.08610). The slow weights begin as the
    parameters; they are in the slot ``slow``, to evaluate with.

    Args:
        fast_optimizer: The transformation that makes :math:`u_t`.
        sync_period: :math:`k \ge 1`.
        slow_step_size: :math:`0 \le \alpha \le 1`.
        reset_state: Reset slots and step count of ``fast_optimizer`` after every meeting.

    Slots: ``slow``, those of ``fast_optimizer``, and its counters. In Optax parameters are a pair
    of fast and slow ones instead.

    What a meta-gradient reaches: the parameters that it began with, through both; every gradient;
    and ``slow_step_size``.

    Raises:
        TypeError: If ``fast_optimizer`` is no transformation.
        ValueError: If a number is out of bounds, or ``update`` is called without ``params``.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.lookahead(torchopt.sgd(1.0), sync_period=2)
        >>> p = [torch.zeros(1)]
        >>> state = tx.init(p)
        >>> for _ in range(2):
        ...     p, state = tx.apply_gradients([torch.ones(1)], state, p, inplace=False)
        ...     print(p)
        [tensor([-1.])]
        [tensor([-1.])]
    """
    k = sync_period
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"sync_period must be an integer >= 1, got {misuse.short(k)}.")
    return Lookahead(prepared(fast_optimizer, "lookahead"), k, slow_step_size, reset_state)
