"""Transformations run over some gradients; hooks and masks that pickle."""

from __future__ import annotations

from typing import Any

from conftest import nonzero
from torch import Tensor

import torchopt


def params() -> dict[str, Tensor]:
    return {"w": nonzero(2, 3), "b": nonzero(3)}


def run(
    tx: torchopt.GradientTransformation, p: Any, grads: list[Any], inplace: bool = False
) -> tuple[list[Any], Any]:
    """Return the updates of every step for fixed parameters, and the last state."""
    state, result = tx.init(p), []
    for g in grads:
        updates, state = tx.update(g, state, p, inplace=inplace)
        result.append(updates)
    return result, state


def double(g: Tensor) -> Tensor:
    """A hook that pickles."""
    return 2 * g


def not_bias(p: Any) -> Any:
    """A mask that pickles: everything but parameters named ``b``."""
    return {name: name != "b" for name in p}
