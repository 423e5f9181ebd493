"""The switch for fused kernels, which every recipe accepts as ``use_accelerated_op``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Union

import torch

from torchopt.base import misuse
from torchopt.core import engine
from torchopt.core.transform import GradientTransformation


Device = Union[str, int, torch.device]


def accelerated_op_available(device: Union[Device, Iterable[Device], None] = None) -> bool:
    """Whether fused optimizer kernels are loaded for a device.

    Args:
        device: A device or several, all of which must have kernels; ``None`` means the CPU.
            What else decides whether a call is fused: :func:`torchopt.kernels.why`.

    Example:
        >>> import torchopt
        >>> torchopt.accelerated_op_available("meta")
        False
    """
    return not reason_unavailable(device)


def reason_unavailable(device: Union[Device, Iterable[Device], None] = None) -> str:
    """Return why there are no fused kernels for a device; the empty string if there are."""
    if engine.accelerator is None:
        return "the kernels are not loaded: import torchopt"
    several = isinstance(device, Iterable) and not isinstance(device, str)
    devices: Any = device if several else ["cpu" if device is None else device]
    reasons = (engine.accelerator.unavailable(torch.device(d).type) for d in devices)
    return next(filter(None, reasons), "")


def accelerated(
    tx: GradientTransformation, use_accelerated_op: bool | None
) -> GradientTransformation:
    """Return a transformation with fused kernels ``None`` (when available), required or never.

    Raises:
        RuntimeError: If kernels are required and there are none for any device.
        TypeError: If the value is none of ``None``, ``True``, ``False``.
    """
    if use_accelerated_op is None:
        return tx
    if not isinstance(use_accelerated_op, bool):
        raise TypeError(
            f"use_accelerated_op must be None, True or False, got "
            f"{misuse.short(use_accelerated_op)}."
        )
    if use_accelerated_op and reason_unavailable("cpu") and reason_unavailable("cuda"):
        raise RuntimeError(
            f"use_accelerated_op=True requires a fused kernel, but {reason_unavailable('cpu')}. "
            "Pass None to use kernels when available."
        )
    return tx.with_accelerated_op(use_accelerated_op)
