"""Ways to differentiate an inner problem.

How to differentiate is an object, handed to the loop: :func:`unroll` takes steps in a row, and its
``adjoint`` says what is kept of them for the derivative, and what is computed again.
"""

import sys as _sys

from torchopt.base import lazy as _lazy


__getattr__, __dir__, __all__ = _lazy.public(_sys.modules[__name__])
