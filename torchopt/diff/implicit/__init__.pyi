# The public names, which __init__.py imports when they are first asked for.

from torchopt.diff.implicit.adjoint import Implicit as Implicit
from torchopt.diff.implicit.decorators import custom_fixed_point as custom_fixed_point
from torchopt.diff.implicit.decorators import custom_root as custom_root
from torchopt.diff.implicit.products import root_jvp as root_jvp
from torchopt.diff.implicit.products import root_vjp as root_vjp
