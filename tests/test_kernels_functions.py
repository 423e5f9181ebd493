"""Exponentials, logarithms and powers of the C library: exact to the last digit, and everywhere."""

from __future__ import annotations

import pytest
import torch
from fusing import needs_library, run_kernel, sets_fixture  # noqa: F401
from torch import Tensor

from torchopt.kernels.backends import availability as backends
from torchopt.kernels.backends import cpu as native
from torchopt.kernels.generate.graph import Node, input_node, make_kernel


pytestmark = needs_library
UNARY = ("exp", "log", "expm1", "log1p", "tanh", "sigmoid")


def computed(op: str, *tensors: Tensor) -> Tensor:
    operands = ("g", "p")[: len(tensors)]
    kernel = make_kernel({"u": Node(op, tuple(map(input_node, operands)))})
    out = torch.empty_like(tensors[0])
    given = [x.data_ptr() for x in tensors]
    kind = native.DTYPES[out.dtype]
    run_kernel(
        native.library(),
        backends.function_of(kernel),
        kind,
        0,
        0,
        [out.numel()],
        given,
        [out.data_ptr()],
        [],
    )
    return out


def floats() -> Tensor:
    """Any bits, and numbers where the functions are not 0, 1 or infinite."""
    bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    normal = torch.randn(400_000)
    scales = torch.tensor([1e-6, 1e-3, 1.0, 30.0]).repeat_interleave(100_000)
    return torch.cat([bits, normal * scales, 1 + 1e-3 * normal[:50_000]])


def units_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of their dtype lie between them; both must have one sign."""
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}[a.dtype]
    return (a.view(whole) - b.view(whole)).abs()


@pytest.mark.parametrize("op", UNARY)
def test_float_is_rounded_correctly_but_for_a_few(op: str, sets: list[str]) -> None:
    x = floats()
    expected = getattr(torch, op)(x.double()).float()
    usual = ~expected.isnan()
    for name in sets:
        native.library().select(name)
        found = computed(op, x)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found[usual].signbit(), expected[usual].signbit())
        apart = units_apart(found[usual], expected[usual])
        assert apart.max() <= 1
        assert (apart > 0).double().mean() < 1e-5


@pytest.mark.parametrize("op", UNARY)
def test_double_is_as_torch_has_it(op: str) -> None:
    x = floats().double() * (1 + torch.rand(650_000, dtype=torch.float64) * 1e-7)
    found, expected = computed(op, x), getattr(torch, op)(x)
    usual = expected.isfinite() & (expected.abs() > 1e-300)
    assert torch.equal(found.isnan(), expected.isnan())
    assert units_apart(found[usual], expected[usual]).max() <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_powers(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1, -1, 0.5, 2, -3, torch.inf, -torch.inf, torch.nan, 1e-30])
    a, b = (x.contiguous().to(dtype) for x in torch.cartesian_prod(special, special).unbind(1))
    a, b = torch.cat([a, torch.rand(9999).to(dtype)]), torch.cat([b, torch.randn(9999).to(dtype)])
    found, expected = computed("pow", a, b), torch.pow(a.double(), b.double()).to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    usual = ~expected.isnan()
    assert torch.equal(found[usual].signbit(), expected[usual].signbit())
    assert units_apart(found[usual], expected[usual]).max() <= 2
