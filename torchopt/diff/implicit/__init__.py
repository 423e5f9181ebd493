"""Derivatives of a solution by the condition that it satisfies, not by the way to it."""

import sys as _sys

from torchopt.base import lazy as _lazy


__getattr__, __dir__, __all__ = _lazy.public(_sys.modules[__name__])
