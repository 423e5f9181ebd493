"""Parts of a network with transformations of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.core import hyper, resolving
from torchopt.core.engine import Call, Leaves, run
from torchopt.core.evaluation import converted, evaluates
from torchopt.core.gather import part_slots
from torchopt.core.pair import as_transformation
from torchopt.core.slots import Counter, Slot
from torchopt.core.transform import GradientTransformation, check_transformation, transformation
from torchopt.core.whole import distinct
from torchopt.typing import PyTree, Step


@transformation
class Partition(GradientTransformation):
    """Apply to each parameter the transformation of its label; see :func:`partition`."""

    transforms: Mapping[str, GradientTransformation]
    labels: Union[PyTree, Callable[[PyTree], PyTree]]

    def __post_init__(self) -> None:
        given = self.transforms
        if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
            raise TypeError(
                "partition expects a dict of transformations by label, such as "
                f'{{"body": torchopt.adam(1e-3), "head": torchopt.sgd(0.1)}}, got {given!r}.'
            )
        for label, tx in given.items():
            check_transformation(tx, f"partition, for {label!r},")
        if isinstance(self.labels, str) or self.labels is None:
            raise TypeError(
                "labels must be a tree with one label per parameter (or per part of the network), "
                f"or a function from the parameters to one, got {self.labels!r}."
            )

    @property
    def uses_step(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of the transformations reads the step count."""
        return any(tx.plan.uses_step for tx in self.transforms.values())

    @property
    def slots(self) -> tuple[Slot, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The slots of all, each optional: a parameter has those of its own transformation."""
        found: dict[str, Slot] = {}
        for label, tx in self.transforms.items():
            names = self._slots_of(label)
            for slot in tx.plan.renamed_slots(optional=True):
                name = names[slot.name]
                found.setdefault(name, dataclasses.replace(slot, name=name))
        return tuple(found.values())

    @property
    def counters(self) -> tuple[Counter, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The counters of all, as ``"label.name"``."""
        return tuple(
            dataclasses.replace(counter, name=f"{label}.{counter.name}")
            for label, tx in self.transforms.items()
            for counter in tx.plan.renamed_counters()
        )

    def count(self, t: Step, *args: Any, **values: Any) -> dict[str, Any]:
        """Return the counters of all for an update; each parameter reads those of its own label."""
        found: dict[str, Any] = {}
        for label, tx in self.transforms.items():
            (row,) = _own_rows(label, tx, [values])
            kept = tx.plan.kept(tx.plan.count(row, t, row))
            found.update({f"{label}.{name}": number for name, number in kept.items()})
        return found

    def hyper_specs(self) -> dict[str, hyper.HyperSpec]:
        """Return the hyperparameters of all, as ``"label.name"``."""
        return {
            f"{label}.{name}": spec
            for label, tx in self.transforms.items()
            for name, spec in tx.hyper_specs().items()
        }

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters of all, as ``"label.name"``."""
        return {
            f"{label}.{name}": value
            for label, tx in self.transforms.items()
            for name, value in tx.hyperparameters().items()
        }

    def _slots_of(self, label: str) -> dict[str, str]:
        """Return the names of slots here by those of one label.

        They are the same, so that slots of one name are one tree, but for whole trees, and where
        two labels mean buffers of different shapes by one name.
        """
        own = self.transforms[label].plan
        names: dict[str, str] = {}
        for name, slot in own.slot_of.items():
            others = [tx.plan.slot_of.get(name, slot) for tx in self.transforms.values()]
            alike = all((o.shape, o.dtype) == (slot.shape, slot.dtype) for o in others)
            names[name] = name if alike and name not in own.whole else f"{label}.{name}"
        return names

    def whole_slots(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Return those of the transformations, as ``"label.name"``, for their parameters."""
        return {
            f"{label}.{name}": (pair, (partial(self._has_label, label), *masks))
            for label, tx in self.transforms.items()
            for name, (pair, masks) in tx.plan.whole.items()
        }

    def renewed(self) -> GradientTransformation:
        """Return the same with such slots of its own."""
        transforms = {label: tx.renewed() for label, tx in self.transforms.items()}
        return dataclasses.replace(self, transforms=transforms)

    def takes_sparse(self, **hyperparameters: Any) -> bool:
        """Whether all rules of all parts are right for sparse gradients."""
        for label, tx in self.transforms.items():
            (row,) = _own_rows(label, tx, [hyperparameters])
            rows = [tx.plan.rows_of(k, [row])[0] for k in range(len(tx.plan.parts))]
            if not all(part.takes_sparse(**own) for part, own in zip(tx.plan.parts, rows)):
                return False
        return True

    def _exchanged(self, values: Mapping[str, Any]) -> GradientTransformation:
        transforms = {
            label: tx.with_hyperparameters(
                {n: values[f"{label}.{n}"] for n in tx.hyper_specs() if f"{label}.{n}" in values}
            )
            for label, tx in self.transforms.items()
        }
        return dataclasses.replace(self, transforms=transforms)

    def _with_dtypes(self, dtypes: Mapping[str, torch.dtype | None]) -> GradientTransformation:
        transforms = {}
        for label, tx in self.transforms.items():
            names = self._slots_of(label)
            own = {n: dtypes[public] for n, public in names.items() if public in dtypes}
            transforms[label] = tx.with_slot_dtypes(own)
        return dataclasses.replace(self, transforms=transforms)

    def _has_label(self, label: str, call: Call) -> list[bool]:
        return [one == label for one in label_leaves(self, call)]

    def with_accelerated_op(self, use_accelerated_op: bool | None) -> GradientTransformation:
        """Return the same with another setting of the fused kernels in all."""
        transforms = {
            label: tx.with_accelerated_op(use_accelerated_op)
            for label, tx in self.transforms.items()
        }
        return dataclasses.replace(self, transforms=transforms)

    @property
    def accepts_complex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all rules of all parts are right for complex numbers."""
        return all(part.accepts_complex for tx in self.transforms.values() for part in tx.parts)

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The extra values that are read inside."""
        return tuple({name for tx in self.transforms.values() for name in tx.plan.reads})

    @property
    def evaluates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of the transformations evaluates with other weights."""
        return any(map(evaluates, self.transforms.values()))

    def converted(self, leaves: Leaves, to_eval: bool) -> list[Tensor]:
        """Return each parameter as the transformation of its label evaluates it."""
        names = self.slot_names()
        params = list(leaves.p)
        for label, own, positions in self._parts_of(leaves):
            places = {n: names.index(public) for n, public in self._slots_of(label).items()}
            columns = {name: [row[k] for row in own.slots] for name, k in places.items()}
            found = converted(self.transforms[label].plan, own, columns, to_eval)
            for position, p in zip(positions, found):
                params[position] = p
        return params

    def init_all_slots(self, leaves: Leaves) -> list[tuple[Any, ...]]:
        """Return each parameter's own slots, ``None`` for the others'."""
        found: list[dict[str, Any]] = [{} for _ in leaves.index]
        for label, own, positions in self._parts_of(leaves):
            tx = self.transforms[label]
            public = self._slots_of(label)
            for number, part in enumerate(tx.plan.parts):
                rows = tx.plan.rows_of(number, own.hyper)
                slots = part_slots(part, dataclasses.replace(own, hyper=rows))
                for position, values in zip(positions, slots):
                    names = [public[name] for name in tx.plan.slots[number]]
                    found[position].update(zip(names, values))
        return [tuple(slots.get(name) for name in self.slot_names()) for slots in found]

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """Run each transformation on its parameters."""
        names = self.slot_names()
        updates: list[Any] = list(leaves.g)
        slots = [list(row) for row in leaves.slots]
        for label, own, positions in self._parts_of(leaves):
            tx = self.transforms[label]
            places = {name: names.index(public) for name, public in self._slots_of(label).items()}
            columns = {name: [row[k] for row in own.slots] for name, k in places.items()}
            results, _ = run(tx.plan, own, columns)
            for number, position in enumerate(positions):
                updates[position] = results[number]
                for name, k in places.items():
                    slots[position][k] = columns[name][number]
        return updates, [tuple(row) for row in slots]

    def _parts_of(self, leaves: Leaves) -> list[tuple[str, Leaves, list[int]]]:
        """Return the labels that have parameters here, with those and their positions."""
        labels = label_leaves(self, leaves.call)
        parts = []
        for label, tx in self.transforms.items():
            positions = [k for k, i in enumerate(leaves.index) if labels[i] == label]
            if positions:
                own = leaves.subset(positions)
                rows = _own_rows(label, tx, own.hyper)
                parts.append((label, dataclasses.replace(own, hyper=rows), positions))
        return parts


def _own_rows(label: str, tx: GradientTransformation, rows: list[Any]) -> list[dict[str, Any]]:
    """Return the hyperparameters of one label; rows that are one object stay one object."""
    names = [*tx.hyper_specs(), *tx.plan.counters]
    own: dict[int, dict[str, Any]] = {}
    for row in rows:
        if id(row) not in own:
            own[id(row)] = {name: row[f"{label}.{name}"] for name in names}
    return [own[id(row)] for row in rows]


def label_leaves(part: Partition, call: Call) -> list[str]:
    """Return the label of every parameter of a call.

    Raises:
        ValueError: If the labels do not match the parameters, or one has no transformation.
    """
    if call.labels is not None:
        return call.labels
    labels = part.labels(call.reference) if callable(part.labels) else part.labels
    values = resolving.match_by_name("labels", labels, call.names(), call.known)
    check_labels(part, values, call.names())
    return values


def check_labels(part: Partition, values: list[Any], names: Any) -> None:
    """Refuse labels without a transformation.

    Raises:
        ValueError: Naming the first one.
    """
    for name, value in zip(names, values):
        if not isinstance(value, str) or value not in part.transforms:
            raise ValueError(
                f"labels give {value!r} to parameter {tree.quoted(name)}; there are "
                f"transformations for {list(part.transforms)}."
            )


def partition(
    transforms: Mapping[str, GradientTransformation],
    labels: Union[PyTree, Callable[[PyTree], PyTree]],
) -> GradientTransformation:
    """Give parts of a network their own transformations.

    Each parameter has one label and is updated only by the transformation of that label, which sees
    only its own parameters (a norm is theirs). This is Optax's ``partition``.

    In the object-oriented API every label becomes a parameter group with its own hyperparameters:
    ``optimizer.param_groups[0]["label"]`` is ``"body"``, and its ``"lr"`` is what schedulers and
    checkpoints see. In the other two APIs, hyperparameters are named by label, ``"body.lr"``.

    Args:
        transforms: The transformations by label.
        labels: A tree of labels with the structure of the parameters, or with one label for a whole
            sub-tree (``{"body": "slow", "head": "fast"}``), or a function from the parameters to
            such a tree. The parameters are a dict by name in :class:`torchopt.MetaOptimizer` and in
            :class:`torchopt.Optimizer` over ``named_parameters()``, else a list there.

    Raises:
        TypeError: If ``transforms`` is no dict of transformations.
        ValueError: If labels do not match the parameters, or one has no transformation (at the
            first ``init``, and where an :class:`torchopt.Optimizer` is made).

    Slots: those of all. Parameters whose transformations have a slot of the same name share a tree.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.partition(
        ...     {"slow": torchopt.sgd(0.1), "fast": torchopt.adam(1.0)}, {"w": "slow", "b": "fast"}
        ... )
        >>> g = {"w": torch.ones(1), "b": torch.ones(1)}
        >>> tx.update(g, tx.init(g), g)[0]
        {'w': tensor([-0.1000]), 'b': tensor([-1.0000])}
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> tx = torchopt.partition(
        ...     {"body": torchopt.adamw(1e-3), "head": torchopt.sgd(0.1)},
        ...     {"0": "body", "1": "head"},
        ... )
        >>> optimizer = torchopt.Optimizer(net.named_parameters(), tx)
        >>> [(group["label"], group["lr"]) for group in optimizer.param_groups]
        [('body', 0.001), ('head', 0.1)]
    """
    if isinstance(transforms, Mapping):
        own = [as_transformation(tx) for tx in transforms.values()]
        if all(isinstance(tx, GradientTransformation) for tx in own):
            own = distinct(own)
        transforms = dict(zip(transforms, own))
    return Partition(transforms, labels)
