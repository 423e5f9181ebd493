"""Add updates to parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from torchopt import tree
from torchopt.recording import refuse_recorded
from torchopt.typing import TensorTree


def apply_updates(params: TensorTree, updates: TensorTree, *, inplace: bool = True) -> TensorTree:
    """Return the parameters plus the updates.

    Args:
        params: Any pytree of tensors.
        updates: What ``update`` returned: the same structure. ``None`` leaves a parameter as it is.
        inplace: ``True`` changes the tensors in ``params`` and returns them. ``False`` makes new
            ones, differentiable in both inputs.

    Raises:
        ValueError: If structures or shapes do not match; nothing has changed then.
        RuntimeError: If ``inplace=True`` and a gradient is being recorded through an input.

    Example:
        >>> import torch, torchopt
        >>> torchopt.apply_updates([torch.ones(2)], [torch.tensor([0.5, -1.0])])
        [tensor([1.5000, 0.0000])]
    """
    leaves, spec = tree.flatten(params)
    additions = tree.flatten_like(updates, params, spec, "updates", "params")
    pairs = [(p, u) for p, u in zip(leaves, additions) if p is not None and u is not None]
    for index, (p, u) in enumerate(zip(leaves, additions)):
        if isinstance(p, Tensor) and isinstance(u, Tensor) and p.shape != u.shape:
            name = tree.quoted(tree.leaf_names(params)[index])
            raise ValueError(
                f"The update of {name} has shape {tuple(u.shape)}, the parameter {tuple(p.shape)}."
            )
    if not inplace:
        new = [p if p is None or u is None else _add(p, u) for p, u in zip(leaves, additions)]
        return tree.unflatten(spec, new)
    refuse_recorded("apply_updates", {"updates": additions}, {"params": leaves})
    with torch.no_grad():
        for p, u in pairs:
            p.add_(u)
    return params


def _add(p: Tensor, u: Tensor) -> Tensor:
    return p + (u if u.dtype == p.dtype else u.to(p.dtype))
