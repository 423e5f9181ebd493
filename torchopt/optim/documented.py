"""Named classes say what each of their arguments means, in the words of their recipe.

Written once, beside the recipe; what all classes have in common is written once beside the
function that adds it (``torchopt.optim.named``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any


class Documented:
    """A base of optimizers whose named classes get the arguments into their docstrings."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        init: Any = vars(cls).get("__init__")
        recipe = getattr(init, "recipe", None)
        if recipe is not None and cls.__doc__ and recipe.__doc__:  # there are none under -OO
            names = {"cls": cls.__name__, "recipe": recipe.__name__}
            before, after = (text.format_map(names) for text in init.meanings)
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\n{of_recipe(recipe, before, after)}"


def of_recipe(recipe: Callable[..., Any], before: str, after: str) -> str:
    """Return the docstring of a recipe with further arguments, but for its summary and example.

    The example shows the functional API.
    """
    _, _, body = inspect.cleandoc(recipe.__doc__ or "").partition("\n\n")
    body = re.sub(r"^Example:\n(?:(?: .*)?\n)*(?: .*\Z)?", "", body, flags=re.M).rstrip()
    body = re.sub(r"; needs\s+``params``\s+in\s+``update``", "", body)  # of the functional API
    section = re.compile(r"^Args:\n((?: .*\n|\n(?= ))*)", re.M)
    return section.sub(lambda m: f"Args:\n{_entries(before)}{m[1]}{_entries(after)}", body)


def _entries(text: str) -> str:
    return "".join(f"    {line}\n" for line in inspect.cleandoc(text).splitlines())
