"""``import TorchOpt`` is ``import torchopt``: the name that scripts for the first TorchOpt use.

One alias file beside the package. Their names differ by more than case (``TorchOpt.py`` and
``torchopt/``), so both can stand in one folder of a file system that ignores case, and Python
compares the case of module names there too.
"""

import sys

import torchopt


sys.modules[__name__] = torchopt
