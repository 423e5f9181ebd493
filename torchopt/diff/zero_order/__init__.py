"""Gradients of a function from its values alone, by random perturbations of its arguments.

The module can be called like the decorator in it, as in TorchOpt 0.7.3.
"""

import sys as _sys
from types import ModuleType as _ModuleType
from typing import Any as _Any

from torchopt.base import lazy as _lazy


class _CallableModule(_ModuleType):
    def __call__(self, *args: _Any, **kwargs: _Any) -> _Any:
        return self.zero_order(*args, **kwargs)


# Imported when asked for: torch.distributions takes as long to import as the whole package.
_sys.modules[__name__].__class__ = _CallableModule
__getattr__, __dir__, __all__ = _lazy.public(_sys.modules[__name__])
