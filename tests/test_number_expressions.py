"""Numbers that a rule computes by logarithms and learned exponents: fused, with derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import nonzero
from fusing import needs_library
from tolerances import assert_close

import torchopt
from torchopt.base.numerics import logarithm, power
from torchopt.kernels import why
from torchopt.kernels.generate.graph import Node, Number, input_node, make_kernel, number_node
from torchopt.kernels.generate.written import read, write


@torchopt.transformation
class ByHalfLife(torchopt.ElementwiseTransformation):
    """Multiply by the logarithm of one number and by a power whose exponent is another."""

    beta: Any = torchopt.hyper(0.9, gt=0, lt=1)
    exponent: Any = torchopt.hyper(0.5)
    uses_step = True

    def rule(self, g: Any, p: Any, t: Any, slots: tuple, *, beta: Any, exponent: Any) -> Any:
        return g * (logarithm(0.5) / logarithm(beta) * power(t + 1, exponent)), slots


@needs_library
@pytest.mark.parametrize("learned", [False, True], ids=["numbers", "learned"])
def test_values_and_derivatives(learned: bool) -> None:
    beta, exponent = (
        torch.tensor(v, dtype=torch.float64, requires_grad=learned) for v in (0.8, 0.3)
    )
    g = nonzero(4).requires_grad_()
    tx = ByHalfLife(beta, exponent) if learned else ByHalfLife(0.8, 0.3)
    assert why(tx, g) == []
    updates, _ = tx.update(g, tx.init(g), inplace=False)
    expected = g * (torch.log(torch.tensor(0.5, dtype=torch.float64)) / beta.log() * 2.0**exponent)
    assert_close(updates.detach(), expected.detach())
    inputs = [g, beta, exponent] if learned else [g]
    weights = nonzero(4)
    found = torch.autograd.grad((weights * updates).sum(), inputs, create_graph=True)
    assert_close(found, torch.autograd.grad((weights * expected).sum(), inputs, create_graph=True))


@needs_library
def test_a_logarithm_that_there_is_not_leaves_the_step_to_the_rule() -> None:
    """Of a learned number nobody knows the sign: torch says ``nan``, and so does the step."""
    g = nonzero(3)
    for beta, right in ((0.5, False), (-0.5, True)):
        tx = ByHalfLife(torch.tensor(beta, dtype=torch.float64, requires_grad=True), 0.5)
        updates, _ = tx.update(g, tx.init(g), inplace=False)
        assert updates.isnan().all() == right


def test_a_kernel_with_a_logarithm_can_be_written_and_read() -> None:
    product = input_node("g"), number_node(Number("log(h[0])"))
    text = write(make_kernel({"u": Node("mul", product)}))
    assert read(text).numbers([2.0], 1.0) == pytest.approx((0.6931471805599453,))
    with pytest.raises(ValueError, match="no such Call"):
        read(text.replace("log(", "exp("))
