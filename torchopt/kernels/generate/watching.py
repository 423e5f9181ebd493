"""See whether a rule reads its hyperparameters from itself instead of its arguments.

A program depends on the structure of a rule and not on the numbers, as long as the numbers come in
as arguments. So a rule is traced on copies of the transformations which notice what is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchopt.core.transform import GradientTransformation


class Watch:
    """Copies of transformations, and whether a hyperparameter of one has been read.

    Attributes:
        parts: The copies.
        was_read: Whether anything has been read, or could have been without being seen.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.was_read = False
        self.parts = [self._copy(part) for part in parts]

    def _copy(self, part: GradientTransformation) -> Any:
        if not part.declared:
            return part
        try:
            copy = object.__new__(_watched(type(part)))
            vars(copy).update(vars(part))
        except Exception:  # a class that cannot be derived from, or has no dictionary
            self.was_read = True
            return part
        vars(copy)["_watch"] = self
        return copy


def _watched(cls: type) -> type:
    """Return a class whose hyperparameters tell when they are read; kept at the class it is of."""
    known = vars(cls).get("_watched")
    if known is None:
        base: Any = cls
        known = type(cls.__name__, (cls,), {name: _noticing(name) for name in base.declared})
        base._watched = known
    return known


def _noticing(name: str) -> property:
    def read(self: Any) -> Any:
        vars(self)["_watch"].was_read = True
        return vars(self)[name]

    return property(read)
