"""``import TorchOpt`` is ``import torchopt``: the name that scripts for the first TorchOpt use.

One alias file beside the package. Their names differ by more than case (``TorchOpt.py`` and
``torchopt/``), so both can stand in one folder of a file system that ignores case, and Python
compares the case of module names there too.
"""

import sys

import torchopt
import torchopt.base.pytree
import torchopt.transforms.hook


sys.modules[__name__] = torchopt
# `from TorchOpt.optim import ...` would load a second copy of a module that is not entered here.
for _name, _module in list(sys.modules.items()):
    if _name.startswith("torchopt."):
        sys.modules[__name__ + _name.removeprefix("torchopt")] = _module
