"""Transformations one after the other, as one transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from torchopt.core import hyper
from torchopt.core.pair import Pair, as_transformation
from torchopt.core.plan import Plan
from torchopt.core.slots import Counter, Slot
from torchopt.core.transform import GradientTransformation, check_transformation, transformation
from torchopt.core.whole import distinct


@transformation
class Chain(GradientTransformation):
    """Several transformations applied one after the other; made by :func:`chain`."""

    transformations: tuple[GradientTransformation, ...]

    @property
    def parts(self) -> tuple[GradientTransformation, ...]:
        """The transformations, in order."""
        return self.transformations

    def hyper_specs(self) -> dict[str, hyper.HyperSpec]:
        """Return the hyperparameters of all parts."""
        return self.plan.hyper_specs

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters of all parts."""
        return dict(self.plan.values)

    @property
    def slots(self) -> tuple[Slot, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The slots of all parts."""
        return self.plan.renamed_slots()

    @property
    def counters(self) -> tuple[Counter, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The counters of all parts."""
        return self.plan.renamed_counters()

    def slot_names(self) -> tuple[str, ...]:
        """Return the names of the slots of all parts."""
        return self.plan.slot_names

    def __post_init__(self) -> None:
        # the parts have checked their own hyperparameters; torch.compile takes the plan as a
        # constant, which cannot be made while it traces
        object.__setattr__(self, "_plan", Plan(self.parts))

    def with_accelerated_op(self, use_accelerated_op: bool | None) -> GradientTransformation:
        """Return the chain with another setting of the fused kernels in all parts."""
        return Chain(
            tuple(part.with_accelerated_op(use_accelerated_op) for part in self.transformations)
        )

    def _exchanged(self, values: Mapping[str, Any]) -> GradientTransformation:
        own = [
            {name: values[public] for name, public in fields.items() if public in values}
            for fields in self.plan.fields
        ]
        return Chain(tuple(p._exchanged(v) for p, v in zip(self.transformations, own)))

    def _with_dtypes(self, dtypes: Mapping[str, torch.dtype | None]) -> GradientTransformation:
        parts = [
            part._with_dtypes(
                {
                    slot.name: dtypes[public]
                    for slot, public in zip(part.kept(part.slots), names)
                    if public in dtypes
                }
            )
            for part, names in zip(self.transformations, self.plan.slots)
        ]
        return Chain(tuple(parts))

    def renewed(self) -> GradientTransformation:
        """Return the same with slots for all parameters together of its own."""
        return Chain(tuple(part.renewed() for part in self.transformations))

    def __repr__(self) -> str:
        return f"chain({', '.join(repr(part) for part in self.transformations)})"


def chain(
    *transformations: GradientTransformation | tuple[Callable[..., Any], Callable[..., Any]],
) -> GradientTransformation:
    """Apply transformations one after the other, the first one to the gradients.

    Nested chains are flattened. A name that occurs twice among the hyperparameters or slots gets
    the suffix ``_2`` (``_3``, ...) at its second occurrence, so ``param_groups`` and states stay
    flat dictionaries as in ``torch.optim``.

    Args:
        *transformations: At least zero; an empty chain is the identity. A pair of functions,
            ``(init, update)``, is one too.

    Raises:
        TypeError: If an argument is no transformation, e.g. a class or a ``torch.optim`` object.

    Example:
        >>> import torchopt
        >>> torchopt.chain(torchopt.clip_grad_value(1.0), torchopt.scale(-0.1))
        chain(ClipGradValue(clip_value=1.0), Scale(step_size=-0.1))
    """
    parts: list[GradientTransformation] = []
    for given in transformations:
        tx: Any = as_transformation(given)
        check_transformation(tx, "chain")
        parts.extend(tx.parts)
    return parts[0] if len(parts) == 1 else Chain(tuple(distinct(parts)))


def chain_flat(*transformations: GradientTransformation) -> GradientTransformation:
    """Chain transformations as ``chain.flat`` of TorchOpt 0.7.3 does.

    It is :func:`chain`, but for pairs of functions (:class:`~torchopt.core.pair.Pair`): they are
    given gradients and parameters as flat lists, whatever the tree.
    """
    tx = chain(*transformations)
    parts = [part.renewed(flat=True) if isinstance(part, Pair) else part for part in tx.parts]
    return parts[0] if len(parts) == 1 else Chain(tuple(parts))


GradientTransformation.joined = staticmethod(chain)
chain.flat = chain_flat  # pyright: ignore[reportFunctionMemberAccess]
