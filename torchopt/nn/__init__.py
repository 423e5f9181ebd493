"""Networks: their parameters, snapshots of them, and undoing what happened to them."""

import sys as _sys

from torchopt.base import lazy as _lazy


__getattr__, __dir__, __all__ = _lazy.public(_sys.modules[__name__])
