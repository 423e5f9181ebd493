"""Solvers: minimise a function, where a transformation of gradients is given gradients.

A solver calls the function itself, as often as it needs: L-BFGS with line searches, and any
transformation by an adapter.
"""

from torchopt.diff.adjoints.unrolled import Unrolled as Unrolled
from torchopt.solvers.base import Solution as Solution
from torchopt.solvers.base import Solver as Solver
from torchopt.solvers.base import minimize as minimize
from torchopt.solvers.gradient_descent import GradientDescent as GradientDescent
from torchopt.solvers.lbfgs import LBFGS as LBFGS
from torchopt.solvers.line_search import Backtracking as Backtracking
from torchopt.solvers.line_search import StrongWolfe as StrongWolfe
from torchopt.solvers.outcome import Outcome as Outcome
