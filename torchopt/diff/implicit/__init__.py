"""Derivatives of a solution by the condition that it satisfies, not by the way to it."""

from torchopt.diff.implicit.adjoint import Implicit as Implicit
from torchopt.diff.implicit.decorators import custom_fixed_point as custom_fixed_point
from torchopt.diff.implicit.decorators import custom_root as custom_root
from torchopt.diff.implicit.products import root_jvp as root_jvp
from torchopt.diff.implicit.products import root_vjp as root_vjp
