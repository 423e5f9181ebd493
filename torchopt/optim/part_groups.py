"""Parts with transformations of their own as parameter groups of an object-oriented optimizer.

Schedulers and checkpoints know one learning rate for each group, ``group["lr"]``. So each label of
a :func:`torchopt.partition` becomes a group, and a chain of masks that exclude each other is taken
for a partition. Where a rate remains out of reach the user is told.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from torchopt.core import hyper, resolving
from torchopt.core.chaining import chain
from torchopt.core.engine import Call
from torchopt.core.transform import GradientTransformation
from torchopt.optim.protocols import OptimizerLike
from torchopt.transforms.basic import Scale, identity
from torchopt.transforms.partition import Partition, check_labels
from torchopt.transforms.wrap import Masked, mask_leaves


#: The label of parameters that no mask selects.
REST = "rest"
#: In a group that is being added: where its parameters stood among those given.
PLACES = "places"


class PartGroups:
    """How the groups of one optimizer hold the hyperparameters of a partition.

    Args:
        tx: The transformation, of which one part is a partition.
    """

    def __init__(self, tx: GradientTransformation) -> None:
        (self.position,) = (
            k for k, part in enumerate(tx.plan.parts) if isinstance(part, Partition)
        )
        self.partition: Any = tx.plan.parts[self.position]
        self.tx = tx
        own = tx.plan.fields[self.position]
        outer = [name for name in tx.plan.hyper_specs if name not in own.values()]
        self.defaults = {name: tx.plan.values[name] for name in outer}
        # label -> name in its groups -> name in the transformation
        self.names: dict[str, dict[str, str]] = {}
        for label, transform in self.partition.transforms.items():
            names = {name: name for name in outer}
            for field in transform.hyper_specs():
                names[_free(field, names)] = own[f"{label}.{field}"]
            self.names[label] = names
        self.places: list[list[int]] = []  # of the parameters of each group, as they were given

    def specs(self, group: Mapping[str, Any]) -> dict[str, hyper.HyperSpec]:
        """Return the hyperparameters that a group holds."""
        specs = self.tx.plan.hyper_specs
        return {name: specs[public] for name, public in self.names[self.label(group)].items()}

    def label(self, group: Mapping[str, Any]) -> str:
        """Return the label of a group.

        Raises:
            ValueError: If there is no transformation for it.
        """
        label = group.get("label")
        if label not in self.names:
            raise ValueError(
                f"A parameter group has the label {label!r}; there are transformations for "
                f"{list(self.names)}."
            )
        return str(label)

    def transform_of(self, group: Mapping[str, Any]) -> GradientTransformation:
        """Return the transformation of a group's label."""
        return self.partition.transforms[self.label(group)]

    def row(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters of the transformation, as a group has them now."""
        values, specs = self.tx.plan.values, self.tx.plan.hyper_specs
        names = self.names[self.label(group)]
        own = {public: group.get(name, values[public]) for name, public in names.items()}
        # nothing reads the others' values, which may be dicts by the names of their parameters
        others = {n: values[n] if s.fixed else (0.0,) * s.length or 0.0 for n, s in specs.items()}
        return {**others, **own}

    def completed(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return a group with what it lacks."""
        values = self.tx.plan.values
        names = self.names[self.label(group)]
        complete = {**{name: values[public] for name, public in names.items()}, **group}
        if "lr" not in names and any("lr" in others for others in self.names.values()):
            complete.setdefault("lr", 0.0)  # nothing reads it; schedulers want one in each group
        return complete

    def divided(self, groups: Sequence[Any]) -> list[dict[str, Any]]:
        """Return groups of one label each, complete; the labels are read here, once."""
        groups = [_listed(group) for group in groups]
        taken = sum(map(len, self.places))
        labels = iter(self._labels([p for group in groups for p in group["params"]]))
        result = []
        for group in groups:
            by_label: dict[str, list[Any]] = {}
            places: dict[str, list[int]] = {}
            for param in group["params"]:
                label = next(labels)
                by_label.setdefault(label, []).append(param)
                places.setdefault(label, []).append(taken)
                taken += 1
            for label in self.names:
                if label in by_label:
                    own = {**group, "params": by_label[label], "label": label}
                    result.append({**self.completed(own), PLACES: places[label]})
        return result

    def _labels(self, params: list[Any]) -> list[str]:
        named = bool(params) and all(isinstance(p, tuple) for p in params)
        names = [p[0] for p in params] if named else list(map(str, range(len(params))))
        labels = self.partition.labels
        if callable(labels):
            labels = labels(dict(params) if named else list(params))
        if isinstance(labels, Mapping) and not named:
            raise ValueError(
                "labels are given by name, and the parameters have none: make the optimizer over "
                "net.named_parameters()."
            )
        if isinstance(labels, (list, tuple)) and len(labels) != len(names):
            raise ValueError(
                f"There are {len(labels)} labels for {len(names)} parameters. To a group that is "
                'added later give its own: {"params": ..., "label": ...}.'
            )
        values = resolving.match_by_name("labels", labels, names)
        check_labels(self.partition, values, names)
        return values

    def place(self, group: Mapping[str, Any], places: list[int] | None) -> None:
        """Remember where the parameters of a new group stood among those given."""
        taken = sum(map(len, self.places))
        self.places.append(places or list(range(taken, taken + len(group["params"]))))

    def order(self, groups: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return where the parameters, in the order they were given in, stand in the groups.

        What lists one value for each parameter (a mask) has that order.
        """
        places = [place for own in self.places for place in own]
        if [len(g["params"]) for g in groups] != list(map(len, self.places)):
            return list(range(sum(len(g["params"]) for g in groups)))  # groups were taken away
        return sorted(range(len(places)), key=places.__getitem__)


def divide(tx: GradientTransformation, params: Any) -> tuple[Any, PartGroups | None, Any]:
    """Return the transformation, how its groups are made, and the groups.

    Where there is nothing to divide, the last two are ``None`` and ``params``.
    """
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        return tx, None, params  # which torch.optim refuses
    partitions = [part for part in tx.plan.parts if isinstance(part, Partition)]
    rated = [part for part in tx.plan.parts if isinstance(part, Masked) and _rates(part)]
    if len(partitions) != 1 and (partitions or len(rated) < 2):
        return tx, None, params
    items = list(params)
    groups = (
        [dict(x) for x in items] if items and isinstance(items[0], dict) else [{"params": items}]
    )
    if not items or not all("params" in group for group in groups):
        return tx, None, items
    groups = [_listed(group) for group in groups]
    given = [p for group in groups for p in group["params"]]
    if not all(isinstance(p[-1] if isinstance(p, tuple) and p else p, Tensor) for p in given):
        return tx, None, groups  # which torch.optim refuses
    if not partitions:
        converted = _from_masks(tx, given)
        if converted is None:
            return tx, None, groups
        _refuse_other_names(tx, converted, groups)
        tx = converted
    made = PartGroups(tx)
    return tx, made, made.divided(groups)


def _rates(part: GradientTransformation) -> list[str]:
    return [name for name in part.hyper_specs() if re.fullmatch(r"lr(_\d+)?", name)]


def _listed(group: Mapping[str, Any]) -> dict[str, Any]:
    params = group["params"]
    return {**group, "params": [params] if isinstance(params, Tensor) else list(params)}


def _from_masks(tx: GradientTransformation, params: list[Any]) -> GradientTransformation | None:
    """Return a chain with masks that exclude each other as one with a partition.

    ``None`` if they do not stand together, or overlap.
    """
    parts = list(tx.plan.parts)
    positions = [k for k, part in enumerate(parts) if isinstance(part, Masked) and _rates(part)]
    first, last = positions[0], positions[-1] + 1
    if positions != list(range(first, last)):
        return None
    masked: list[Any] = parts[first:last]
    transforms = {f"masked_{number}": part.inner for number, part in enumerate(masked, 1)}
    labels = MaskLabels([part.mask for part in masked])
    named = all(isinstance(p, tuple) for p in params)
    if labels.overlap(dict(params) if named else params):
        return None
    return chain(*parts[:first], Partition({**transforms, REST: identity()}, labels), *parts[last:])


class MaskLabels:
    """The labels that masks give."""

    def __init__(self, masks: Sequence[Any]) -> None:
        self._masks = list(masks)

    def __call__(self, params: Any) -> list[str]:
        """Return the label of each parameter: that of the mask which selects it."""
        rows = self._rows(params)
        return [f"masked_{row.index(True) + 1}" if True in row else REST for row in rows]

    def overlap(self, params: Any) -> bool:
        """Whether two masks select the same parameter."""
        return any(sum(row) > 1 for row in self._rows(params))

    def _rows(self, params: Any) -> list[list[bool]]:
        named = isinstance(params, dict)
        tensors = list(params.values()) if named else list(params)
        names = list(params) if named else list(map(str, range(len(tensors))))
        call = Call(tensors, tensors, [], {}, [], lambda: names, tensors)
        return [list(row) for row in zip(*(mask_leaves(mask, call) for mask in self._masks))]


def _refuse_other_names(
    old: GradientTransformation, new: GradientTransformation, groups: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse names of the flat chain in groups, where each part has its own."""
    known = {name for names in PartGroups(new).names.values() for name in names}
    for name in set(old.hyper_specs()) - known:
        if any(name in group for group in groups):
            raise ValueError(
                f"A parameter group sets {name!r}, but each masked part gets a group of its own "
                f"here, with its own {re.sub(r'_[0-9]+$', '', name)!r}. Use torchopt.partition."
            )


def warn_of_hidden_rates(optimizer: OptimizerLike) -> None:
    """Tell which learning rates ``group["lr"]`` does not reach."""
    tx, title = optimizer.transformation, type(optimizer).__name__
    plan = tx.plan
    for group in optimizer.param_groups:
        names = list(optimizer.group_specs(group))
        rates = [n for n in names if re.fullmatch(r"(.*\.)?lr(_\d+)?", n)]
        hidden = [name for name in rates if name != "lr"]
        plain = any(
            _rates(part) for part in plan.parts if not isinstance(part, (Masked, Partition))
        )
        scales = [] if plain else _negative_scales(plan.parts, group.get("label"))
        if not hidden and not scales:
            continue
        what = f"the hyperparameters {hidden}" if hidden else f"the factors {scales}"
        advice = "Write torchopt.scale_by_learning_rate(lr) instead of torchopt.scale(-lr)."
        if hidden:
            advice = (
                "Give parts of the network transformations of their own with torchopt.partition("
                '{"body": ..., "head": ...}, labels): each has a parameter group with its own "lr".'
            )
        warnings.warn(
            f"{title} has learning rates that schedulers and torch.distributed.checkpoint do not "
            f'reach, since they only know group["lr"]: {what} of {tx!r}. {advice}',
            stacklevel=4,
        )
        return


def _negative_scales(parts: Sequence[Any], label: Any) -> list[float]:
    """Return the factors that are learning rates in all but name."""
    found: list[float] = []
    for part in parts:
        if isinstance(part, Masked):
            if not _rates(part):
                found += _negative_scales(part.inner.plan.parts, label)
        elif isinstance(part, Partition):
            own = part.transforms.get(label)
            if own is not None and not _rates(own):
                found += _negative_scales(own.plan.parts, None)
        elif isinstance(part, Scale) and isinstance(part.step_size, (int, float)):
            found += [part.step_size] if part.step_size < 0 else []
    return found


def _free(name: str, taken: Iterable[str]) -> str:
    candidate, occurrence = name, 1
    while candidate in taken:
        occurrence += 1
        candidate = f"{name}_{occurrence}"
    return candidate


def parameter_names(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Return a name of each parameter: its own, or where it stands."""
    names: list[str] = []
    for index, group in enumerate(groups):
        given = group.get("param_names")
        names += given or [
            f"param_groups[{index}]['params'][{k}]" for k in range(len(group["params"]))
        ]
    return names
