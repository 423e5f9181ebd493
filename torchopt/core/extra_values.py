"""What a call is given besides gradients: the value of the loss, an estimate of curvature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from torchopt.base import misuse
from torchopt.base.distributed import mean_of_processes
from torchopt.core.engine import Leaves
from torchopt.core.protocols import TransformationLike
from torchopt.core.resolving import match_by_name


def check_extra(tx: TransformationLike, extra: Mapping[str, Any], owner: str) -> None:
    """Refuse extra values that nothing reads, such as a misspelt argument.

    Raises:
        TypeError: Naming the first one, and those that are read.
    """
    reads = tx.plan.reads
    for name in extra:
        if name not in reads and "*" not in reads:
            known = f"only {sorted(reads)}" if reads else "no such value"
            raise TypeError(
                f"{owner}.step got an unexpected argument {name!r}: "
                f"{misuse.clipped(repr(tx))} reads {known}."
            )


def agreed(reads: Iterable[str], params: Iterable[Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return extra values that are the same for all processes that parameters are spread over.

    Each has the loss of its own part of the batch; where it is read, their mean is taken.
    """
    if "value" in extra and not {"value", "*"}.isdisjoint(reads):
        return {**extra, "value": mean_of_processes(extra["value"], params)}
    return extra


def tensors_of(leaves: Leaves, name: str) -> list[Tensor]:
    """Return an extra value that has a tensor for each parameter, of those that take part.

    In the functional API it is a tree like the parameters; in the others, as a mask, a list in
    their order, or a dict by name.

    Raises:
        TypeError: If an entry is no tensor.
        ValueError: If parameters or shapes do not match.
    """
    call = leaves.call
    entries = match_by_name(name, call.extra[name], call.names(), call.known)
    found = []
    for position, (i, g) in enumerate(zip(leaves.index, leaves.g)):
        x = entries[i]
        what = f"{name} of {leaves.name(position)}"
        if not isinstance(x, Tensor):
            raise TypeError(f"{what} must be a tensor, got {misuse.short(x)}.")
        if x.shape != g.shape or x.device != g.device or x.is_complex():
            raise ValueError(
                f"{what} has shape {tuple(x.shape)} and dtype {x.dtype} on {x.device}; expected "
                f"{tuple(g.shape)} and {g.dtype} on {g.device}, as the parameter."
            )
        found.append(x.to(g.dtype))
    return found
