"""Ways to differentiate an inner problem.

How to differentiate is an object, handed to the loop: :func:`unroll` takes steps in a row, and its
``adjoint`` says what is kept of them for the derivative, and what is computed again.
"""

from torchopt.diff.accumulating import accumulate as accumulate
from torchopt.diff.adjoints.auto import Auto as Auto
from torchopt.diff.adjoints.checkpointed import Checkpointed as Checkpointed
from torchopt.diff.adjoints.first_order import FirstOrder as FirstOrder
from torchopt.diff.adjoints.forward import Forward as Forward
from torchopt.diff.adjoints.mixed import Mixed as Mixed
from torchopt.diff.adjoints.mixed import grad_and_value as grad_and_value
from torchopt.diff.adjoints.offloaded import Offloaded as Offloaded
from torchopt.diff.adjoints.truncated import Truncated as Truncated
from torchopt.diff.adjoints.unrolled import Unrolled as Unrolled
from torchopt.diff.unrolling import unroll as unroll
