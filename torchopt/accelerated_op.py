"""The switch for fused kernels, which every recipe accepts as ``use_accelerated_op``."""

from __future__ import annotations

from typing import Any


REASON = "this version of torchopt has no fused engine yet; rules run on torch operators"


def accelerated_op_available(devices: Any = None) -> bool:
    """Whether fused optimizer kernels are loaded for ``devices`` (default: any device).

    Example:
        >>> import torchopt
        >>> torchopt.accelerated_op_available()
        False
    """
    return False


def check_use_accelerated_op(use_accelerated_op: bool | None) -> None:
    """Accept ``None`` (when available) and ``False`` (never); refuse ``True`` (required).

    Raises:
        RuntimeError: If fused kernels are required; they cannot be had.
        TypeError: If the value is none of ``None``, ``True``, ``False``.
    """
    if use_accelerated_op is not None and not isinstance(use_accelerated_op, bool):
        raise TypeError(
            f"use_accelerated_op must be None, True or False, got {use_accelerated_op!r}."
        )
    if use_accelerated_op:
        raise RuntimeError(
            f"use_accelerated_op=True requires a fused kernel, but {REASON}. Pass None to use "
            "kernels when available."
        )
