# The public names, which __init__.py imports when they are first asked for.

from torchopt.diff.zero_order.evolution import es_gradient as es_gradient
from torchopt.diff.zero_order.evolution import evolution_strategies as evolution_strategies
from torchopt.diff.zero_order.smoothing import zero_order as zero_order
