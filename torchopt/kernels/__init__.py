"""The fused engine: kernels generated from the rules, in place of chains of torch operators."""

from importlib import import_module as _import_module

from torchopt.core import engine as _engine
from torchopt.kernels import fused as _fused
from torchopt.kernels import inplace as _inplace
from torchopt.kernels.explain import why as why


_fused.for_tracers = lambda: _import_module("torchopt.kernels.library.compiled")
_engine.accelerator = _fused
_engine.in_place_stepper = _inplace.Stepper
