"""What steps in place ask of an optimizer, whose class is of another room (``optim``)."""

from __future__ import annotations

from typing import Any, Protocol

from torchopt.core.transform import GradientTransformation


class SteppedOptimizer(Protocol):
    """An ``Optimizer`` as :class:`torchopt.kernels.inplace.Stepper` sees it."""

    transformation: GradientTransformation
    param_groups: list[dict[str, Any]]
    state: Any

    def _counts_steps(self) -> bool: ...

    def _row(self, group: dict[str, Any]) -> dict[str, Any]: ...
