"""Optimistic gradient descent: Mokhtari et al., equation 10, with two weights as in Optax."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


def optimistic_gradient_descent(
    k: dict[str, Any], p: Tensor, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Subtract from a gradient that is taken twice the one before."""
    before = grads[0]
    for g in grads:
        p = p - k["lr"] * ((k["alpha"] + k["beta"]) * g - k["beta"] * before)
        before = g
        yield p, {"previous_grad": g}
