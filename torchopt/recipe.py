"""Named classes take the arguments of their recipe: one signature, written once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def signature_of_recipe(
    init: Callable[..., None],
    documented: Callable[..., None],
    recipe: Callable[..., Any],
    before: list[inspect.Parameter],
    after: list[inspect.Parameter],
) -> Any:
    """Give ``init`` the name and docstring of ``documented`` and the arguments of the recipe."""
    result: Any = functools.wraps(documented)(init)
    middle = inspect.signature(recipe).parameters.values()
    result.__signature__ = inspect.Signature([*before, *middle, *after])
    return result
