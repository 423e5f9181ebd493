"""Stabilised biconjugate gradients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.linear_solve.outcome import Outcome, code_of
from torchopt.linear_solve.solver import LinearSolver, OnFailure
from torchopt.linear_solve.system import Cycle, Solved, System, restarted
from torchopt.linear_solve.vectors import anything, dot, norm, over
from torchopt.typing import TensorTree


@dataclass(frozen=True, kw_only=True)
class BiCGStab(LinearSolver):
    """Stabilised biconjugate gradients; made by :func:`solve_bicgstab`."""

    def run(self, system: System) -> Solved:
        """Iterate, from the true residual again and again."""
        tries = itertools.count()

        def cycle(r: Tensor, tol: Tensor, going: Tensor, most: int) -> Cycle:
            shadow = r
            if next(tries) % 2:  # from the same point the same shadow would lead the same way
                turned = system.product(r)
                shadow = r + over(norm(r), norm(turned)) * turned
            return biconjugate_gradients(system, r, shadow, tol, going, most)

        return restarted(system, cycle, cycles=5)


def biconjugate_gradients(
    system: System, r: Tensor, shadow: Tensor, tol: Tensor, going: Tensor, most: int
) -> Cycle:
    r"""Iterate for :math:`A d = r`, with a shadow :math:`\hat r`, such as the first residual.

    .. math::
        v &= A M p, \quad \alpha = \frac{\hat r^T r}{\hat r^T v}, \quad s = r - \alpha v, \quad
        t = A M s, \quad \omega = \frac{t^T s}{t^T t} \\
        d &\leftarrow d + M (\alpha p + \omega s), \quad r' = s - \omega t, \quad
        p \leftarrow r' + \frac{\hat r^T r'}{\hat r^T r} \frac{\alpha}{\omega} (p - \omega v)

    The way is not monotone in any norm that is known: the point of the least residual on it is
    returned, after few iterations perhaps the start. Where a divisor is zero within
    rounding, the iterations end; from the point that was reached they begin with another shadow.

    Reference:
        van der Vorst, Bi-CGSTAB, SIAM Journal on Scientific and Statistical Computing 13, 1992.
    """
    d, p = torch.zeros_like(r), r
    rho, best, least = dot(shadow, r), d, norm(r)
    reason, iterations, eps = system.zeros(), system.zeros(), torch.finfo(r.dtype).eps
    broken = system.none()
    for _ in range(most):
        going = going & (norm(r) > tol) & ~broken & torch.isfinite(rho)
        if not anything(going):
            break
        v = system.product(system.precondition(p))
        divisor = dot(shadow, v)
        finite = torch.isfinite(norm(v))
        reason = torch.where(going & ~finite, code_of(Outcome.NON_FINITE), reason)
        bad = (divisor.abs() <= eps * norm(shadow) * norm(v)) | ~finite
        alpha = over(rho, divisor)
        s = r - alpha * v
        t = system.product(system.precondition(s))
        omega = over(dot(t, s), dot(t, t))
        new_d = d + alpha * p + omega * s
        new_r = s - omega * t
        new_rho = dot(shadow, new_r)
        taken = going & ~bad
        iterations = iterations + taken
        stalled = (new_rho.abs() <= eps * norm(shadow) * norm(new_r)) | (omega == 0)
        broken = broken | (going & bad) | (taken & stalled)
        p = torch.where(taken, new_r + over(new_rho * alpha, rho * omega) * (p - omega * v), p)
        d, r = torch.where(taken, new_d, d), torch.where(taken, new_r, r)
        rho = torch.where(taken, new_rho, rho)
        better = taken & (norm(r) < least)
        best, least = torch.where(better, d, best), torch.where(better, norm(r), least)
    reason = torch.where(broken & (reason == 0), code_of(Outcome.BREAKDOWN), reason)
    return Cycle(system.precondition(best), iterations, system.zeros(), reason)


def solve_bicgstab(
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    maxiter: int | None = None,
    ridge: Union[float, Tensor, None] = None,
    preconditioner: Any = None,
    init: TensorTree | None = None,
    on_failure: OnFailure = "warn",
) -> BiCGStab:
    r"""Solve any systems by stabilised biconjugate gradients.

    .. math:: (A + \lambda I)\, x = b

    Two products for each iteration, eight vectors of memory, no adjoint. It may break down or
    stagnate on well-conditioned systems too (and says so); :func:`solve_gmres` is the safer choice
    where its memory is there.

    Args:
        rtol: Solved where :math:`\lVert b - A x \rVert_2 \le \max(\text{rtol}\, \lVert b \rVert_2,
            \text{atol})`, as for :func:`solve_cg`.
        atol: Absolute tolerance, in the units of ``b``.
        maxiter: Most iterations; ``None`` as for :func:`solve_cg`.
        ridge: :math:`\lambda`, a number >= 0 or a 0-d tensor, which may be learned.
        preconditioner: An operator that approximates :math:`A^{-1}`; applied from the right.
        init: Where to begin if a call says nothing.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` where it was not solved.

    Returns:
        ``solver(matvec, b, *, init=None) -> x``; see :class:`LinearSolver`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> A = torch.tensor([[3.0, 2.0], [-1.0, 2.0]])
        >>> x = torchopt.linear_solve.solve_bicgstab()(lambda v: A @ v, torch.tensor([5.0, 1.0]))
        >>> torch.allclose(x, torch.ones(2), atol=1e-4)
        True

    Reference:
        van der Vorst, Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the solution
        of nonsymmetric linear systems, SIAM Journal on Scientific and Statistical Computing 13,
        1992.
    """
    return BiCGStab(
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        ridge=ridge,
        preconditioner=preconditioner,
        init=init,
        on_failure=on_failure,
    )
