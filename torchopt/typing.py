"""Type aliases shared by the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import torch
from typing_extensions import TypeAlias


#: Any nesting of dicts, lists, tuples, named tuples and registered classes.
PyTree: TypeAlias = Any
#: A tree whose leaves are tensors or ``None``.
TensorTree: TypeAlias = Any
#: ``count -> value``; ``count`` is 0 at the first update. May be given instead of a number.
Schedule: TypeAlias = Callable[[Any], Union[float, torch.Tensor]]  # Any: one of ints is fine, too
# What a sequence may have; a sequence of anything would be text as well.
_Entry: TypeAlias = Union[
    float, torch.Tensor, Schedule, Mapping[Any, Any], list[Any], tuple[Any, ...]
]
#: What a hyperparameter may be: a number, a tensor (which may require grad), a schedule, or a tree
#: of those with one entry per parameter (or per named part of the parameters).
Hyperparameter: TypeAlias = Union[
    float, torch.Tensor, Schedule, Mapping[Any, Any], Sequence[_Entry]
]
#: The step count of one parameter.
Step: TypeAlias = Union[int, torch.Tensor]

__all__ = ["Hyperparameter", "PyTree", "Schedule", "Step", "TensorTree"]


def __dir__() -> list[str]:
    return list(__all__)
