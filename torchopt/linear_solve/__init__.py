"""Linear systems with operators that are known by their products, and their derivatives.

``solver = solve_cg(rtol=1e-8)`` makes a solver, ``x = solver(matvec, b)`` solves; ``matvec`` takes
and returns trees like ``b``.
"""

import sys as _sys

from torchopt.base import lazy as _lazy
from torchopt.linear_solve.auto import solve_auto as solve_auto
from torchopt.linear_solve.bicgstab import solve_bicgstab as solve_bicgstab
from torchopt.linear_solve.cg import solve_cg as solve_cg
from torchopt.linear_solve.cg import solve_normal_cg as solve_normal_cg
from torchopt.linear_solve.dense import solve_cholesky as solve_cholesky
from torchopt.linear_solve.dense import solve_inv as solve_inv
from torchopt.linear_solve.dense import solve_lu as solve_lu
from torchopt.linear_solve.dense import solve_qr as solve_qr
from torchopt.linear_solve.gmres import solve_gmres as solve_gmres
from torchopt.linear_solve.minres import solve_minres as solve_minres
from torchopt.linear_solve.neumann import solve_neumann as solve_neumann
from torchopt.linear_solve.nystrom import nystrom_preconditioner as nystrom_preconditioner
from torchopt.linear_solve.nystrom import solve_nystrom as solve_nystrom
from torchopt.linear_solve.operator import LinearOperator as LinearOperator
from torchopt.linear_solve.outcome import LinearSolveError as LinearSolveError
from torchopt.linear_solve.outcome import LinearSolveWarning as LinearSolveWarning
from torchopt.linear_solve.outcome import Outcome as Outcome
from torchopt.linear_solve.solver import LinearSolution as LinearSolution
from torchopt.linear_solve.solver import LinearSolver as LinearSolver
from torchopt.linear_solve.warm_start import WarmStart as WarmStart


__dir__ = _lazy.shown(_sys.modules[__name__])
