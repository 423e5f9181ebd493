"""Add updates to parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.recording import refuse_recorded
from torchopt.base.torch_internals import debug_has_internal_overlap
from torchopt.typing import TensorTree


T = TypeVar("T")


def apply_updates(params: T, updates: TensorTree, *, inplace: bool = True) -> T:
    """Return the parameters plus the updates.

    Args:
        params: Any pytree of tensors.
        updates: What ``update`` returned: the same structure. ``None`` leaves a parameter as it is.
        inplace: ``True`` changes the tensors in ``params`` and returns them. ``False`` makes new
            ones, differentiable in both inputs.

    Raises:
        ValueError: If structures, shapes or devices do not match; nothing has changed then.
        TypeError: If a leaf is no tensor, or an update has a dtype the parameter cannot hold.
        RuntimeError: If ``inplace=True`` and a gradient is being recorded through an input, or a
            parameter cannot be changed in place; nothing has changed then.

    Example:
        >>> import torch, torchopt
        >>> torchopt.apply_updates([torch.ones(2)], [torch.tensor([0.5, -1.0])])
        [tensor([1.5000, 0.0000])]
    """
    leaves, spec = tree.flatten(params)
    additions = tree.flatten_like(updates, params, spec, "updates", "params")
    for index, (p, u) in enumerate(zip(leaves, additions)):
        if p is not None and u is not None:
            _check(params, index, p, u)
    if not inplace:
        new = [p if p is None or u is None else _add(p, u) for p, u in zip(leaves, additions)]
        return tree.unflatten(spec, new)
    refuse_recorded("apply_updates", {"updates": additions}, {"params": leaves})
    changed = [k for k, (p, u) in enumerate(zip(leaves, additions)) if not (p is None or u is None)]
    refuse_unwritable([leaves[k] for k in changed], lambda k: tree.leaf_names(params)[changed[k]])
    with torch.no_grad():
        for k in changed:
            leaves[k].add_(additions[k])
    return params


def refuse_unwritable(params: Sequence[Tensor], name: Callable[[int], str]) -> None:
    """Refuse parameters that no update can change in place, before the first one changes.

    Raises:
        RuntimeError: For an expanded parameter, or one made in inference mode outside of it.
    """
    if torch.compiler.is_compiling():
        return
    for k, p in enumerate(params):
        dense = p.layout != torch.strided or p.is_contiguous()
        if not dense and debug_has_internal_overlap(p) == 1:
            raise RuntimeError(
                f"Parameter {tree.quoted(name(k))} of shape {tuple(p.shape)} is expanded: "
                "several entries are a single memory location, which no update can change by "
                "itself. Give its contiguous() copy."
            )
        if p.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"Parameter {tree.quoted(name(k))} was made under torch.inference_mode(), and "
                "cannot be changed in place outside of it. Give its clone()."
            )


def _check(params: TensorTree, index: int, p: Any, u: Any) -> None:
    fits = isinstance(p, Tensor) and isinstance(u, Tensor) and p.shape == u.shape
    if fits and p.device == u.device and _kind(u) <= _kind(p):
        return
    name = tree.quoted(tree.leaf_names(params)[index])
    for what, value in (("The parameter", p), ("The update of", u)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} {name} must be a tensor or None, got {type(value).__name__}.")
    if p.shape != u.shape:
        raise ValueError(
            f"The update of {name} has shape {tuple(u.shape)}, the parameter {tuple(p.shape)}."
        )
    if p.device != u.device:
        raise ValueError(f"The update of {name} is on {u.device}, the parameter on {p.device}.")
    raise TypeError(
        f"The update of {name} is {u.dtype}, which the parameter {p.dtype} cannot hold."
    )


def _kind(x: Tensor) -> int:
    return 2 if x.is_complex() else int(x.is_floating_point())


def _add(p: Tensor, u: Tensor) -> Tensor:
    return p + (u if u.dtype == p.dtype else u.to(p.dtype))
