"""Linear systems for the tests of their solvers: matrices by condition, and a row per solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt import linear_solve


F64: dict[str, Any] = {"dtype": torch.float64}


def orthogonal(n: int, complex_: bool = False) -> Tensor:
    dtype = torch.complex128 if complex_ else torch.float64
    return torch.linalg.qr(torch.randn(n, n, dtype=dtype)).Q


def spectrum(n: int, condition: float) -> Tensor:
    return torch.logspace(0, -float(torch.tensor(condition).log10()), n, **F64)


def definite(n: int, condition: float = 10.0, complex_: bool = False) -> Tensor:
    """Return a symmetric (Hermitian) positive definite matrix."""
    q = orthogonal(n, complex_)
    return q * spectrum(n, condition) @ q.mH


def indefinite(n: int, condition: float = 10.0, complex_: bool = False) -> Tensor:
    """Return a symmetric (Hermitian) matrix with eigenvalues of both signs."""
    q = orthogonal(n, complex_)
    signs = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
    return q * (spectrum(n, condition) * signs) @ q.mH


def general(n: int, condition: float = 10.0, complex_: bool = False) -> Tensor:
    """Return a matrix that is not symmetric; not normal either."""
    return orthogonal(n, complex_) * spectrum(n, condition) @ orthogonal(n, complex_).mH


def shifted(n: int, condition: float = 10.0, complex_: bool = False) -> Tensor:
    """Return a matrix that is not symmetric, with eigenvalues around one."""
    eye = torch.eye(n, **F64)
    return eye + 0.5 * general(n, condition, complex_)


@dataclass(frozen=True)
class Row:
    """What a solver is made by, and what it needs."""

    make: Callable[..., Any]
    of: Callable[..., Tensor]  # the least structured matrices it solves
    iterates: bool = True
    precise: float = 1.0  # the error over the residual's tolerance that it may have

    @property
    def name(self) -> str:
        return self.make.__name__


ROWS = [
    Row(linear_solve.solve_cg, definite),
    Row(linear_solve.solve_normal_cg, general),
    Row(linear_solve.solve_minres, indefinite),
    Row(linear_solve.solve_gmres, general),
    Row(linear_solve.solve_bicgstab, shifted),
    Row(linear_solve.solve_neumann, definite),
    Row(linear_solve.solve_lu, general, iterates=False),
    Row(linear_solve.solve_inv, general, iterates=False),
    Row(linear_solve.solve_qr, general, iterates=False),
    Row(linear_solve.solve_cholesky, definite, iterates=False),
    Row(linear_solve.solve_auto, general, iterates=False),
]
IDS = [row.name for row in ROWS]
KRYLOV = [row for row in ROWS if row.iterates and row.make is not linear_solve.solve_neumann]


def made(row: Row, **options: Any) -> Any:
    """Return a solver whose failures are errors."""
    return row.make(**{"on_failure": "raise", **options})


def product(a: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: a @ v
