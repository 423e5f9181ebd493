"""Numbers without bounds that stand for hyperparameters, which have some."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Transform
from torch.nn.functional import softplus

from torchopt.base import misuse
from torchopt.base.misuse.given import is_number
from torchopt.core.hyper import HyperSpec


#: Those that have names, with what they need: no bound, one, or two.
KINDS = {"identity": "none", "exp": "one", "softplus": "one", "sigmoid": "two"}


class Reparametrization(Protocol):
    """A function of a raw number, and the way back."""

    def value(self, raw: Tensor) -> Tensor:
        """Return the hyperparameter that a raw number stands for."""
        ...

    def raw(self, value: Tensor) -> Tensor:
        """Return the raw number that stands for a hyperparameter."""
        ...


@dataclasses.dataclass(frozen=True)
class Bounded:
    """One of the named ones, between the bounds of a hyperparameter.

    Args:
        kind: One of ``KINDS``.
        lower: The lower bound.
        upper: The upper bound.
        open_lower: Whether the lower bound itself is no value.
        open_upper: Whether the upper bound itself is no value.
    """

    kind: str
    lower: float = -math.inf
    upper: float = math.inf
    open_lower: bool = False
    open_upper: bool = False

    def value(self, raw: Tensor) -> Tensor:
        """Return the hyperparameter; never on a bound that is no value, however far the raw one is.

        There it is next to the bound, with the derivative zero.
        """
        if self.kind == "identity":
            return raw
        info = torch.finfo(raw.dtype)
        if self.kind == "sigmoid":
            found = self.lower + (self.upper - self.lower) * raw.sigmoid()
        else:  # the derivative of an infinite exponential would be nan
            highest = 0.999 * math.log(info.max)
            distance = softplus(raw) if self.kind == "softplus" else raw.clamp(max=highest).exp()
            found = self.upper - distance if self.lower == -math.inf else self.lower + distance
        if self.open_lower:
            found = found.clamp(min=self.lower + max(abs(self.lower) * info.eps, info.tiny))
        if self.open_upper:
            found = found.clamp(max=self.upper - max(abs(self.upper) * info.eps, info.tiny))
        return found

    def raw(self, value: Tensor) -> Tensor:
        """Return the raw number; infinite or ``nan`` on a bound or beyond it."""
        if self.kind == "identity":
            return value
        if self.kind == "sigmoid":
            share = (value - self.lower) / (self.upper - self.lower)
            return share.log() - (-share).log1p()
        distance = self.upper - value if self.lower == -math.inf else value - self.lower
        if self.kind == "exp":
            return distance.log()
        return distance + (-(-distance).expm1()).log()


@dataclasses.dataclass(frozen=True)
class Given:
    """A pair of functions of the user's."""

    function: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]

    def value(self, raw: Tensor) -> Tensor:
        """Return the hyperparameter that a raw number stands for."""
        return self.function(raw)

    def raw(self, value: Tensor) -> Tensor:
        """Return the raw number that stands for a hyperparameter."""
        return self.inverse(value)


def reparametrization(name: str, spec: HyperSpec, kind: Any = None) -> Reparametrization:
    """Return the reparametrization of a hyperparameter.

    Args:
        name: Its name, for errors.
        spec: What values it may take.
        kind: One of ``KINDS``; a pair of numbers, for a sigmoid between them; a pair of functions,
            each the inverse of the other; a ``torch.distributions.Transform``; or ``None`` for what
            its bounds suggest.

    Raises:
        TypeError: If ``kind`` is none of those.
        ValueError: If it does not keep the bounds.
    """
    lower = max((b for b in (spec.ge, spec.gt) if b is not None), default=-math.inf)
    upper = min((b for b in (spec.le, spec.lt) if b is not None), default=math.inf)
    if isinstance(kind, (tuple, list)) and len(kind) == 2 and all(map(is_number, kind)):
        least, most = map(float, kind)
        if not (lower <= least < most <= upper and math.isfinite(most - least)):
            raise ValueError(
                f"The reparametrization of {name} must be between two numbers within its bounds, "
                f"{spec}, got {misuse.short(kind)}."
            )
        return Bounded("sigmoid", least, most, open_lower=True, open_upper=True)
    if kind is not None and not isinstance(kind, str):
        return _of_functions(name, kind)
    number = math.isfinite(lower) + math.isfinite(upper)
    kind = kind or ("identity", "exp", "sigmoid")[number]
    if kind not in KINDS:
        raise ValueError(
            f"The reparametrization of {name} must be one of {list(KINDS)}, a pair of numbers or "
            f"functions, or a torch.distributions.Transform, got {kind!r}."
        )
    needed = {"none": number, "one": 1, "two": 2}[KINDS[kind]]
    if number != needed:
        other = ("identity", "exp", "sigmoid")[number]
        between = ", or two numbers to lie between, such as (0, 1)" if kind == "sigmoid" else ""
        raise ValueError(
            f"{kind!r} does not keep {name} within its bounds, {spec}: it is for "
            f"{'one bound' if needed == 1 else 'two bounds'}. Take {other!r}{between}."
        )
    return Bounded(kind, lower, upper, lower == spec.gt, upper == spec.lt)


def _of_functions(name: str, kind: Any) -> Given:
    if isinstance(kind, Transform):
        forward: Any = kind
        return Given(forward, forward.inv)
    if isinstance(kind, (tuple, list)) and len(kind) == 2 and all(map(callable, kind)):
        return Given(*kind)
    raise TypeError(
        f"The reparametrization of {name} must be one of {list(KINDS)}, a pair of numbers, a pair "
        "of functions (that of a raw number and its inverse) or a torch.distributions.Transform, "
        f"got {misuse.short(kind)}."
    )


def raw_of(name: str, way: Reparametrization, value: Tensor, spec: HyperSpec) -> Tensor:
    """Return the raw number that stands for a value to begin with; computed in float64.

    Raises:
        ValueError: If none does, or it does not lead back to the value.
    """
    exact = value.detach().double()
    raw = way.raw(exact).detach()
    if not bool(raw.isfinite().all()):
        shown = misuse.short(value.item()) if value.numel() == 1 else misuse.short(value)
        raise ValueError(
            f"{name} begins at {shown}, which no finite number stands for: it must lie inside of "
            f"its bounds ({spec}), not on one. Begin with another value, or take "
            "reparametrization='identity', which keeps no bounds."
        )
    back = way.value(raw)
    if not torch.allclose(back, exact, rtol=1e-6, atol=0.0):
        raise ValueError(
            f"The reparametrization of {name} does not lead back to {misuse.short(exact.tolist())} "
            f"but to {misuse.short(back.tolist())}: its two functions must be inverse to each "
            "other."
        )
    return raw
