"""The fused engine: kernels generated from the rules, in place of chains of torch operators."""

import sys as _sys
from typing import Any as _Any

from torchopt.base import lazy as _lazy
from torchopt.core import engine as _engine
from torchopt.kernels import fused as _fused
from torchopt.kernels import inplace as _inplace
from torchopt.kernels.explain import why as why


def _for_tracers() -> _Any:
    from torchopt.kernels.library import compiled  # with the compiler, which is large

    return compiled


_fused.for_tracers = _for_tracers
_engine.accelerator = _fused
_engine.in_place_stepper = _inplace.Stepper
__dir__ = _lazy.shown(_sys.modules[__name__])
