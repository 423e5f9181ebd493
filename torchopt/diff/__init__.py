"""Ways to differentiate an inner problem."""

from torchopt.diff import zero_order as zero_order
from torchopt.diff.adjoints.checkpointed import Checkpointed as Checkpointed
from torchopt.diff.adjoints.unrolled import Unrolled as Unrolled
from torchopt.diff.unrolling import unroll as unroll
