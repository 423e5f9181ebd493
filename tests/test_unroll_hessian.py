"""Second derivatives of loops: where carries that are saved would be wrong without a word."""

from __future__ import annotations

from typing import Any

import loops
import pytest
import torch
from tolerances import META_GRADIENT, relative_error

from torchopt.diff import Unrolled


@pytest.mark.parametrize("name", ["plain", *loops.EXACT])
def test_the_hessian_against_central_differences(name: str) -> None:
    adjoint: Any = {"plain": Unrolled(), **loops.EXACT}[name]
    values, function = loops.inputs(), loops.meta_loss(adjoint)
    v = loops.direction(values)
    up, down = (loops.gradient(function, loops.moved(values, v, s * 1e-5)) for s in (1, -1))
    actual = loops.hessian_product(function, values, v)
    assert relative_error(actual, (up - down) / 2e-5) <= META_GRADIENT


@pytest.mark.parametrize("name", ["every 1", "sqrt", "log"])
def test_the_hessian_where_steps_call_autograd(name: str) -> None:
    values = loops.inputs()
    v = loops.direction(values)
    expected = loops.hessian_product(loops.meta_loss(Unrolled()), values, v)
    actual = loops.hessian_product(loops.meta_loss(loops.EXACT[name], autograd=True), values, v)
    assert relative_error(actual, expected) <= 1e-10


@pytest.mark.parametrize("name", ["log"])
def test_third_derivatives(name: str) -> None:
    values = loops.inputs()

    def third(adjoint: Any) -> torch.Tensor:
        by = loops.leaves(values)
        grads = torch.autograd.grad(loops.meta_loss(adjoint)(*by), by, create_graph=True)
        square = sum(g.square().sum() for g in grads)
        grads = torch.autograd.grad(square, by, create_graph=True)  # pyright: ignore
        square = sum(g.square().sum() for g in grads)
        return loops.flat(torch.autograd.grad(square, by))  # pyright: ignore

    assert relative_error(third(loops.EXACT[name]), third(Unrolled())) <= 1e-10
