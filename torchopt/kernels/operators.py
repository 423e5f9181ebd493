"""``import torchopt.kernels.operators`` makes the operators of ``torch.ops.torchopt``.

They stand in ``torchopt.kernels.library.operators``.
"""

from torchopt.kernels.library import operators as operators
