# The public names, which __init__.py imports when they are first asked for.

from torchopt.diff import implicit as implicit
from torchopt.diff import zero_order as zero_order
from torchopt.diff.adjoints.auto import Auto as Auto
from torchopt.diff.adjoints.checkpointed import Checkpointed as Checkpointed
from torchopt.diff.adjoints.first_order import FirstOrder as FirstOrder
from torchopt.diff.adjoints.forward import Forward as Forward
from torchopt.diff.adjoints.mixed import grad_and_value as grad_and_value
from torchopt.diff.adjoints.mixed import Mixed as Mixed
from torchopt.diff.adjoints.offloaded import Offloaded as Offloaded
from torchopt.diff.adjoints.truncated import Truncated as Truncated
from torchopt.diff.adjoints.unrolled import Unrolled as Unrolled
from torchopt.diff.estimates import FiniteDifference as FiniteDifference
from torchopt.diff.estimates import Neumann as Neumann
from torchopt.diff.estimates import SAMA as SAMA
from torchopt.diff.estimates import T1T2 as T1T2
from torchopt.diff.hypergradients import hypergradient as hypergradient
from torchopt.diff.implicit.adjoint import Implicit as Implicit
from torchopt.diff.implicit.decorators import custom_fixed_point as custom_fixed_point
from torchopt.diff.implicit.decorators import custom_root as custom_root
from torchopt.diff.implicit.products import root_jvp as root_jvp
from torchopt.diff.implicit.products import root_vjp as root_vjp
from torchopt.diff.accumulating import accumulate as accumulate
from torchopt.diff.unrolling import unroll as unroll
