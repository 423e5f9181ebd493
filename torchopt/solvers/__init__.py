"""Solvers: minimise functions, and find roots, fixed points and least squares.

A solver calls the function itself, as often as it needs. How the solution is differentiated is an
object of its own: implicitly, by recording the iterations, or not at all.
"""

import sys as _sys

from torchopt.base import lazy as _lazy
from torchopt.diff.adjoints.unrolled import Unrolled as Unrolled
from torchopt.solvers.base import Solution as Solution
from torchopt.solvers.base import Solver as Solver
from torchopt.solvers.base import minimize as minimize
from torchopt.solvers.bisection import Bisection as Bisection
from torchopt.solvers.broyden import Broyden as Broyden
from torchopt.solvers.fixed_points import Anderson as Anderson
from torchopt.solvers.fixed_points import FixedPointIteration as FixedPointIteration
from torchopt.solvers.gauss_newton import GaussNewton as GaussNewton
from torchopt.solvers.gradient_descent import GradientDescent as GradientDescent
from torchopt.solvers.lbfgs import LBFGS as LBFGS
from torchopt.solvers.least_squares import least_squares as least_squares
from torchopt.solvers.levenberg_marquardt import LevenbergMarquardt as LevenbergMarquardt
from torchopt.solvers.line_search import Backtracking as Backtracking
from torchopt.solvers.line_search import StrongWolfe as StrongWolfe
from torchopt.solvers.newton import Newton as Newton
from torchopt.solvers.outcome import Outcome as Outcome
from torchopt.solvers.roots import RootSolver as RootSolver
from torchopt.solvers.roots import find_root as find_root
from torchopt.solvers.roots import fixed_point as fixed_point
from torchopt.solvers.squares import LeastSquaresSolver as LeastSquaresSolver


__dir__ = _lazy.shown(_sys.modules[__name__])
