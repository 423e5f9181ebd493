"""Named classes take the arguments of their recipe: one signature, written once."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torchopt.base.calling import level_of_user


F = TypeVar("F", bound=Callable[..., Any])


def signature_of_recipe(
    init: Callable[..., None],
    documented: Callable[..., None],
    recipe: Callable[..., Any],
    before: list[inspect.Parameter],
    after: list[inspect.Parameter],
    meanings: tuple[str, str],
) -> Any:
    """Give ``init`` the name and docstring of ``documented`` and the arguments of the recipe.

    The recipe itself is its attribute ``recipe``; what the other arguments mean, those before and
    those after the recipe's, is its attribute ``meanings``.
    """
    result: Any = functools.wraps(documented)(init)
    middle = inspect.signature(recipe).parameters.values()
    result.__signature__ = inspect.Signature([*before, *middle, *after])
    own = {p.name: p.annotation for p in before if p.annotation is not p.empty}
    result.__annotations__ = {**documented.__annotations__, **own}
    result.recipe, result.meanings = recipe, meanings
    return result


def keywords_of(recipe: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """Return what a recipe takes by keyword, and what it takes from calls for TorchOpt 0.7.3."""
    return list(inspect.signature(recipe).parameters), getattr(recipe, "also_takes", [])


def renamed(**names: str) -> Callable[[F], F]:
    """Let a function take arguments by the keywords of TorchOpt 0.7.3 too: ``old="new"``."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(
                            f"{function.__qualname__} got both {new}= and {old}=, which is what "
                            "TorchOpt 0.7.3 called it; give one."
                        )
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        result: Any = call
        result.also_takes = [*getattr(function, "also_takes", ()), *names]
        return result

    return decorate


def without(name: str, why: str) -> Callable[[F], F]:
    """Let a function take a keyword of TorchOpt 0.7.3 that has no meaning any more.

    It is not in the signature. A call that gives it is answered by a warning.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if name in kwargs:
                del kwargs[name]
                warnings.warn(
                    f"{name} is accepted for scripts written for TorchOpt 0.7.3 and ignored: {why} "
                    "See docs/coming_from/torchopt.md.",
                    FutureWarning,
                    stacklevel=level_of_user(),
                )
            return function(*args, **kwargs)

        result: Any = call
        result.also_takes = [*getattr(function, "also_takes", ()), name]
        return result

    return decorate


ignoring_moment_requires_grad = without(
    "moment_requires_grad", "moments carry the graph of what they are made of."
)
