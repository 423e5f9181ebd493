"""What a linear solver is: options, a call, a result that can be asked, and the derivative."""

from __future__ import annotations

import abc
import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Union

import torch
from torch import Tensor
from typing_extensions import TypeAlias

from torchopt.base.calling import level_of_user
from torchopt.base.eager import eager
from torchopt.base.misuse.given import given
from torchopt.linear_solve.derivative import Job, solve_flat
from torchopt.linear_solve.operator import as_operator
from torchopt.linear_solve.outcome import (
    CODES,
    LinearSolveError,
    LinearSolveWarning,
    Outcome,
)
from torchopt.linear_solve.product import Product
from torchopt.linear_solve.system import Remembering, Solved, System
from torchopt.linear_solve.vectors import Layout, norm
from torchopt.typing import TensorTree


#: What happens when a system was not solved.
OnFailure: TypeAlias = Literal["warn", "raise", "ignore"]


@dataclass(frozen=True, eq=False)
class LinearSolution:
    """What :meth:`LinearSolver.solve` returns.

    Example:
        >>> import torch, torchopt
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> b = torch.tensor([3.0, 4.0])
        >>> solution = torchopt.linear_solve.solve_cg().solve(lambda v: A @ v, b)
        >>> solution.x, solution.iterations, solution.outcome
        (tensor([1.0000, 1.0000]), 2, <Outcome.CONVERGED>)
    """

    x: TensorTree
    iterations: int  #: The most of all systems of a batch.
    residual: float  #: The Euclidean norm of ``b - A x``, the largest of a batch.
    outcome: Outcome  #: ``CONVERGED``, or that of the first system that was not solved.
    #: Of each system of a batch (under ``torch.func.vmap``); one row otherwise.
    all_iterations: Tensor = dataclasses.field(repr=False)
    all_residuals: Tensor = dataclasses.field(repr=False)
    all_outcomes: tuple[Outcome, ...] = dataclasses.field(repr=False)
    #: The name of the function that makes the solver that was taken.
    method: str = dataclasses.field(default="", repr=False)
    #: What an algorithm reports besides, such as the size of the last term of a series.
    extra: Tensor | None = dataclasses.field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class LinearSolver(abc.ABC):
    r"""Solves :math:`A x = b` for an operator that is known by its products.

    ``solver(matvec, b)`` returns ``x``; :meth:`solve` also tells how it went. A subclass is a
    frozen dataclass that defines :meth:`run` over flat vectors.

    The solution is an operation of its own: its derivative is that of the solution of the system,
    by one more solve, and not that of the iterations,

    .. math:: \dot x = A^{-1} (\dot b - \dot A x), \qquad
        \bar b = A^{-H} \bar x, \quad \bar A = -\bar b\, x^H

    in ``b`` and in all tensors that the operator depends on, of any order, in forward mode (one
    level of it) and under ``torch.func.grad`` and ``torch.func.vmap``, where each system of a batch
    ends by itself. The start and the preconditioner have derivative zero.

    Example:
        >>> import torch, torchopt
        >>> solver = torchopt.linear_solve.solve_cg()
        >>> a = torch.tensor(2.0, requires_grad=True)
        >>> x = solver(lambda v: {"w": a * v["w"]}, {"w": torch.ones(2)})
        >>> torch.autograd.grad(x["w"].sum(), a)
        (tensor(-0.5000),)
    """

    rtol: float | None = None
    atol: float = 0.0
    maxiter: int | None = None
    ridge: Union[float, Tensor, None] = None
    preconditioner: Any = None
    init: TensorTree | None = None
    on_failure: OnFailure = "warn"

    #: Whether it goes from a start to the solution step by step.
    iterates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "ridge"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and name == "ridge" and value.numel() == 1:
                continue
            if value is None and name != "atol":
                continue
            _check_number(name, value)
        if self.maxiter is not None:
            check_count("maxiter", self.maxiter, 0)
        if self.on_failure not in ("warn", "raise", "ignore"):
            raise ValueError(
                f"on_failure must be 'warn', 'raise' or 'ignore', got {self.on_failure!r}."
            )
        if self.preconditioner is not None:
            as_operator(self.preconditioner, "preconditioner")

    @abc.abstractmethod
    def run(self, system: System) -> Solved:
        """Solve systems of flat vectors."""

    def __call__(self, matvec: Any, b: TensorTree, *, init: TensorTree | None = None) -> TensorTree:
        """Return ``x``, a tree like ``b``.

        Args:
            matvec: The operator: a function of a tree like ``b``, or a :class:`LinearOperator`.
            b: The right-hand side: any tree of floating-point or complex tensors.
            init: Where to begin, a tree like ``b``; ``None`` for zero.

        Raises:
            LinearSolveError: If it was not solved, under ``on_failure="raise"``.
            TypeError: If ``matvec`` is no function, or a leaf no tensor of inexact numbers.
            ValueError: If ``matvec(b)`` or ``init`` is not like ``b``.
        """
        return self.solve(matvec, b, init=init).x

    @eager
    def solve(
        self,
        matvec: Any,
        b: TensorTree,
        init: TensorTree | None = None,
        *,
        memory: Remembering | None = None,
    ) -> LinearSolution:
        """Return ``x`` with iterations, residual and outcome; arguments as in a call.

        ``memory`` is that of a :class:`WarmStart`.
        """
        operator = as_operator(matvec)
        layout = Layout(b)
        product = Product.of(operator, layout, differentiated=True)
        product, right = self.prepared(product, layout.flatten(b, "b"))
        precondition = None
        if self.preconditioner is not None:
            precondition = Product.of(as_operator(self.preconditioner), layout)
        init = self.init if init is None else init
        start = None if init is None else layout.flatten(init, "init").detach()
        job = Job(self, product, precondition, layout.is_real, layout.rtol, memory=memory)
        x = solve_flat(job, right, start)
        report = job.report
        codes = [CODES[k - 1] for k in report["codes"]]
        failed = [outcome for outcome in codes if not outcome.success]
        return LinearSolution(
            layout.unflatten(x),
            report["most"],
            report["largest"],
            failed[0] if failed else Outcome.CONVERGED,
            report["iterations"],
            report["residual"],
            tuple(codes),
            report["method"] or self.title,
            report["extra"],
        )

    def prepared(self, product: Product, b: Tensor) -> tuple[Product, Tensor]:
        """Return the system that is solved instead of a given one."""
        return (product if self.ridge is None else product.shifted(self.ridge)), b

    def limits(self, b: Tensor, rtol: float) -> tuple[Tensor, int]:
        """Return the largest norms of residuals, and the most iterations."""
        rtol = rtol if self.rtol is None else self.rtol
        most = max(5000, min(10 * b.shape[-1], 20000)) if self.maxiter is None else self.maxiter
        size = norm(b)
        size = torch.where(torch.isfinite(size), size, 0.0)  # a residual of inf is within no limit
        return torch.clamp_min(rtol * size, self.atol), most

    def judge(self, report: dict[str, Any], tol: Tensor, of: str) -> None:
        """Warn or raise where a system was not solved, by choice.

        Raises:
            LinearSolveError: Under ``on_failure="raise"``.
        """
        outcomes = [CODES[code - 1] for code in report["codes"]]
        wrong = [k for k, outcome in enumerate(outcomes) if not outcome.success]
        if self.on_failure == "ignore" or not wrong:
            return
        k, name = wrong[0], report["method"] or self.title
        outcome = outcomes[k]
        count = f"{len(wrong)} of {len(outcomes)} systems" if len(outcomes) > 1 else "A system"
        residual = float(report["residual"].reshape(-1)[k])
        message = (
            f"{count}{of} not solved by {name}: {outcome.name.lower()} "
            f"after {int(report['iterations'].reshape(-1)[k])} iterations, with a residual of "
            f"{residual:.3g} instead of at most {float(tol.reshape(-1)[k]):.3g}. {outcome.text}"
        )
        if self.on_failure == "raise":
            raise LinearSolveError(message, outcome)
        warnings.warn(message, LinearSolveWarning, stacklevel=level_of_user())

    @property
    def title(self) -> str:
        """The name of the function that makes it."""
        return f"solve_{type(self).__name__.lower()}"


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {given(value)}.")
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0, got {value}.")


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no integer of at least ``least``.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is too small.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {given(value)}.")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}.")
