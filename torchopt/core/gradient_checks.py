"""Whether gradients fit their parameters, one by one; whether parameters and updates fit the rule.

In the usual case they do at one glance: ``engine.common_of``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.base.numerics import HALF
from torchopt.core.protocols import CallLike, TransformationLike


def check_gradients(tx: TransformationLike, call: CallLike, index: Sequence[int]) -> None:
    """Refuse gradients that do not fit their parameters, or their state.

    Raises:
        TypeError: For what is no tensor, for a dtype, and for a layout without a rule.
        ValueError: For a shape, a device, or a parameter that is missing.
    """
    for i in index:
        g, p = call.g[i], call.p[i]
        if not isinstance(g, Tensor):
            name = tree.quoted(call.names()[i])
            raise TypeError(
                f"The gradient of {name} must be a tensor or None, got {type(g).__name__}."
                f"{misuse.advice_for_leaf(g)}"
            )
        if g.layout != torch.strided:
            _check_sparse(tx, call, i)
        elif not (g.is_floating_point() or g.is_complex()):
            name = tree.quoted(call.names()[i])
            raise TypeError(
                f"The gradient of {name} must be floating-point or complex, got {g.dtype}."
            )
        if p is None and any(x is not None for x in call.p):
            name = tree.quoted(call.names()[i])
            raise ValueError(f"{name} has a gradient but its parameter is None.")
        if p is not None:
            _check_same("parameter", g, p, call, i)
        else:
            for name, column in call.slots.items():
                slot = tx.plan.slot_of[name]
                if column[i] is not None and slot.shape is None and slot.dtype is None:
                    _check_same("state", g, column[i], call, i)
                    break
        if g.is_complex():
            _check_complex(tx, call, i)


def _check_complex(tx: TransformationLike, call: CallLike, i: int) -> None:
    for part in tx.plan.parts:
        if not part.accepts_complex:
            raise TypeError(
                f"The gradient of {tree.quoted(call.names()[i])} is complex, and "
                f"{type(part).__name__} has no complex rule: optimize torch.view_as_real of it."
            )


def _check_sparse(tx: TransformationLike, call: CallLike, i: int) -> None:
    for position, part in enumerate(tx.plan.parts):
        (row,) = tx.plan.rows_of(position, [call.hyper[i]])
        if not part.takes_sparse(**row):
            raise TypeError(
                f"The gradient of {tree.quoted(call.names()[i])} is sparse ({call.g[i].layout}), "
                f"and {type(part).__name__} has no sparse rule. Use to_dense(), or an embedding "
                "with sparse=False; or SGD, Adagrad or SparseAdam, without weight decay."
            )


def _check_same(what: str, g: Tensor, p: Tensor, call: CallLike, i: int) -> None:
    if what == "state":
        same_dtype = g.dtype == p.dtype or g.dtype in HALF
    else:
        same_dtype = g.dtype == p.dtype
    if g.shape == p.shape and same_dtype and g.device == p.device:
        return
    message = (
        f"The gradient of {tree.quoted(call.names()[i])} does not fit its {what}: gradient "
        f"{g.dtype} {tuple(g.shape)} on {g.device}, {what} {p.dtype} {tuple(p.shape)} on "
        f"{p.device}."
    )
    raise (ValueError if same_dtype else TypeError)(message)


def refuse_update(tx: TransformationLike, update: object, g: Tensor, name: str) -> None:
    """Refuse what a rule returned as the update for a gradient.

    Raises:
        ValueError: Saying what it is and what it should be.
    """
    given = f"shape {tuple(update.shape)}" if isinstance(update, Tensor) else misuse.short(update)
    raise ValueError(
        f"{misuse.clipped(repr(tx))} returned an update of {given} for the gradient of {name}, "
        f"whose shape is {tuple(g.shape)}. A rule must return a tensor of that shape."
    )


def refuse_parameters(tx: TransformationLike, named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters that a part of a transformation has no rule for.

    Raises:
        ValueError: Saying why, and what to do.
    """
    selective = [part for part in tx.plan.parts if part.is_selective]
    for name, param in named if selective else ():
        for part in selective:
            if reason := part.refuses(param):
                raise ValueError(f"{tree.quoted(name)} {reason}")
