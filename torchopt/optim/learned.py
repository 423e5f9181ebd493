"""Hyperparameters as parameters to be learned, within their bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Union

import torch
from torch import Tensor, nn

from torchopt.base import misuse, tree
from torchopt.base.numerics import to_compute_dtype
from torchopt.base.values import describe_values
from torchopt.core import hyper, resolving
from torchopt.core.hyper import HyperSpec
from torchopt.core.pair import as_transformation
from torchopt.core.reparametrization import Reparametrization, raw_of, reparametrization
from torchopt.core.transform import GradientTransformation, check_transformation
from torchopt.optim.learned_places import Place, connect_to, write_numbers_to
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.typing import PyTree


#: What has a value of its own.
EACH = ("group", "parameter", "entry")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One raw tensor: of which hyperparameter it is, and what it stands for."""

    place: Place
    way: Reparametrization


class LearnedHyperparameters(nn.Module):
    """Hyperparameters of an optimizer as parameters of a module, which an outer optimizer learns.

    Each is computed from an unbounded number, so that it stays within the bounds that every call
    checks, no matter how the outer optimizer changes that number. By default a hyperparameter with
    a lower bound (a learning rate) is an exponential, and one with two bounds (``betas``) a sigmoid
    between them.

    Args:
        tx: The transformation whose hyperparameters begin; or a :class:`torchopt.MetaOptimizer`,
            for values of each of its groups.
        names: Which: a name, several (``"betas[1]"`` is one of a pair), or a dict of names with
            what ``each`` is for them. ``None`` for all numbers that lie inside of their bounds;
            those on a bound (a momentum or weight decay of 0) are switched off and stay so.
        each: What has a value of its own: the ``"group"``, every ``"parameter"`` (as in MAML++) or
            every ``"entry"`` of every parameter (as in Meta-SGD).
        of: The parameters, where they matter: a network, or a tree as given to ``init``.
        reparametrization: ``"exp"``, ``"softplus"``, ``"sigmoid"``, ``"identity"`` (which keeps no
            bounds); two numbers, for a sigmoid between them; two functions inverse to each other,
            or a ``torch.distributions.Transform``; or a dict of those by name. ``None`` for what
            the bounds suggest.
        dtype: Of the raw numbers; by default that of the parameters, or torch's.

    Attributes:
        raw: The ``nn.ParameterDict`` of the numbers without bounds.

    Raises:
        TypeError: If there is no such hyperparameter, or it is none that can be learned (a flag, a
            whole number, a schedule).
        ValueError: If a value lies on a bound, or a reparametrization does not keep the bounds.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(3, 1)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> learned = torchopt.LearnedHyperparameters(
        ...     torchopt.sgd(lr=0.1, momentum=0.9),
        ...     {"lr": "parameter", "momentum": "group"},
        ...     of=net,
        ...     reparametrization={"momentum": (0, 1)},
        ... )
        >>> sorted(learned.raw)
        ['lr/bias', 'lr/weight', 'momentum']
        >>> outer = torchopt.Adam(learned.parameters(), lr=0.01)
        >>> with torchopt.inner_loop(net, learned.transformation()) as inner:
        ...     for _ in range(3):
        ...         inner.step((net(x) - y).square().mean())
        ...     (net(x) - y).square().mean().backward()
        >>> outer.step()
        >>> 0 < learned.numbers()["momentum"] < 1
        True
    """

    def __init__(
        self,
        tx: GradientTransformation | MetaOptimizer,
        names: Union[str, Sequence[str], Mapping[str, str], None] = None,
        *,
        each: str = "group",
        of: nn.Module | PyTree | None = None,
        reparametrization: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(tx, MetaOptimizer):
            self._tx = tx.transformation
            groups = [{k: v for k, v in g.items() if k != "params"} for g in tx.param_groups]
            around = [dict(group["params"].named_parameters()) for group in tx.param_groups]
        else:
            self._tx = as_transformation(tx)
            check_transformation(self._tx, type(self).__name__)
            groups = [self._tx.hyperparameters()]
            around = [_named(of)]
        self._groups = groups  # as they were given: what is not learned stays so
        specs = self._tx.hyper_specs()
        self.raw = nn.ParameterDict()
        self._entries: dict[str, _Entry] = {}
        chosen = _chosen(names, each, specs, groups)
        ways = _by_name(reparametrization, chosen)
        for (name, index), what in chosen.items():
            for number, (group, params) in enumerate(zip(groups, around)):
                spec = specs[name] if index is None else specs[name].of_element(index)
                place = Place(number if len(groups) > 1 else None, name, index, None)
                way = _way(place, spec, ways)
                for own, value in _begun(place, group, spec, what, params, dtype):
                    raw = raw_of(place.title, way, value, spec).to(value)
                    self.raw[own.key] = nn.Parameter(raw)
                    self._entries[own.key] = _Entry(own, way)

    def forward(self, group: int = 0) -> dict[str, Any]:
        """Return the hyperparameters of a group by name, connected to the raw numbers."""
        return self._collected(group, lambda entry, raw: entry.way.value(raw))

    def numbers(self, group: int = 0) -> dict[str, Any]:
        """Return them as plain numbers, arguments of the recipe; tensors if they are of entries."""

        def number(entry: _Entry, raw: Tensor) -> Any:
            value = entry.way.value(raw.detach())
            return value.item() if value.dim() == 0 and not entry.place.entries else value

        return self._collected(group, number)

    def transformation(self, *, detach: bool = False) -> GradientTransformation:
        """Return the transformation with these hyperparameters.

        Args:
            detach: As plain numbers, for training with what was learned; else connected, for
                :func:`torchopt.inner_loop` and for ``update(..., inplace=False)``.

        Raises:
            ValueError: If there are several groups.
        """
        if len(self._groups) > 1:
            raise ValueError(
                f"There are {len(self._groups)} groups with hyperparameters of their own, and a "
                "transformation has one: write connect_to(optimizer) or write_to(optimizer)."
            )
        return self._tx.with_hyperparameters(self.numbers() if detach else self())

    def connect_to(self, optimizer: MetaOptimizer) -> None:
        """Put them into the groups of a differentiable optimizer, connected to the raw numbers.

        Call it in each round: what stood there is connected to the raw numbers as they were.

        Raises:
            TypeError: For another optimizer, which could not pass a derivative.
            ValueError: If its groups are others. Nothing has changed then.
        """
        connect_to(optimizer, self._values_of_groups(self))

    def write_to(self, optimizer: MetaOptimizer | torch.optim.Optimizer) -> None:
        """Write them into the groups of an optimizer as plain numbers: what was learned is in use.

        Args:
            optimizer: A :class:`torchopt.MetaOptimizer`, a :class:`torchopt.Optimizer`, or one of
                ``torch.optim``, which has one number for each group.

        Raises:
            TypeError: If it is none of those, or has no place for values by parameter.
            ValueError: If its groups are others. Nothing has changed then.
        """
        write_numbers_to(optimizer, self._values_of_groups(self.numbers))

    def _values_of_groups(self, values: Any) -> list[dict[str, Any]]:
        return [values(number) for number in range(len(self._groups))]

    def _collected(self, group: int, made: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, entry in self._entries.items():
            place = entry.place
            if (place.group or 0) != group:
                continue
            value = made(entry, self.raw[key])
            if place.index is not None:
                given = self._groups[group][place.name]
                pair = found.setdefault(place.name, list(given))
                if place.parameter is None:
                    pair[place.index] = value
                else:
                    if pair[place.index] is given[place.index]:
                        pair[place.index] = {}
                    pair[place.index][place.parameter] = value
            elif place.parameter is None:
                found[place.name] = value
            else:
                found.setdefault(place.name, {})[place.parameter] = value
        return {n: tuple(v) if isinstance(v, list) else v for n, v in found.items()}

    def extra_repr(self) -> str:
        """Show the hyperparameters as they are now."""
        shown = [f"{misuse.clipped(repr(self._tx))}"]
        for number in range(len(self._groups)):
            values = self._collected(
                number, lambda entry, raw: entry.way.value(raw.detach()).requires_grad_()
            )
            own = ", ".join(f"{name}={describe_values(value)}" for name, value in values.items())
            shown.append(own if len(self._groups) == 1 else f"({number}): {own}")
        return "\n".join(shown)


def _named(of: Any) -> dict[str, Tensor] | None:
    """Return parameters by name."""
    if of is None:
        return None
    if isinstance(of, nn.Module):
        return dict(of.named_parameters())
    misuse.check_trees({"of": of})
    return dict(zip(tree.leaf_names(of), tree.flatten(of)[0]))


def _chosen(
    names: Any, each: str, specs: Mapping[str, HyperSpec], groups: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, int | None], str]:
    """Return which hyperparameters are learned, pairs taken apart, and what has its own value."""
    automatic = names is None
    if automatic:
        names = [n for n, s in specs.items() if not s.fixed]
    wanted = dict(names) if isinstance(names, Mapping) else {}
    wanted = wanted or dict.fromkeys([names] if isinstance(names, str) else names, each)
    chosen: dict[tuple[str, int | None], str] = {}
    for title, what in wanted.items():
        if what not in EACH:
            raise ValueError(f"each must be one of {list(EACH)}, for {title!r} it is {what!r}.")
        name, _, index = title.partition("[")
        spec = specs.get(name)
        if spec is None or (index and (not spec.length or index.rstrip("]") not in "0123456789")):
            raise TypeError(
                f"{title!r} is no hyperparameter; those are {list(specs)}, and of a pair "
                "'betas[0]'."
            )
        if spec.fixed:
            raise TypeError(f"{title} is {_kind(spec)}, which cannot be learned.")
        places = [int(index.rstrip("]"))] if index else range(spec.length)
        for place in places if spec.length else (None,):
            own = spec if place is None else spec.of_element(place)
            values = [g[name] if place is None else g[name][place] for g in groups]
            if automatic and not all(_is_inside(value, own) for value in values):
                continue
            if what == "entry" and spec.scalar:
                raise ValueError(f"{title} is of a parameter as a whole: take each='parameter'.")
            chosen[name, place] = what
    if not chosen:
        raise ValueError(f"There is no hyperparameter to learn among {list(specs)}.")
    return chosen


def _kind(spec: HyperSpec) -> str:
    return "a flag" if spec.flag else "a whole number" if spec.integer else "one of several values"


def _is_inside(value: Any, spec: HyperSpec) -> bool:
    """Whether a number lies inside of its bounds, not on one; of tensors it is not asked."""
    if value is None or hyper.has_schedule(value):
        return False
    bounds = (spec.ge, spec.gt, spec.le, spec.lt)
    return all(x not in bounds for x in hyper.numbers_in(value))


def _by_name(given: Any, chosen: Mapping[tuple[str, int | None], str]) -> Any:
    if isinstance(given, Mapping):
        known = {n for n, _ in chosen} | {f"{n}[{k}]" for n, k in chosen if k is not None}
        for name in given:
            if name not in known:
                raise TypeError(
                    f"reparametrization has an entry {name!r}, which is not learned; learned are "
                    f"{sorted(known)}."
                )
    return given


def _way(place: Place, spec: HyperSpec, ways: Any) -> Reparametrization:
    if isinstance(ways, Mapping):
        ways = ways.get(place.title, ways.get(place.name))
    return reparametrization(place.title, spec, ways)


def _begun(
    place: Place,
    group: Mapping[str, Any],
    spec: HyperSpec,
    each: str,
    params: Mapping[str, Tensor] | None,
    dtype: torch.dtype | None,
) -> list[tuple[Place, Tensor]]:
    """Return the values to begin with, and whose they are."""
    value = group[place.name] if place.index is None else group[place.name][place.index]
    if value is None or hyper.has_schedule(value):
        what = "None" if value is None else "a schedule"
        raise TypeError(
            f"{place.title} is {what}: give the number to begin with. (A schedule has tensors of "
            "its own to learn.)"
        )
    like = next((to_compute_dtype(p) for p in (params or {}).values()), torch.empty(0))
    if each == "group":
        if not isinstance(value, (int, float)) and not (
            isinstance(value, Tensor) and value.numel() == 1
        ):
            raise ValueError(
                f"{place.title} has several values to begin with: take each='parameter' or 'entry'."
            )
        return [(place, _tensor(value, like, dtype).reshape(()))]
    if params is None:
        raise TypeError(
            f"A value of each {each} needs to know the parameters: give of=net, or the tree of "
            "parameters."
        )
    title, leaves, names = place.title, list(params.values()), list(params)
    rows = resolving.resolve({title: value}, {title: spec}, leaves, lambda: names, 0)
    found = []
    for (name, param), row in zip(params.items(), rows):
        own = _tensor(row[title], to_compute_dtype(param), dtype)
        if each == "entry":
            own = own.expand(param.shape).clone()
        elif own.numel() > 1:
            raise ValueError(
                f"{title} has a value for each entry of {tree.quoted(name)} to begin with: take "
                "each='entry'."
            )
        else:
            own = own.reshape(())
        found.append((dataclasses.replace(place, parameter=name, entries=each == "entry"), own))
    return found


def _tensor(value: Any, like: Tensor, dtype: torch.dtype | None) -> Tensor:
    real = torch.empty(0, dtype=like.dtype).abs().dtype  # of a complex parameter
    return torch.as_tensor(value, dtype=dtype or real, device=like.device).detach()
