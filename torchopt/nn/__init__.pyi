# The public names, which __init__.py imports when they are first asked for.

from torchopt.nn.implicit_module import ImplicitMetaGradientModule as ImplicitMetaGradientModule
from torchopt.nn.meta_module import MetaGradientModule as MetaGradientModule
from torchopt.nn.zero_order import ZeroOrderGradientModule as ZeroOrderGradientModule
