"""Of which algorithm a saved state is, where slots and hyperparameters do not tell.

LAMB keeps what Adam keeps, under the same names. Groups of algorithms that ``torch.optim`` has not
say so; those that it has are saved as it saves them.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any


#: The key in a group.
ALGORITHM = "algorithm"

#: The recipes that ``torch.optim`` has a class for, in the newest version known.
OF_TORCH = frozenset(
    (
        "adadelta",
        "adafactor",
        "adagrad",
        "adam",
        "adamax",
        "adamw",
        "asgd",
        "lbfgs",
        "muon",
        "nadam",
        "radam",
        "rmsprop",
        "rprop",
        "sgd",
        "sparse_adam",
    )
)


def recipe_of(optimizer: object) -> str:
    """Return the name of the recipe of a named class; empty for an optimizer of any transformation.

    A user's subclass has that of the class it is made from.
    """
    for cls in type(optimizer).__mro__:
        recipe = getattr(vars(cls).get("__init__"), "recipe", None)
        if recipe is not None:
            return recipe.__name__
    return ""


def mark(optimizer: object) -> dict[str, str]:
    """Return what a group says of its algorithm."""
    name = recipe_of(optimizer)
    return {ALGORITHM: name} if name and name not in OF_TORCH else {}


def set_mark(optimizer: object, group: MutableMapping[str, Any]) -> None:
    """Let a live group say what a saved one says; it may be a copy of another optimizer's."""
    group.pop(ALGORITHM, None)
    group.update(mark(optimizer))


def check_mark(optimizer: object, group: Mapping[str, Any]) -> None:
    """Refuse a saved group of another algorithm.

    Raises:
        ValueError: Naming both.
    """
    own, saved = mark(optimizer).get(ALGORITHM, ""), group.get(ALGORITHM, "")
    if recipe_of(optimizer) and saved != own:
        theirs = f"{saved!r}" if saved else "an algorithm of torch.optim, or of a former version"
        raise ValueError(
            f"The state belongs to another optimizer: it is of {theirs}, "
            f"{type(optimizer).__name__} is {recipe_of(optimizer)!r}."
        )
