"""The tables of ``docs/catalogue.md``: ``python docs/catalogue_tables.py``.

They are made from what ``torchopt`` exports and from the first lines of docstrings;
``tests/test_table.py`` holds the page to them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torchopt


PAGE = Path(__file__).with_name("catalogue.md")
BEGIN, END = "<!-- {}: made by docs/catalogue_tables.py -->\n", "<!-- end of {} -->\n"


def optimizers() -> str:
    """Return a table of all optimizers: what it is, and its name in each API."""
    public = [getattr(torchopt, name) for name in dir(torchopt)]
    classes = [x for x in public if isinstance(x, type)]
    plain = {x for x in classes if issubclass(x, torchopt.Optimizer) and "recipe" in _init(x)}
    twins = {x._twin: x for x in classes if issubclass(x, torchopt.MetaOptimizer)}
    rows = []
    for cls in sorted(plain, key=lambda x: x.__name__.lower()):
        recipe = _init(cls)["recipe"]
        meta = f"`{twins[cls].__name__}`" if cls in twins else ""
        rows.append(f"| {_title(recipe)} | `{recipe.__name__}` | `{cls.__name__}` | {meta} |\n")
    head = (
        "| optimizer | functional | object-oriented | differentiable |\n| --- | --- | --- | --- |\n"
    )
    around = "| SAM and ASAM, around any of these | `sam` | `SAM` | `MetaSAM` |\n"
    last = "| L-BFGS, which calls the loss itself | `solvers.minimize` | `LBFGS` "
    last += "| `solvers.Unrolled` |\n"
    return head + "".join(rows) + around + last


def transformations() -> str:
    """Return a sentence that lists the transformations that are no whole optimizers."""
    recipes = {_init(x)["recipe"] for x in _classes() if "recipe" in _init(x)}
    names = [
        name
        for name in dir(torchopt)
        if (value := getattr(torchopt, name)) not in recipes
        and getattr(value, "__annotations__", {}).get("return") == "GradientTransformation"
    ]
    text = f"{', '.join(f'`{name}`' for name in names)}."
    return "\n".join(textwrap.wrap(text, 120, break_on_hyphens=False)) + "\n"


def schedules() -> str:
    """Return sentences that list the schedules and the projections."""
    own = vars(torchopt.schedules)
    names = [n for n in torchopt.schedules.__all__ if not n.endswith("_schedule") and n in own]
    text = f"`torchopt.schedules`, for any hyperparameter: {', '.join(f'`{n}`' for n in names)}."
    found = [n for n in vars(torchopt.projections) if n.startswith("projection_")]
    text += f" `torchopt.projections`: {', '.join(f'`{n}`' for n in found)}."
    return "\n".join(textwrap.wrap(text, 120, break_on_hyphens=False)) + "\n"


def _classes() -> Iterator[Any]:
    for name in dir(torchopt):
        value = getattr(torchopt, name)
        if isinstance(value, type) and issubclass(value, torchopt.Optimizer):
            yield value


def _init(cls: Any) -> dict[str, Any]:
    return vars(cls.__init__)


def _title(recipe: Any) -> str:
    return recipe.__doc__.strip().splitlines()[0].rstrip(".")


MADE = {"optimizers": optimizers, "transformations": transformations, "schedules": schedules}


def written(text: str) -> str:
    """Return the page with what is made from the package updated."""
    for name, make in MADE.items():
        begin, end = BEGIN.format(name), END.format(name)
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text = re.sub(
            pattern, lambda _, m=make, b=begin, e=end: f"{b}{m()}{e}", text, flags=re.DOTALL
        )
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
