"""What optimizers share that estimate the distance to the solution, and take it for their rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base.numerics import power
from torchopt.core.engine import Leaves
from torchopt.core.slots import Slot
from torchopt.core.transform import GradientTransformation
from torchopt.transforms.clip import sum_of_parts
from torchopt.typing import Step


def of_number(shape: torch.Size) -> tuple[int, ...]:
    """Return the shape of a slot that is one number for a parameter."""
    return ()


def _first_estimate(param: Tensor, *, estim_lr0: Any, **_: Any) -> Tensor:
    return torch.zeros((), dtype=param.dtype, device=param.device) + estim_lr0


#: The estimate of the distance: the same number for all parameters, kept beside the slots of each.
ESTIMATE = Slot("estim_lr", start=_first_estimate, shape=of_number)


class DistanceEstimating(GradientTransformation):
    """A rule whose rate is an estimate of the distance to the solution, made of all parameters.

    A step has two halves. :meth:`look` brings the slots of one parameter up to date and returns its
    part of the numerator and of the denominator of an estimate; the estimate is that of their sums;
    :meth:`move` then returns the update. The last slot is :data:`ESTIMATE`.
    """

    uses_step = True
    accepts_complex = False

    def init_all_slots(self, leaves: Leaves) -> list[tuple[Any, ...]]:
        """Return the first slots; parameters that are alike have one estimate, a single tensor."""
        known: dict[Any, Any] = {}
        result = []
        for p, h in zip(leaves.p, leaves.hyper):
            *own, estimate = self.first_slots(p, **h)
            key = id(h), p.dtype, p.device
            result.append((*own, known.setdefault(key, estimate)))
        return result

    def common(self, d: Tensor, t: Step, **h: Any) -> Any:
        """Return what is the same for parameters with these in common: rates, as numbers.

        Args:
            d: The estimate before this step.
            t: The step count, 1 at the first update.
            **h: The hyperparameters.
        """
        raise NotImplementedError

    def look(
        self, g: Tensor, p: Any, slots: tuple[Any, ...], common: Any, **h: Any
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return the new slots without the last, and what is added to either side of a fraction.

        Args:
            g: The gradient.
            p: The parameter.
            slots: The slots without the last one.
            common: What :meth:`common` returned.
            **h: The hyperparameters.
        """
        raise NotImplementedError

    def move(
        self, g: Tensor, p: Any, slots: tuple[Any, ...], common: Any, new: Tensor, **h: Any
    ) -> Tensor:
        """Return the update, from the new slots and the estimate after this step."""
        raise NotImplementedError

    def estimate(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """Return an estimate; zero, which changes nothing, while all gradients have been zero."""
        none = denominator == 0
        return torch.where(none, 0.0, numerator / torch.where(none, 1.0, denominator))

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Tensor | None, ...]]]:
        """Look at all parameters, estimate, and move them."""
        before = joined([row[-1] for row in leaves.slots], leaves.t)
        each = list(zip(leaves.g, leaves.p, leaves.hyper))
        rates = shared(self.common, before, leaves.t, leaves.hyper)
        seen = [
            self.look(g, p, row[:-1], rate, **h)
            for (g, p, h), row, rate in zip(each, leaves.slots, rates)
        ]
        found = self.estimate(
            sum_of_parts([numerator for _, numerator, _ in seen]),
            sum_of_parts([denominator for _, _, denominator in seen]),
        )
        # of parameters that had one estimate the new one is a single tensor, too
        after = shared(
            lambda d, _: torch.maximum(d, found.to(device=d.device, dtype=d.dtype)),
            before,
            [1] * len(before),
            [{}] * len(before),
        )
        updates = [
            self.move(g, p, kept, rate, new, **h)
            for (g, p, h), (kept, _, _), rate, new in zip(each, seen, rates, after)
        ]
        return updates, [(*kept, new) for (kept, _, _), new in zip(seen, after)]


def shared(
    function: Callable[..., Any],
    estimates: Sequence[Tensor],
    t: Sequence[Step],
    rows: Sequence[dict[str, Any]],
) -> list[Any]:
    """Return a function of each estimate, count and row, computed once where they are the same."""
    if torch.compiler.is_compiling():  # it sees what is the same, and makes guards of identities
        return [function(d, n, **h) for d, n, h in zip(estimates, t, rows)]
    known: dict[tuple[int, int, int], Any] = {}
    result = []
    for d, n, h in zip(estimates, t, rows):
        key = (id(d), n if type(n) is int else id(n), id(h))
        if key not in known:
            known[key] = function(d, n, **h)
        result.append(known[key])
    return result


def joined(estimates: list[Tensor], t: list[Step]) -> list[Tensor]:
    """Return numbers of all parameters, where one in its first step takes the greatest of all.

    A parameter that is trained from some later step on begins where the others have come to.
    """
    first = t[0]
    if all(n is first or (type(n) is int and n == first) for n in t):
        return estimates
    device = estimates[0].device
    greatest = torch.stack([d.to(device) for d in estimates]).amax()
    result = []
    for d, n in zip(estimates, t):
        shared = greatest.to(device=d.device, dtype=d.dtype)
        if isinstance(n, Tensor):
            result.append(torch.where(n == 1, shared, d))
        else:
            result.append(shared if n == 1 else d)
    return result


def corrected(d: Tensor, t: Step, lr: Any, betas: tuple[Any, Any], correct: bool) -> Tensor:
    """Return the rate of a step: the estimate times ``lr``, with Adam's correction of the bias."""
    if correct:
        b1, b2 = betas
        lr = lr * ((1 - power(b2, t)) ** 0.5 / (1 - power(b1, t)))
    return (d * lr).to(d.dtype)  # a learned number may be wider
