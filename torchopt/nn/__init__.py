"""Networks: their parameters, snapshots of them, and undoing what happened to them."""

from torchopt.nn.implicit_module import ImplicitMetaGradientModule as ImplicitMetaGradientModule
from torchopt.nn.meta_module import MetaGradientModule as MetaGradientModule
