"""Roots and eigenvectors of symmetric matrices, whose derivatives are finite where eigenvalues tie.

A matrix of second moments of few gradients has the eigenvalue zero many times, and there autograd
divides by the difference of two of them. The functions here have every order of derivative, in
reverse and forward mode, under ``torch.func`` and for batches of matrices.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.base.batched_grads import has_batches, over_batches
from torchopt.base.numerics import derivatives_recorded
from torchopt.base.torch_internals import (
    get_tracing_state,
    is_functorch_wrapped_tensor,
    len_torch_dispatch_stack,
    set_forward_grad_enabled,
)


def inverse_root(a: Tensor, shift: Any, p: int) -> Tensor:
    r"""Return :math:`(A + s I)^{-1/p}` of a positive semidefinite matrix, for :math:`s > 0`.

    The derivative is that of the function of the matrix, also where eigenvalues are equal. What is
    not finite gives ``nan``.
    """
    a = (a + a.mT) / 2
    values, vectors = decomposed(a)
    # no eigenvalue is negative; one that is zero may be found below it
    roots = (values.clamp(min=0) + _constant(shift)) ** (1 / p)
    if not derivatives_recorded():
        return (vectors / roots.unsqueeze(-2)) @ vectors.mT
    shifted = a + shift * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return cast(Tensor, _applied(_InverseRoot, shifted, vectors, roots, p))


def decomposed(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, the smallest first, and eigenvectors, as constants.

    A matrix that is not finite, which torch refuses, has those that are ``nan``.
    """
    a = a.detach()
    finite = a.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.where(finite, a, 0.0))
    nan = float("nan")
    return torch.where(finite[..., 0], values, nan), torch.where(finite, vectors, nan)


def _constant(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _applied(cls: Any, *args: Any) -> Any:
    """Apply a function with forward mode, but for the compiler, which takes none that has it."""
    if has_batches(args):
        return over_batches(lambda *given: (_applied(cls, *given),), args)[0]
    return (cls if torch.compiler.is_compiling() else cls.with_forward).apply(*args)


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """Return what a function saved, without the tangents of the level that is at work."""
    return tuple(forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors)


def _batched(cls: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    """Apply a function that takes batches as they are, with the batch in front."""
    batches = [
        x
        if not isinstance(x, Tensor)
        else x.expand(info.batch_size, *x.shape)
        if dim is None
        else x.movedim(dim, 0)
        for x, dim in zip(args, in_dims)
    ]
    found = cls.apply(*batches)
    return found, (0,) * len(found) if isinstance(found, tuple) else 0


class _InverseRoot(torch.autograd.Function):
    r"""The root :math:`X = A^{-1/p}` from the eigenvectors of :math:`A` and the roots :math:`\nu`.

    :math:`Y = X^{-1}` solves :math:`Y^p = A`, so that :math:`\mathrm dY` solves
    :math:`\sum_k Y^k\, \mathrm dY\, Y^{p-1-k} = \mathrm dA` (see :class:`_Solve`), and
    :math:`\mathrm dX = -X\, \mathrm dY\, X`. Eigenvectors and their roots are constants: all
    that depends on :math:`A` is expressed by :math:`X`.
    """

    generate_vmap_rule = True
    with_forward: Any

    @staticmethod
    def forward(a: Tensor, vectors: Tensor, roots: Tensor, p: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (vectors / roots.unsqueeze(-2)) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, vectors, roots, ctx.p = inputs
        ctx.set_materialize_grads(False)  # what nothing depends on has none: 0 * nan is nan
        ctx.save_for_backward(output, vectors, roots)
        ctx.save_for_forward(output, vectors, roots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return None, None, None, None
        x, vectors, roots = ctx.saved_tensors
        return -_solve(x, x.mT @ grad @ x.mT, vectors, roots, ctx.p), None, None, None


class _InverseRootForward(_InverseRoot):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _batched(_InverseRootForward, info, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, da: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with set_forward_grad_enabled(True):  # torch turns off that of outer levels, too
            x, vectors, roots = _saved(ctx)
            return -x @ _solve(x, da, vectors, roots, ctx.p) @ x


def _solve(x: Tensor, b: Tensor, vectors: Tensor, roots: Tensor, p: int) -> Tensor:
    return cast(Tensor, _applied(_Solve, torch.linalg.inv(x), b, vectors, roots, p))


class _Solve(torch.autograd.Function):
    r"""The solution :math:`Z` of :math:`\sum_{k<p} Y^k Z Y^{p-1-k} = B`.

    In the basis of eigenvectors of :math:`Y` it is a division by
    :math:`\sum_k \nu_i^k \nu_j^{p-1-k}`, which is :math:`(\nu_i^p - \nu_j^p) / (\nu_i - \nu_j)` and
    never zero. The derivative is that of the equation, and has the same solution operator.
    """

    generate_vmap_rule = True
    with_forward: Any

    @staticmethod
    def forward(y: Tensor, b: Tensor, vectors: Tensor, roots: Tensor, p: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, columns = roots.unsqueeze(-1), roots.unsqueeze(-2)
        sums = sum(rows**k * columns ** (p - 1 - k) for k in range(p))
        return vectors @ ((vectors.mT @ b @ vectors) / sums) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        y, _, vectors, roots, ctx.p = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, output, vectors, roots)
        ctx.save_for_forward(y, output, vectors, roots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return None, None, None, None, None
        y, z, vectors, roots = ctx.saved_tensors
        w = _applied(_Solve, y, grad, vectors, roots, ctx.p)
        grad_y = None
        if ctx.needs_input_grad[0]:
            grad_y = -sum(left.mT @ w @ right.mT for left, right in _around(y, z, ctx.p))
        return grad_y, w, None, None, None


class _SolveForward(_Solve):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _batched(_SolveForward, info, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, dy: Any, db: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with set_forward_grad_enabled(True):
            y, z, vectors, roots = _saved(ctx)
            change = torch.zeros_like(y) if db is None else db
            if dy is not None:
                change = change - sum(left @ dy @ right for left, right in _around(y, z, ctx.p))
            return _SolveForward.apply(y, change, vectors, roots, ctx.p)


def _around(y: Tensor, z: Tensor, p: int) -> list[tuple[Tensor, Tensor]]:
    r"""Return what stands on either side of each :math:`Y` in the sum that is solved for ``z``."""
    powers = [torch.eye(y.shape[-1], dtype=y.dtype, device=y.device).expand_as(y)]
    for _ in range(p - 1):
        powers.append(powers[-1] @ y)
    pairs = []
    for k in range(p):
        left, right = z @ powers[p - 1 - k], powers[k] @ z
        pairs += [(powers[a], powers[k - 1 - a] @ left) for a in range(k)]
        pairs += [(right @ powers[a], powers[p - 2 - k - a]) for a in range(p - 1 - k)]
    return pairs


class _Eigen(torch.autograd.Function):
    r"""Eigenvalues and eigenvectors, with the part of a derivative that is well defined.

    .. math::
        \mathrm d\lambda_i = v_i^\top \mathrm dA\, v_i, \qquad
        \mathrm dv_j = \sum_{i:\, \lambda_i \ne \lambda_j}
            v_i \frac{v_i^\top \mathrm dA\, v_j}{\lambda_j - \lambda_i}

    Within the space of equal eigenvalues a basis turns in no particular way: it is left where it
    is, which is exact for whatever does not depend on that choice.
    """

    generate_vmap_rule = True
    with_forward: Any

    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return decomposed(a)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        values, vectors = ctx.saved_tensors
        inner = None if grads[0] is None else torch.diag_embed(grads[0])
        if grads[1] is not None:
            turned = _over_differences(vectors.mT @ grads[1], values)
            inner = turned if inner is None else inner + turned
        return None if inner is None else vectors @ inner @ vectors.mT


class _EigenForward(_Eigen):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _batched(_EigenForward, info, in_dims, args)

    @staticmethod
    def jvp(ctx: Any, da: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with set_forward_grad_enabled(True):
            values, vectors = _saved(ctx)
            inner = vectors.mT @ da @ vectors
            changed = vectors @ _over_differences(inner, values)
            return inner.diagonal(dim1=-2, dim2=-1).clone(), changed


_InverseRoot.with_forward = _InverseRootForward
_Solve.with_forward = _SolveForward
_Eigen.with_forward = _EigenForward


def _over_differences(x: Tensor, values: Tensor) -> Tensor:
    """Divide entry ``ij`` by the difference of eigenvalues ``j`` and ``i``; 0 where they tie."""
    differences = values.unsqueeze(-2) - values.unsqueeze(-1)
    apart = differences.detach().abs() > _rounding(values).unsqueeze(-1)
    return torch.where(apart, x / torch.where(apart, differences, 1.0), 0.0)


def _rounding(sizes: Tensor) -> Tensor:
    """Return how far from zero what is zero may be found, beside the largest of some sizes."""
    largest = sizes.detach().abs().amax(dim=-1, keepdim=True)
    return largest * (4 * sizes.shape[-1] ** 0.5 * torch.finfo(sizes.dtype).eps)


def eigenbasis(a: Tensor) -> Tensor:
    """Return orthonormal eigenvectors of a positive semidefinite matrix, the greatest first.

    In the space of the eigenvalue zero no basis is distinguished, and what an algorithm for
    eigenvectors finds there is chance. It is completed from unit vectors instead, so that the
    basis depends smoothly on a matrix of few gradients.
    """
    a = (a + a.mT) / 2
    found = _applied(_Eigen, a) if derivatives_recorded() else decomposed(a)
    values, vectors = (x.flip(-1) for x in found)
    start = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    return _completed(a, vectors, values.detach() > _rounding(values), start)


def power_iterated(a: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the basis after a step of orthogonal iteration, and the order of its columns.

    That is :math:`Q` of :math:`AQ = QR`, the columns by their Rayleigh quotients, the greatest
    first. Where columns of :math:`AQ` depend on those before them, which leaves :math:`Q` open,
    directions of the basis as it was take their place.
    """
    product = a @ q
    order = (q * product).sum(dim=-2).detach().argsort(dim=-1, descending=True, stable=True)
    columns = order.unsqueeze(-2)
    q, product = (x.take_along_dim(columns, dim=-1) for x in (q, product))
    sizes = torch.linalg.vector_norm(product.detach(), dim=-2)
    # a factor for each column leaves Q as it is, and makes for an even R
    scaled = product / torch.where(sizes == 0, 1.0, sizes).unsqueeze(-2)
    found = torch.linalg.qr(scaled.detach())
    good = found.R.diagonal(dim1=-2, dim2=-1).abs() * sizes > _rounding(sizes)
    if _is_known(good) and good.all():
        return (torch.linalg.qr(scaled) if derivatives_recorded() else found).Q, order
    return _completed(a, scaled, good, q), order


def _is_known(x: Tensor) -> bool:
    """Whether a tensor can be read here and now, without waiting for a device."""
    if torch.compiler.is_compiling():
        return False
    traced = get_tracing_state() is not None or len_torch_dispatch_stack() > 0
    return x.is_cpu and not traced and not is_functorch_wrapped_tensor(x)


def _completed(a: Tensor, x: Tensor, good: Tensor, q: Tensor) -> Tensor:
    """Orthonormalize columns one after the other, those that are not good from columns of ``q``.

    Gaussian elimination of the good ones in the basis ``q`` has as many pivots as there are good
    ones; the columns of ``q`` that are none are independent of them. A row of ``a`` that is zero,
    as that of a feature that never occurs, has a column for itself, and exactly so: what rounding
    leaves there would be divided by its own size.
    """
    empty = (a.detach() == 0).all(dim=-1).unsqueeze(-1)
    last = (~good).to(x.dtype).argsort(dim=-1, stable=True).unsqueeze(-2)
    good = good.unsqueeze(-2).take_along_dim(last, dim=-1)
    x = torch.where(empty, 0.0, x.take_along_dim(last, dim=-1))
    factors, swaps, _ = torch.linalg.lu_factor_ex(torch.where(good, q.mT @ x, 0.0).detach())
    pivots = torch.lu_unpack(factors, swaps, unpack_data=False)[0]
    x = torch.where(good, x, q @ pivots)
    apart = ((x == 0) | empty).all(dim=-2, keepdim=True)
    found = torch.where(empty == apart, torch.linalg.qr(x).Q, 0.0)
    return found.take_along_dim(last.argsort(dim=-1), dim=-1)
