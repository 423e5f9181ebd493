"""Functions that the compiler's frontend does not read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch


F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F) -> F:
    """Return a function that runs as it is written where ``torch.compile`` meets it.

    What looks for tensors in closures and opens levels of ``torch.func`` is not for the frontend:
    that of torch 2.13 crashes over it. So the graph is broken here, and goes on behind.
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return called  # pyright: ignore[reportReturnType]
