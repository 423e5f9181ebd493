"""Evaluate a function at many points: all at once, or one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.calling import level_of_user
from torchopt.base.misuse.given import given, is_number


class Evaluator:
    """Calls a function at points that are stacked in the first dimension of tensors.

    Args:
        name: Of the function, in messages.
        owner: Who calls it, in messages.
        vectorize: ``True``: by one ``torch.vmap``. ``False``: one after the other. ``None``: tries
            the first; if it fails, warns and goes on with the second, for good.
        chunk_size: At most how many at once.
    """

    def __init__(
        self, name: str, owner: str, vectorize: bool | None, chunk_size: int | None
    ) -> None:
        if vectorize not in (None, True, False):
            raise TypeError(f"vectorize must be True, False or None, got {given(vectorize)}.")
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        self.name, self.owner = name, owner
        self.vectorize, self.chunk_size = vectorize, chunk_size

    def value(self, result: Any, like: Tensor) -> Tensor:
        """Return what the function returned as a scalar tensor.

        Raises:
            TypeError: If it is no real number.
            ValueError: If it is several.
        """
        if is_number(result):
            return torch.as_tensor(result, dtype=like.dtype, device=like.device)
        if not isinstance(result, Tensor):
            advice = " Does it return the objective?" if result is None else ""
            raise TypeError(f"{self.name} must return a scalar, got {given(result)}.{advice}")
        if result.dim():
            raise ValueError(
                f"{self.name} must return a scalar, got shape {tuple(result.shape)}; take its "
                "mean() or sum()."
            )
        if result.is_complex():
            raise TypeError(
                f"{self.name} must return a real scalar, got {result.dtype}; take its abs()."
            )
        return result if result.is_floating_point() else result.to(like.dtype)

    def __call__(self, function: Callable[[list[Tensor]], Any], points: Sequence[Tensor]) -> Tensor:
        """Return the values of ``function`` at all points."""

        def single(*leaves: Tensor) -> Tensor:
            return self.value(function(list(leaves)), leaves[0])

        if self.vectorize is False:
            return self._one_by_one(single, points)
        at_once: Any = torch.vmap(single, randomness="different", chunk_size=self.chunk_size)
        try:
            return at_once(*points)
        except Exception as error:
            if self.vectorize:
                raise RuntimeError(
                    f"{self.owner} could not call {self.name} for all samples in one torch.vmap: "
                    f"{misuse.clipped(str(error), 200)} Write it without what vmap does not know "
                    "(item(), branches by values, changes in place), or pass vectorize=False."
                ) from error
            values = self._one_by_one(single, points)  # raises what is wrong in any case
            warnings.warn(
                f"{self.owner} cannot call {self.name} for all samples in one torch.vmap, and "
                "calls it for one after the other. Pass vectorize=False if that is what you want, "
                f"True to be told as an error. {type(error).__name__}: "
                f"{misuse.clipped(str(error), 200)}",
                stacklevel=level_of_user(),
            )
            self.vectorize = False
            return values

    @staticmethod
    def _one_by_one(function: Callable[..., Tensor], points: Sequence[Tensor]) -> Tensor:
        return torch.stack([function(*(x[i] for x in points)) for i in range(len(points[0]))])


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number of at least 1.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is less than 1.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number >= 1, got {given(value)}.")
    if value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value}.")


def check_sigma(sigma: Any) -> float:
    """Return the size of perturbations.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not positive and finite.
    """
    if not is_number(sigma) or isinstance(sigma, bool):
        raise TypeError(f"sigma must be a number > 0, got {given(sigma)}.")
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma must be a finite number > 0, got {sigma}.")
    return float(sigma)


def check_leaves(leaves: Sequence[Any], names: Sequence[str], owner: str) -> None:
    """Refuse trees without a tensor, and leaves that cannot be perturbed.

    Raises:
        TypeError: If a leaf is no tensor of real floating-point numbers.
        ValueError: If there is no leaf.
    """
    if not leaves:
        raise ValueError(f"{owner} got no tensors to perturb.")
    for name, x in zip(names, leaves):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = f"dtype {x.dtype}" if isinstance(x, Tensor) else misuse.short(x)
            raise TypeError(
                f"{owner} perturbs real floating-point tensors, got {what} as {name}."
                f"{misuse.advice_for_leaf(x)}"
            )
