"""``import TorchOpt`` is ``import torchopt``: the name that scripts for the first TorchOpt use.

On a file system that ignores case this file and the package ``torchopt`` do not collide, because
a package directory is found before a module file; either way the same module object is returned.
"""

import sys

import torchopt


sys.modules[__name__] = torchopt
