"""Ways to differentiate an inner problem."""

from torchopt.diff.accumulating import accumulate as accumulate
from torchopt.diff.adjoints.checkpointed import Checkpointed as Checkpointed
from torchopt.diff.adjoints.unrolled import Unrolled as Unrolled
from torchopt.diff.unrolling import unroll as unroll
