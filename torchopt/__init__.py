"""TorchOpt: functional optimization and gradient-based meta-learning with PyTorch.

One definition of each optimizer has three APIs: functional (:func:`adam`), object-oriented
(:class:`Adam`, a real ``torch.optim.Optimizer``) and differentiable (:class:`MetaAdam`).
"""

import sys as _sys

from torchopt import compat as _compat
from torchopt import kernels as kernels  # makes the engine known to the mathematics
from torchopt.base import lazy as _lazy
from torchopt.version import __version__ as __version__


_public = _lazy.names_of_stub(__name__)
__all__ = list(_public.places)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _public.places:
        return _compat.look_up(_sys.modules[__name__], name)
    value = globals()[name] = _lazy.imported(*_public.places[name])
    return value


def __dir__() -> list[str]:
    return list(_public.shown)


_compat.install()
