"""What a node of the graph keeps of its inputs, where that is not for autograd to free at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchopt.base.torch_internals import graph_task_keeps_graph
from torchopt.kernels.differentiable import Group
from torchopt.kernels.places import ALL


class Kept:
    """The inputs of a node, given up parameter by parameter.

    What ``save_for_backward`` keeps is freed at once. Where parameters that do not depend on each
    other share a node, a backward pass through one of them must leave those of the others.
    """

    def __init__(self, tensors: Sequence[Tensor], group: Group) -> None:
        self._tensors: list[Any] = list(tensors)
        self._versions = [x._version for x in tensors]
        self._group = group
        self._gone: set[int] = set()

    def take(self, rows: Sequence[int]) -> list[Tensor | None]:
        """Return the inputs of some parameters, for good unless the graph is retained.

        Raises:
            RuntimeError: If they are gone, or one of them has been changed in place.
        """
        if not self._gone.isdisjoint(rows):
            raise RuntimeError(
                "Trying to backward through the graph a second time: what a step of an optimizer "
                "had saved was freed by the first .backward() or autograd.grad(). Specify "
                "retain_graph=True there."
            )
        taken, for_good = self._tensors, not graph_task_keeps_graph()
        everyone = len(rows) == self._group.count
        if not everyone:
            wanted = {ALL, *rows}
            at = self._group.places_in
            taken = [x if row in wanted else None for (_, row), x in zip(at, taken)]
        for x, version in zip(taken, self._versions):
            if x is not None and x._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: an input of a step of an optimizer, {tuple(x.shape)}, is "
                    f"at version {x._version}; expected version {version} instead."
                )
        if for_good:
            self._gone.update(rows)
            if len(self._gone) == self._group.count:
                self._tensors = []
            else:
                at = self._group.places_in
                kept = [None if row in self._gone else x for (_, row), x in zip(at, self._tensors)]
                self._tensors = kept
        return taken


class _NothingKept:
    """That of a node which needs none of its inputs."""

    def take(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        return ()


NOTHING = _NothingKept()
