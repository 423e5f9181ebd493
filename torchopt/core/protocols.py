"""What lower files of this room ask of classes that are built on them, and so cannot be imported.

:class:`~torchopt.core.transform.GradientTransformation` runs on the engine, and the engine's calls
go through checks and tags. Higher rooms name the classes themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from torchopt.core.plan import Plan
from torchopt.typing import Step


class PartLike(Protocol):
    """What the first slots of a part are made by."""

    is_selective: ClassVar[bool]

    def refuses(self, param: Tensor) -> str:
        """Return why a parameter cannot have this rule; empty if it can."""
        ...

    def first_slots(self, param: Tensor, **hyperparameters: Any) -> tuple[Tensor | None, ...]:
        """Return the initial buffers of one parameter."""
        ...

    def whole_slots(self) -> Mapping[str, tuple[Any, tuple[Any, ...]]]:
        """Return the slots that are one tree for all parameters."""
        ...


class TransformationLike(Protocol):
    """What is computed by the engine: a ``GradientTransformation``."""

    @property
    def plan(self) -> Plan:
        """Where each part finds its hyperparameters and slots."""
        ...

    @property
    def parts(self) -> Sequence[PartLike]:
        """What is applied one after the other."""
        ...

    def hyperparameters(self) -> Mapping[str, Any]:
        """Return the hyperparameters by name."""
        ...

    def slot_names(self) -> tuple[str, ...]:
        """Return the names of the buffers kept for each parameter."""
        ...


class CallLike(Protocol):
    """One update with one entry per parameter: a ``Call``."""

    @property
    def g(self) -> Sequence[Any]:
        """Gradients; ``None`` for a parameter that has none."""
        ...

    @property
    def p(self) -> Sequence[Any]:
        """Parameters; ``None`` where the caller gave none."""
        ...

    @property
    def slots(self) -> Mapping[str, Sequence[Any]]:
        """The slots by their public names."""
        ...

    @property
    def hyper(self) -> Sequence[dict[str, Any]]:
        """The hyperparameters of each parameter."""
        ...

    @property
    def names(self) -> Callable[[], Sequence[str]]:
        """Returns the names of the parameters."""
        ...


class LeavesLike(Protocol):
    """The parameters that have a gradient: ``Leaves``."""

    @property
    def g(self) -> Sequence[Tensor]:
        """Gradients."""
        ...

    @property
    def p(self) -> Sequence[Any]:
        """Parameters."""
        ...

    @property
    def t(self) -> Sequence[Step]:
        """Step counts, 1 at the first update."""
        ...
