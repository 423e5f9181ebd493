"""Rates of entries in the kernels for GPUs; on the CPU Triton's interpreter runs them."""

from __future__ import annotations

import pytest
import torch
from learning import FACES, judged
from test_triton import pytestmark as pytestmark
from test_triton_optimizers import _device as _device
from tolerances import assert_close
from torch import Tensor

import torchopt
from torchopt.kernels import why


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_rates_of_entries_against_the_rules(name: str, dtype: torch.dtype, device: str) -> None:
    """One for each entry, and a row of them that broadcasts; on a GPU one with one entry, too."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) + 0.5).to(device, dtype)

    start, coefficients = [drawn(40, 30), drawn(7)], [drawn(40, 30), drawn(7)]
    rates = [drawn(30).requires_grad_(), drawn(7).requires_grad_()]
    if device != "cpu":
        rates[1] = torch.tensor(0.3, device=device, dtype=dtype, requires_grad=True)
    results = []
    for setting in (True, False):
        params = [p.clone().requires_grad_() for p in start]
        make = {
            "sgd": lambda s: torchopt.sgd(rates, momentum=0.5, use_accelerated_op=s),
            "adam": lambda s: torchopt.adam(rates, use_accelerated_op=s),
        }[name]
        assert why(make(True), params, params=params) == []
        new = FACES["apply_gradients"](make(setting), params, coefficients, 2)
        loss = judged(new, coefficients)
        results.append([*new, *torch.autograd.grad(loss, [*rates, *params])])
    assert_close(results[0], results[1], dtype, times=100)


def test_a_derivative_by_a_number_is_left_to_the_rules(device: str) -> None:
    if device == "cpu":
        pytest.skip("on the CPU it is a kernel's")
    params = [torch.ones(3, device=device)]
    lr = torch.tensor(0.1, requires_grad=True)
    (line,) = why(torchopt.sgd(lr), params, params=params)
    assert "derivative by a hyperparameter on the CPU" in line
    with torch.no_grad():
        assert why(torchopt.sgd(lr), params, params=params) == []
