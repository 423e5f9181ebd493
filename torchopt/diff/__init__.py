"""Ways to differentiate an inner problem."""

from torchopt.diff import zero_order as zero_order
