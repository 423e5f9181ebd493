"""What solvers call the number that is not zero yet: a gradient, a residual, a distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equations import F64
from torch import Tensor

from torchopt.solvers import (
    LBFGS,
    Anderson,
    FixedPointIteration,
    LevenbergMarquardt,
    Newton,
    find_root,
    fixed_point,
    least_squares,
    minimize,
)


def curved(p: Tensor, a: Tensor) -> Tensor:
    return (p - a).cosh() + p


@pytest.mark.parametrize(
    ("run", "solver", "measure"),
    [
        (minimize, LBFGS(max_iter=1), "a gradient of"),
        (minimize, Newton(max_iter=1), "a gradient of"),
        (least_squares, LevenbergMarquardt(max_iter=1), "a gradient of"),
        (find_root, Newton(max_iter=1), "a residual of"),
        (fixed_point, FixedPointIteration(max_iter=1), "a distance from the fixed point of"),
        (fixed_point, Anderson(max_iter=1), "a distance from the fixed point of"),
    ],
)
def test_what_is_not_zero_has_a_name(run: Callable[..., Any], solver: Any, measure: str) -> None:
    a = torch.tensor([0.5, -2.0], **F64, requires_grad=True)

    def fn(p: Tensor, a: Tensor) -> Tensor:
        return curved(p, a).sum() if run is minimize else curved(p, a)

    with pytest.warns(UserWarning, match=f"1 iterations, with {measure} "):
        solution = run(fn, solver, torch.tensor([3.0, 1.0], **F64), a)
    with pytest.raises(RuntimeError, match=f"with {measure} "):
        solution.checked()
