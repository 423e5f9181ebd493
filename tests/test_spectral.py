"""Roots and eigenvectors of symmetric matrices, and their derivatives where eigenvalues tie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import GRADCHECK, all_finite, assert_close
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torchopt.base.spectral import eigenbasis, inverse_root, power_iterated


F64: Any = {"dtype": torch.float64}
CHECK: Any = GRADCHECK
SHAPES = ((3, 3), (3, 1), (2, 3))  # of what is squared: full, and of lower rank
jacfwd, jacrev = torch.func.jacfwd, torch.func.jacrev

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_power = pytest.mark.parametrize("p", [2, 4, 6, 8])


def squared(x: Tensor) -> Tensor:
    return x @ x.mT


def root_of_square(p: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, eps: inverse_root(squared(x), eps, p)


# The inverse root ---------------------------------------------------------------------------------


@every_power
@every_shape
def test_the_power_of_the_root_is_the_inverse(shape: tuple[int, int], p: int) -> None:
    x, eye = nonzero(*shape), torch.eye(shape[0], **F64)
    found = inverse_root(squared(x), 0.3, p)
    back = torch.linalg.matrix_power(found, p) @ (squared(x) + 0.3 * eye)
    assert_close(back, eye, times=10)
    with torch.no_grad():
        assert_close(inverse_root(squared(x), 0.3, p), found)


@pytest.mark.parametrize(("shape", "p"), [((3, 3), 4), ((3, 1), 6), ((2, 3), 2)], ids=str)
def test_derivatives_of_the_root(shape: tuple[int, int], p: int) -> None:
    """Of a sum of few squares, which has the eigenvalue 0 as often as there are others."""
    inputs = (nonzero(*shape, requires_grad=True), torch.tensor(0.3, **F64, requires_grad=True))
    function = root_of_square(p)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, **CHECK)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, **CHECK)


def test_derivatives_at_a_multiple_of_the_identity() -> None:
    """All eigenvalues are 2: every direction has the slope of the function of one number."""
    slopes = jacrev(lambda a: inverse_root(a, 0.5, 4))(1.5 * torch.eye(3, **F64))
    slope = -0.25 * 2.0**-1.25
    expected = torch.einsum("ik,jl->ijkl", torch.eye(3, **F64), torch.eye(3, **F64))
    assert_close(slopes, slope * (expected + expected.mT) / 2)
    curvature = jacfwd(jacrev(lambda x: inverse_root(x * torch.eye(3, **F64), 0.5, 4)))
    value = 0.25 * 1.25 * 2.0**-2.25
    assert_close(curvature(torch.tensor(1.5, **F64)), value * torch.eye(3, **F64))


def test_every_order_in_every_mode() -> None:
    x = nonzero(2, 1)

    def function(x: Tensor) -> Tensor:
        return (inverse_root(squared(x), 0.4, 4) * torch.arange(1.0, 5.0, **F64).view(2, 2)).sum()

    second = jacrev(jacrev(function))(x)
    for mode in (jacfwd(jacfwd(function)), jacfwd(jacrev(function)), jacrev(jacfwd(function))):
        assert_close(mode(x), second, times=10)
    third = jacrev(jacrev(jacrev(function)))(x)
    assert_close(jacfwd(jacfwd(jacfwd(function)))(x), third, times=10)
    step = 1e-4 * torch.eye(2, **F64).view(2, 2, 1)
    curvature = jacrev(jacrev(function))
    measured = [(curvature(x + s) - curvature(x - s)) / 2e-4 for s in step]
    assert (third[..., 0] - torch.stack(measured, dim=-1)).abs().max() < 1e-6 * third.abs().max()


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (2, 0)], ids=str)
def test_batches(in_dims: tuple[int | None, int | None]) -> None:
    x = nonzero(3, 4, 2) if in_dims[0] == 0 else nonzero(4, 2)
    x = x if in_dims[0] != 2 else nonzero(4, 2, 3)
    eps = torch.tensor(0.3, **F64) if in_dims[1] is None else torch.tensor([0.3, 0.5, 0.7], **F64)
    for function in (root_of_square(4), jacrev(root_of_square(4)), jacfwd(root_of_square(4))):
        found = torch.vmap(function, in_dims)(x, eps)
        for k in range(3):
            own = x if in_dims[0] is None else x.select(in_dims[0], k)
            assert_close(found[k], function(own, eps if in_dims[1] is None else eps[k]))


def test_the_root_is_compiled_with_its_derivative() -> None:
    x, eps = nonzero(3, 2), torch.tensor(0.3, **F64)
    compiled = torch.compile(root_of_square(4), fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, root_of_square(4)):
        y = x.clone().requires_grad_()
        value = function(y, eps)
        found.append((value.detach(), *torch.autograd.grad((value**3).sum(), y)))
    assert_close(found[0], found[1])


def test_what_is_not_finite_is_nan() -> None:
    for spoilt in (float("nan"), float("inf")):
        a = torch.eye(2, **F64) * spoilt
        assert inverse_root(torch.stack([a, torch.eye(2, **F64)]), 1.0, 2).isnan().any()
        assert inverse_root(a, 1.0, 4).isnan().all()
        assert eigenbasis(a).shape == (2, 2)


# Eigenvectors -------------------------------------------------------------------------------------


@every_shape
def test_the_basis_is_one_of_eigenvectors(shape: tuple[int, int]) -> None:
    a = squared(nonzero(*shape))
    q = eigenbasis(a)
    assert_close(q.mT @ q, torch.eye(len(q), **F64))
    turned = q.mT @ a @ q
    assert_close(turned, torch.diag(torch.linalg.eigvalsh(a).flip(0)), times=10)
    with torch.no_grad():
        assert torch.equal(eigenbasis(a), q)


def iterated(x: Tensor, y: Tensor) -> Tensor:
    """Return a basis that two gradients have made."""
    a = squared(x)
    return power_iterated(0.9 * a + squared(y), eigenbasis(a))[0]


@every_shape
def test_derivatives_of_bases(shape: tuple[int, int]) -> None:
    x, y = nonzero(*shape, requires_grad=True), nonzero(shape[0], 1, requires_grad=True)
    first = lambda x: eigenbasis(squared(x))  # noqa: E731
    for function, inputs in ((first, (x,)), (iterated, (x, y))):
        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, **CHECK)
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True, **CHECK)
        inputs = tuple(z.detach() for z in inputs)
        second = jacrev(jacrev(function))(*inputs)
        for mode in (jacfwd(jacfwd(function)), jacfwd(jacrev(function))):
            assert_close(mode(*inputs), second, times=1000)


def test_bases_of_batches() -> None:
    x, y = nonzero(3, 4, 2), nonzero(4, 1)
    found = torch.vmap(iterated, (0, None))(x, y)
    slopes = torch.vmap(jacrev(iterated), (0, None))(x, y)
    for k in range(3):
        assert_close(found[k], iterated(x[k], y))
        assert_close(slopes[k], jacrev(iterated)(x[k], y), times=10)


def test_equal_eigenvalues_turn_no_basis() -> None:
    """Two of 3 tie: derivatives are those of the vector that has an eigenvalue for itself."""
    a = torch.diag(torch.tensor([1.0, 1.0, 3.0], **F64))
    slopes = jacrev(eigenbasis)(a)
    assert all_finite(slopes)
    assert_close(jacfwd(eigenbasis)(a), slopes)
    expected = torch.zeros(3, 3, 3, **F64)  # of the first column, of the eigenvalue 3
    for k in range(2):
        expected[k, k, 2] = expected[k, 2, k] = 0.5 / 2
    sign = eigenbasis(a)[2, 0]
    assert_close(slopes[:, 0], sign * expected)
    assert all_finite(torch.func.hessian(lambda a: eigenbasis(a)[:, 1].sum())(a))


def test_zero_matrices_and_rows() -> None:
    zero = torch.zeros(3, 3, **F64)
    assert torch.equal(eigenbasis(zero), torch.eye(3, **F64))
    assert torch.equal(power_iterated(zero, eigenbasis(zero))[0], torch.eye(3, **F64))
    assert (torch.func.hessian(lambda a: eigenbasis(a).sum())(zero) == 0).all()
    x = nonzero(4, 2)
    x[1] = x[2] = 0.0
    for q in (eigenbasis(squared(x)), iterated(x, x[:, :1].clone())):
        # the rows that are zero have columns of their own, exactly
        mixed = q[[1, 2]]
        assert ((mixed == 0) | (mixed.abs() == 1)).all()
        assert mixed.abs().sum() == 2
        assert all_finite(jacrev(lambda x: eigenbasis(squared(x)))(x))


def test_a_power_step() -> None:
    """The Q of QR, but for signs, of columns in the order of what they stretch."""
    a, q = squared(nonzero(4, 4)), torch.linalg.qr(nonzero(4, 4)).Q
    found, order = power_iterated(a, q)
    stretched = (q.mT @ a @ q).diag()
    assert (stretched[order].diff() < 0).all()
    expected = torch.linalg.qr((a @ q)[:, order]).Q
    assert_close(found * (found * expected).sum(dim=0).sign(), expected)


def test_a_power_step_leaves_what_it_cannot_tell() -> None:
    """Of a matrix of rank 1 one column is found; what is beside it stays as it was."""
    x = torch.tensor([[0.0], [2.0], [0.0], [0.0]], **F64)
    q = torch.eye(4, **F64)
    found, order = power_iterated(squared(x), q)
    assert order.tolist() == [1, 0, 2, 3]
    assert torch.equal(found.abs(), q[:, order])
