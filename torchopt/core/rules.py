"""Rules of one tensor, and of one entry: what most transformations are."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.distributed import is_spread, spread_as, whole
from torchopt.core import batching
from torchopt.core.engine import Leaves
from torchopt.core.sparse_entries import of_entries
from torchopt.core.transform import GradientTransformation
from torchopt.typing import Step


class TensorTransformation(GradientTransformation):
    """A transformation whose rule treats each parameter by itself, as one tensor.

    Example:
        >>> import torch, torchopt
        >>> @torchopt.transformation
        ... class Unit(torchopt.TensorTransformation):
        ...     def rule(self, g, p, t, slots):
        ...         return g / g.norm(), slots
        >>> tx = Unit()
        >>> tx.update([torch.tensor([3.0, 4.0])], tx.init([torch.ones(2)]))[0]
        [tensor([0.6000, 0.8000])]
    """

    #: Whether ``torch.func.vmap`` may run the rule over a batch of small tensors of one shape.
    batches: ClassVar[bool] = False
    #: Whether the rule of one entry is right for those that a sparse gradient has; others stay.
    sparse_by_entry: ClassVar[bool] = False
    #: Whether the rule is to see the whole gradient and whole slots where they are spread over
    #: processes (``DTensor``), as decompositions must; sums and products are right as they are.
    gathers: ClassVar[bool] = False

    def rule(
        self,
        g: Tensor,
        p: Tensor | None,
        t: Step,
        slots: tuple[Any, ...],
        *args: Any,
        **hyperparameters: Any,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Return the update of one parameter and its new slots; pure.

        Args:
            g: The gradient, or what earlier parts of a chain made of it.
            p: The parameter, or ``None`` if the caller gave none.
            t: The step count, 1 at the first update.
            slots: The buffers, in the order of ``slots``.
            *args: None; here so that a subclass may name its hyperparameters.
            **hyperparameters: Numbers, or tensors that broadcast to ``g``.
        """
        raise TypeError(f"{type(self).__name__} defines no rule(g, p, t, slots, ...).")

    def to_eval(self, p: Tensor, slots: tuple[Any, ...], **hyperparameters: Any) -> Tensor:
        """Return a parameter as it is evaluated, where ``evaluates`` is set; pure."""
        return p

    def to_train(self, p: Tensor, slots: tuple[Any, ...], **hyperparameters: Any) -> Tensor:
        """Return the parameter that :meth:`to_eval` was given; pure."""
        return p

    def converted(self, leaves: Leaves, to_eval: bool) -> list[Tensor]:
        """Apply :meth:`to_eval` or :meth:`to_train` to every parameter that has its slots."""
        convert = self.to_eval if to_eval else self.to_train
        return [
            p if all(x is None for x in s) else convert(p, s, **h).to(p.dtype)
            for p, s, h in zip(leaves.p, leaves.slots, leaves.hyper)
        ]

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Tensor | None, ...]]]:
        """Apply :meth:`rule` to every parameter."""
        done: dict[int, Any] = {}
        for positions in batching.batches(leaves) if self.batches else ():
            done.update(zip(positions, batching.in_one_batch(self.rule, leaves, positions)))
        updates, slots = [], []
        columns = (leaves.g, leaves.p, leaves.t, leaves.slots, leaves.hyper)
        for k, (g, p, t, s, h) in enumerate(zip(*columns)):
            if k in done:
                result = done[k]
            elif self.sparse_by_entry and g.layout == torch.sparse_coo:
                result = of_entries(self.rule, g, p, t, s, h, leaves.call.overwrites)
            elif self.gathers and is_spread(g):
                result = self.rule(whole(g), p, t, tuple(map(whole, s)), **h)
            else:
                result = self.rule(g, p, t, s, **h)
            is_pair = isinstance(result, (tuple, list)) and len(result) == 2
            if not is_pair or not isinstance(result[0], Tensor) or len(result[1]) != len(s):
                raise TypeError(misuse.not_a_result(self, result, s))
            if self.gathers:
                result = spread_as(result[0], g), tuple(map(spread_as, result[1], s))
            updates.append(result[0])
            slots.append(result[1])
        return updates, slots


class ElementwiseTransformation(TensorTransformation):
    """A transformation whose rule treats each entry of a parameter by itself: it can be fused.

    Example:
        >>> import torch, torchopt
        >>> @torchopt.transformation
        ... class Sign(torchopt.ElementwiseTransformation):
        ...     def rule(self, g, p, t, slots):
        ...         return g.sign(), slots
        >>> tx = Sign()
        >>> tx.update([torch.tensor([0.5, -2.0])], tx.init([torch.ones(2)]))[0]
        [tensor([ 1., -1.])]
    """

    elementwise: ClassVar[bool] = True

    def takes_sparse(self, **hyperparameters: Any) -> bool:
        """Whether the rule is right for sparse gradients, or for the entries that they have."""
        return self.sparse_by_entry or super().takes_sparse(**hyperparameters)
