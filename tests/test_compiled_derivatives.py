"""Implicit and zero-order derivatives inside of what ``torch.compile`` compiles: as without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tolerances import relative_error
from torch import Tensor, nn

from torchopt.diff import Implicit, custom_fixed_point, zero_order
from torchopt.linear_solve import solve_cg
from torchopt.nn import ImplicitMetaGradientModule
from torchopt.solvers import LBFGS, minimize


class Equilibrium(nn.Module):
    """A layer that is a fixed point, with weights that its map closes over."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.3, 0.1], [-0.2, 0.4]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        @custom_fixed_point(lambda z, x: torch.tanh(self.w @ z + x), argnums=1)
        def solver(z: Tensor, x: Tensor) -> Tensor:
            for _ in range(60):
                z = torch.tanh(self.w @ z + x)
            return z

        return 2 * solver(torch.zeros_like(x), x)


LAYER = Equilibrium()


def by_minimize(x: Tensor) -> Tensor:
    found = minimize(
        lambda p, x: (p.exp() - x * p).sum(), LBFGS(), torch.zeros_like(x), x, adjoint=Implicit()
    )
    return 2 * found.params


def by_linear_solve(x: Tensor) -> Tensor:
    return 2 * solve_cg()(lambda v: (1 + x * x) * v, x)


class Root(ImplicitMetaGradientModule):
    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift, self.p = shift, nn.Parameter(torch.ones(2, dtype=torch.float64))

    def optimality(self, x: Tensor) -> tuple[Tensor]:
        return (self.p**2 - x * self.shift,)

    def solve(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.p.copy_((x * self.shift).sqrt())
        return x


ROOT = Root(torch.ones((), requires_grad=True))


def by_module(x: Tensor) -> Tensor:
    ROOT.solve(1 * x)
    return 2 * ROOT.p


def by_values(x: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(0)
    smoothed = zero_order(torch.randn, "antithetic", num_samples=3, generator=g)
    return 2 * smoothed(lambda x: (x * x).sum())(x)


@pytest.mark.parametrize("how", [LAYER, by_minimize, by_linear_solve, by_module, by_values])
def test_gradients_are_the_same(how: Callable[[Tensor], Tensor]) -> None:
    torch.compiler.reset()
    gradients = []
    for function in (how, torch.compile(how, backend="eager")):
        x = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
        gradients.append(torch.autograd.grad(function(x).sum(), x)[0])
    assert bool(gradients[0].abs().sum() > 0)
    assert relative_error(gradients[1], gradients[0]) < 1e-12
