"""Networks: their parameters, snapshots of them, and undoing what happened to them."""

from torchopt.nn.zero_order import ZeroOrderGradientModule as ZeroOrderGradientModule
