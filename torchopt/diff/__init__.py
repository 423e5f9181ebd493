"""Ways to differentiate an inner problem."""

from torchopt.diff import implicit as implicit
from torchopt.diff.implicit import Implicit as Implicit
from torchopt.diff.implicit import custom_fixed_point as custom_fixed_point
from torchopt.diff.implicit import custom_root as custom_root
from torchopt.diff.implicit import root_jvp as root_jvp
from torchopt.diff.implicit import root_vjp as root_vjp
