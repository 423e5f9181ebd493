"""What files of this room ask of the two optimizers, which are built on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from torchopt.core.hyper import HyperSpec
from torchopt.core.transform import GradientTransformation
from torchopt.optim.schedules import LiveSchedules


class HasGroups(Protocol):
    """A transformation and the groups that hold its hyperparameters."""

    transformation: GradientTransformation
    param_groups: list[dict[str, Any]]


class MetaOptimizerLike(HasGroups, Protocol):
    """A ``MetaOptimizer``."""

    _twin: ClassVar[Any]


class OptimizerLike(HasGroups, Protocol):
    """An ``Optimizer``, which is a ``torch.optim.Optimizer``."""

    optional_hyperparameters: ClassVar[frozenset[str]]
    former_defaults: ClassVar[dict[str, Any]]
    fixed_options: ClassVar[dict[str, Any]]
    foreign_hyperparameters: ClassVar[frozenset[str]]
    state: Any
    _schedules: LiveSchedules
    _lent: bool

    def group_specs(self, group: Mapping[str, Any]) -> dict[str, HyperSpec]:
        """Return the hyperparameters that a group holds, by name."""
        ...

    def has_schedule(self, group: dict[str, Any], name: str) -> bool:
        """Whether a hyperparameter of a group was given as a schedule."""
        ...

    def _adopt_schedules(self, groups: list[dict[str, Any]]) -> None: ...

    def _count(self, group: dict[str, Any]) -> int: ...

    @property
    def register_state_dict_post_hook(self) -> Callable[..., Any]:
        """See ``torch.optim.Optimizer``."""
        ...

    @property
    def register_load_state_dict_pre_hook(self) -> Callable[..., Any]:
        """See ``torch.optim.Optimizer``."""
        ...

    @property
    def register_load_state_dict_post_hook(self) -> Callable[..., Any]:
        """See ``torch.optim.Optimizer``."""
        ...
