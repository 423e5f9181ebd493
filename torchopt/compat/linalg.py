"""``torchopt.linalg`` of TorchOpt 0.7.3, by the solvers of today."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.linear_solve import solve_cg, solve_neumann
from torchopt.typing import TensorTree


def _product(a: Union[Tensor, Callable[[TensorTree], TensorTree]]) -> Any:
    return a.mv if isinstance(a, Tensor) and a.dim() == 2 else a


def cg(
    A: Union[Tensor, Callable[[TensorTree], TensorTree]],  # noqa: N803 - as 0.7.3 calls it
    b: TensorTree,
    x0: TensorTree | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,  # noqa: N803
) -> TensorTree:
    """Solve by conjugate gradients: :func:`torchopt.linear_solve.solve_cg`."""
    solver = solve_cg(rtol=rtol, atol=atol, maxiter=maxiter, preconditioner=_product(M))
    return solver(_product(A), b, init=x0)


def ns(
    A: Union[Tensor, Callable[[TensorTree], TensorTree]],  # noqa: N803
    b: TensorTree,
    maxiter: int | None = None,
    *,
    alpha: float | None = None,
) -> TensorTree:
    """Return some terms of a Neumann series: :func:`torchopt.linear_solve.solve_neumann`."""
    terms = 10 if maxiter is None else maxiter
    step = 1.0 if alpha is None else alpha
    return solve_neumann(maxiter=terms, step=step, on_failure="ignore")(_product(A), b)


def ns_inv(A: Tensor, maxiter: int | None = None, *, alpha: float | None = None) -> Tensor:  # noqa: N803
    """Return an approximate inverse by some terms of a Neumann series."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.func.vmap(lambda b: ns(A, b, maxiter, alpha=alpha), out_dims=1)(eye)  # pyright: ignore[reportReturnType]
