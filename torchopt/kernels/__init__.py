"""The fused engine: kernels generated from the rules, in place of chains of torch operators."""

from torchopt import engine as _engine
from torchopt.kernels import fused as _fused
from torchopt.kernels.explain import why as why


_engine.accelerator = _fused
