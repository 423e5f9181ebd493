"""Slots and counters: what an optimizer remembers between two updates, declared as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import is_zero, to_compute_dtype


#: The start of a slot that begins as a copy of the parameter, connected to it by the graph.
PARAM = "param"


@dataclasses.dataclass(frozen=True)
class Slot:
    """A buffer that is kept for each parameter.

    Args:
        name: Its name, as ``torch.optim`` calls it where it has one.
        start: What it is before the first update: a number; ``"param"`` for a copy of the
            parameter, through which derivatives reach it; or a function
            ``(param, **hyperparameters) -> tensor``.
        when: Which parameters have it: all of them (``None``); all unless the hyperparameter of
            this name is the number 0 or ``False``; or those for which a function
            ``(shape, **hyperparameters)`` says so. The others have ``None``.
        shape: Its shape as a function of the parameter's; ``None`` for the same.
        dtype: The dtype it is kept in; ``None`` for that of the parameter, float32 for half
            precision. The rule sees a floating one in the dtype of the parameter, if that is wider.

    Example:
        >>> import torch, torchopt
        >>> @torchopt.transformation
        ... class Smooth(torchopt.ElementwiseTransformation):
        ...     decay: float = torchopt.hyper(0.5, ge=0, lt=1)
        ...     slots = (torchopt.Slot("mean", start=1.0, when="decay"),)
        ...
        ...     def rule(self, g, p, t, slots, *, decay):
        ...         mean = g if slots[0] is None else decay * slots[0] + (1 - decay) * g
        ...         return mean, (mean,)
        >>> Smooth().init([torch.ones(2)]).mean
        [tensor([1., 1.])]
    """

    name: str
    start: Union[float, str, Callable[..., Tensor]] = 0.0
    when: Union[str, Callable[..., bool], None] = None
    shape: Callable[[torch.Size], Sequence[int]] | None = None
    dtype: torch.dtype | None = None
    #: Whether a state may lack it for another reason, as where a mask leaves parameters out.
    optional: bool = False

    @property
    def may_be_absent(self) -> bool:
        """Whether some parameters may do without it."""
        return self.optional or self.when is not None

    @property
    def is_number(self) -> bool:
        """Whether it starts as one number everywhere, in the parameter's shape and dtype."""
        return isinstance(self.start, (int, float)) and self.shape is None and self.dtype is None

    @property
    def is_narrow(self) -> bool:
        """Whether it is kept in a floating dtype of its own; the rule sees it in a wider one."""
        return self.dtype is not None and self.dtype.is_floating_point

    def needed(self, shape: torch.Size, hyperparameters: Mapping[str, Any]) -> bool:
        """Whether a parameter of a shape has it."""
        if self.when is None:
            return True
        if isinstance(self.when, str):
            return not is_zero(hyperparameters[self.when])
        return self.when(shape, **hyperparameters)

    def shape_for(self, param: Tensor) -> torch.Size:
        """Return its shape for a parameter."""
        return param.shape if self.shape is None else torch.Size(self.shape(param.shape))

    def dtype_for(self, param: Tensor) -> torch.dtype:
        """Return the dtype in which it is kept for a parameter."""
        return self.dtype or to_compute_dtype(param.new_empty(0)).dtype

    def first(self, param: Tensor, hyperparameters: Mapping[str, Any]) -> Tensor | None:
        """Return what it is before the first update; ``param`` is in the dtype of computation."""
        if not self.needed(param.shape, hyperparameters):
            return None
        if self.is_narrow and param.is_complex():
            raise TypeError(
                f"The slot {self.name!r} is kept in {self.dtype}, which a complex parameter cannot "
                "be: leave it in the dtype of the parameters, or optimize torch.view_as_real of it."
            )
        if self.start == PARAM:
            return param.clone() if self.dtype is None else param.to(self.dtype, copy=True)
        if not param.is_complex() or self.dtype is not None:
            return self._begun(param, self.shape_for(param), hyperparameters)
        # a rule sees two real numbers instead of a complex one, and so does a start
        if self.shape is not None and callable(self.start):  # of another shape there are no pairs
            return self.start(param.real, **hyperparameters).to(param.dtype)
        pairs, shape = torch.view_as_real(param), (*self.shape_for(param), 2)
        begun = self._begun(pairs, shape, hyperparameters)
        return torch.view_as_complex(begun) if begun.dim() else begun  # one number stays real

    def _begun(
        self, param: Tensor, shape: Sequence[int], hyperparameters: Mapping[str, Any]
    ) -> Tensor:
        if callable(self.start):
            first = self.start(param, **hyperparameters)
            return first if self.dtype is None else first.to(self.dtype)
        start: Any = self.start  # a number
        dtype = self.dtype or param.dtype
        if self.shape is None:  # in the layout of the parameter
            return torch.full_like(param, float(start), dtype=dtype)
        return param.new_full(tuple(shape), float(start), dtype=dtype)

    def check(self, where: str, value: Any, param: Tensor) -> None:
        """Refuse what cannot be this slot of a parameter.

        Raises:
            ValueError: Naming ``where`` it was found, what it is, and what it should be.
        """
        if value is None and self.may_be_absent:
            return
        shape = tuple(self.shape_for(param))
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            given = misuse.short(value)
            if isinstance(value, Tensor):
                given = f"a tensor of shape {tuple(value.shape)}"
            raise ValueError(f"{where} is {given} instead of a tensor of shape {shape}.")

    def kept(self, value: Tensor, param: Tensor) -> Tensor:
        """Return a copy of a loaded value as it is kept for a parameter."""
        dtype = self.dtype_for(param)
        return value.detach().to(device=param.device, dtype=dtype, copy=True)


@dataclasses.dataclass(frozen=True)
class Counter:
    """A number that is kept with the slots, such as a product of momenta or a sum of weights.

    The transformation's method ``count`` computes it before each update, and the rule receives it
    like its hyperparameters: by keyword, for this update.

    Args:
        name: Its name, as ``torch.optim`` calls it where it has one.
        start: What it is before the first update.
        ahead: Whether ``count`` makes it for the next update already: the rule gets it as it was
            before this one, as ASGD its rate.

    Example:
        >>> import torch, torchopt
        >>> @torchopt.transformation
        ... class Average(torchopt.ElementwiseTransformation):
        ...     weight: float = torchopt.hyper(2.0, gt=0)
        ...     counters = (torchopt.Counter("weight_sum", 0.0),)
        ...
        ...     def count(self, t, *, weight_sum, weight):
        ...         return {"weight_sum": weight_sum + weight}
        ...
        ...     def rule(self, g, p, t, slots, *, weight, weight_sum):
        ...         return g * (weight / weight_sum), slots
        >>> tx, g = Average(), [torch.ones(1)]
        >>> updates, state = tx.update(g, tx.init(g))
        >>> tx.update(g, state)[0], state.weight_sum
        ([tensor([0.5000])], 2.0)
    """

    name: str
    start: float = 0.0
    ahead: bool = False


def filled(param: Tensor, value: Any) -> Tensor:
    """Return a first slot that is a hyperparameter at each entry, connected to it if a tensor."""
    if isinstance(value, Tensor):
        return (torch.zeros_like(param) + value).to(param.dtype)
    return torch.full_like(param, value)


def as_slot(slot: Union[Slot, str]) -> Slot:
    """Return a slot; a name alone is one that starts as zeros."""
    return Slot(slot) if isinstance(slot, str) else slot
