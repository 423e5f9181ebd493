"""Gradients of a function from its values alone, by random perturbations of its arguments.

The module can be called like the decorator in it, as in TorchOpt 0.7.3.
"""

import sys as _sys
from types import ModuleType as _ModuleType
from typing import Any as _Any

from torchopt.diff.zero_order.evolution import es_gradient as es_gradient
from torchopt.diff.zero_order.evolution import evolution_strategies as evolution_strategies
from torchopt.diff.zero_order.smoothing import zero_order as zero_order


class _CallableModule(_ModuleType):
    def __call__(self, *args: _Any, **kwargs: _Any) -> _Any:
        return zero_order(*args, **kwargs)


_sys.modules[__name__].__class__ = _CallableModule
