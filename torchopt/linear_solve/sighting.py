"""Whether all tensors that a product depends on have been found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchopt.base.captured import leaves_of
from torchopt.base.levels import any_level, has_tangent, is_tracked, physical
from torchopt.base.misuse.given import given
from torchopt.linear_solve.pulling import copies_of


class Sighting:
    """One product looked at.

    Args:
        product_of: Returns the product, given tensors.
        values: The tensors that were found.
        v: A vector.

    Attributes:
        recorded: Whether its derivative is being recorded.
    """

    def __init__(
        self,
        product_of: Callable[[Sequence[Tensor]], Callable[[Tensor], Tensor]],
        values: Sequence[Tensor],
        v: Tensor,
    ) -> None:
        self.product_of, self.values, self.v = product_of, values, v
        with torch.enable_grad():
            self.value = product_of(values)(v)
        self.recorded = is_tracked(self.value)

    def check(self) -> None:
        """Refuse a product that does not follow when other tensors are put into its function.

        Raises:
            ValueError: Saying how to name them.
        """
        copies = copies_of(self.values)
        with torch.enable_grad():
            try:
                other = self.product_of(copies)(self.v)
            except RuntimeError as error:
                raise ValueError(_unknown("tensors")) from error
            if not _alike(self.value, other):
                raise ValueError(_unknown("tensors"))
            if any_level():
                if is_tracked(other):
                    raise ValueError(_unknown("a tensor"))
                return
            if has_tangent(other):
                raise ValueError(_unknown("a tensor"))
            leaves = leaves_of(other, copies)
            if leaves:  # those made inside of the function are others each time
                again = self.product_of(copies)(self.v)
                known = {id(x) for x in leaves}
                stray = [x for x in leaves_of(again, copies) if id(x) in known]
                if stray:
                    raise ValueError(_unknown(given(stray[0])))


def _alike(x: Tensor, y: Tensor) -> bool:
    x, y = physical(x).detach(), physical(y).detach()
    if x.shape != y.shape:
        return False
    gap, size = torch.linalg.vector_norm(x - y), torch.linalg.vector_norm(x)
    return bool((gap <= 1e-3 * size) | ~torch.isfinite(size))


def _unknown(what: str) -> str:
    return (
        f"The product depends on {what} with a derivative, which cannot be exchanged in the "
        "function: in a graph that was recorded before (torch.func.vjp, a gradient with "
        "create_graph=True), or where the methods of a class look it up. Name it, "
        "LinearOperator(fn, tensor) with fn(v, tensor), and compute all that depends on it inside "
        "of fn, to have its derivative; or solve under torch.no_grad()."
    )
