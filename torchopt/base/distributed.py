"""Tensors that are spread over processes (``DTensor``): what a rule of a whole tensor asks of them.

Most operations are right for them as they are, and so are most rules. Nothing here needs
``torch.distributed``, which a build of torch may lack, and which takes long to import: that a tensor
is spread is told by what it has.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_spread(x: Any) -> bool:
    """Whether something is a tensor that is spread over processes."""
    return type(x) is not Tensor and hasattr(x, "full_tensor") and hasattr(x, "placements")


def whole(x: Any) -> Any:
    """Return a tensor as every process can have it; what is no ``DTensor`` as it is.

    Of a 0-d one: plain and distributed tensors, or those of two meshes, cannot be added otherwise.
    """
    return x.full_tensor() if is_spread(x) else x


def spread_as(x: Tensor, like: Any) -> Tensor:
    """Return a tensor that all processes have, of which each keeps the part that it has of another.

    Nothing is sent for it.
    """
    if not is_spread(like) or is_spread(x):
        return x
    everywhere = type(like).from_local(x, like.device_mesh)  # replicated, if not told otherwise
    return everywhere.redistribute(placements=like.placements)
