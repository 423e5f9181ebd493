"""Ways to differentiate an inner problem."""

from torchopt.diff import implicit as implicit
from torchopt.diff import zero_order as zero_order
from torchopt.diff.adjoints.checkpointed import Checkpointed as Checkpointed
from torchopt.diff.adjoints.unrolled import Unrolled as Unrolled
from torchopt.diff.implicit import Implicit as Implicit
from torchopt.diff.implicit import custom_fixed_point as custom_fixed_point
from torchopt.diff.implicit import custom_root as custom_root
from torchopt.diff.implicit import root_jvp as root_jvp
from torchopt.diff.implicit import root_vjp as root_vjp
from torchopt.diff.unrolling import unroll as unroll
