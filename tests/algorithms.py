"""What a row of the table of algorithms says, and what laws read from it: see ``cases.py``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from closed_forms import ClosedForm

import torchopt


F64 = {"dtype": torch.float64}
#: What a hyperparameter of this name may be, in every algorithm; a row may say otherwise.
BOUNDS = {
    "lr": ">= 0",
    "betas": ">= 0 and < 1",
    "eps": ">= 0",
    "eps_root": ">= 0",
    "weight_decay": ">= 0",
    "momentum": ">= 0",
    "dampening": "any number",
    "alpha": ">= 0 and < 1",
    "initial_scale": ">= 0",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Algorithm:
    """One algorithm: a row of the table.

    Attributes:
        recipe: The functional face, ``torchopt.adam``.
        cls: The object-oriented face, ``torchopt.Adam``.
        meta: The differentiable face, ``torchopt.MetaAdam``; ``None`` if there is none.
        torch_cls: The class of ``torch.optim`` that does the same, or ``None``. A configuration
            with an argument that it does not take has no twin there.
        configurations: Those whose graphs differ, every argument as a number; ``""`` has the name
            of the recipe alone. Values are not the defaults, so that each one matters.
        slots: All buffers that it may keep.
        shapes: For each of them whose shape is not that of the parameter, a function from the
            parameter's shape to its own: factored moments, a 0-d number.
        definite: Slots that are sums of squares: matrices without negative eigenvalues.
        size: What its rule reads at once: one ``"entry"``, one whole ``"tensor"``, or ``"all"``.
        fused: Whether kernels compute it.
        needs_params: Whether ``update`` needs the parameters also without weight decay.
        decoupled_decay: Whether weight decay bypasses the gradient.
        shrinks: For decoupled decay other than AdamW's: what a step multiplies a weight that has no
            gradient by, as a function of the numbers of a configuration.
        decays: Numbers by which weights shrink, whatever the gradients are.
        linear: Whether an update is linear in the gradients, where nothing shrinks.
        sparse: Whether it takes sparse gradients (without weight decay).
        twin_of_sparse: The class of ``torch.optim`` that does the same and refuses dense gradients.
        flat: What an update is a piecewise constant function of, names of numbers,
            ``"gradients"`` or ``"slots"``: meta-gradients by it are zero.
        in_places: Numbers that act on some entries only in a few steps.
        read_once: Numbers that are read when a state begins, and not any more.
        constant: Slots that stay what they were at the start.
        may_rest: Whether an entry may rest for a step, after which its slots stand at a corner.
        forgets_start: Whether the first update leaves nothing of a slot as it was.
        starts_moving: Whether its momentum does not start at zero: then parameters move without
            gradients, too.
        rests: How many steps at the start move nothing, and only fill slots.
        occasional: The number that says how many steps apart there is more to do, if there is one:
            the compiler makes a graph with it, and one without.
        formula: What it does in closed form, or ``None``.
        reference: A slow copy that follows the paper, in ``references/``: the oracle of values and
            derivatives for what torch has not.
        oracle: The test file with another oracle of its values, if none of these is one.
        bounds: What its numbers may be where :data:`BOUNDS` does not say, by name; a tuple if it
            differs from place to place.
        fixed: Arguments that are numbers but no hyperparameters.
        of_all_groups: Numbers that torch reads from the constructor only, whatever groups say.
        settled: After how many steps every number matters, and the update is not linear by chance.
        float64_scalars: Whether torch keeps numbers of its own in the default dtype: then it is
            compared under float64.
    """

    recipe: Callable[..., torchopt.GradientTransformation]
    cls: type[torchopt.Optimizer]
    meta: type[torchopt.MetaOptimizer] | None
    torch_cls: type[torch.optim.Optimizer] | None
    configurations: Mapping[str, dict[str, Any]]
    _: dataclasses.KW_ONLY
    slots: tuple[str, ...] = ()
    shapes: Mapping[str, Callable[[torch.Size], tuple[int, ...]]] = dataclasses.field(
        default_factory=dict
    )
    definite: tuple[str, ...] = ()
    size: str = "entry"
    fused: bool = True
    needs_params: bool = False
    decoupled_decay: bool = False
    shrinks: Callable[[Mapping[str, Any]], float] | None = None
    decays: tuple[str, ...] = ("weight_decay",)
    linear: bool = False
    sparse: bool = False
    twin_of_sparse: type[torch.optim.Optimizer] | None = None
    flat: tuple[str, ...] = ()
    in_places: tuple[str, ...] = ()
    read_once: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    may_rest: bool = False
    forgets_start: bool = False
    starts_moving: bool = False
    rests: int = 0
    occasional: str = ""
    formula: ClosedForm | None = None
    reference: Callable[..., Any] | None = None
    oracle: str = ""
    bounds: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    of_all_groups: tuple[str, ...] = ()
    settled: int = 3
    float64_scalars: bool = False

    @property
    def name(self) -> str:
        """The name of the recipe."""
        return self.recipe.__name__

    def defaults(self) -> dict[str, Any]:
        """Return the defaults of the recipe by name, those of the library's own left out."""
        values = inspect.signature(self.recipe).parameters.items()
        return {n: p.default for n, p in values if n not in ("mask", "use_accelerated_op")}

    def numbers(self) -> Iterator[tuple[str, int | None, str]]:
        """Yield each number that the recipe takes: its name, its place in a tuple, its bounds."""
        for name, default in self.defaults().items():
            bounds: dict[str, Any] = {**BOUNDS, **self.bounds}
            if isinstance(default, tuple):
                for place, _ in enumerate(default):
                    own = bounds[name]
                    yield name, place, own[place] if isinstance(own, tuple) else own
            elif isinstance(default, (int, float)) and not isinstance(default, bool):
                yield name, None, bounds[name]

    def flags(self) -> list[str]:
        """Return the names of what is on or off."""
        return [n for n, default in self.defaults().items() if isinstance(default, bool)]

    def specs(self) -> dict[str, Any]:
        """Return what the transformation declares of its hyperparameters."""
        return self.recipe().hyper_specs()

    def cases(self) -> Iterator[Case]:
        """Yield the configurations."""
        for name, kwargs in self.configurations.items():
            yield Case("-".join([self.name, *filter(None, [name])]), self, kwargs)


class Kind(NamedTuple):
    """What the mechanisms of the library may tell configurations apart by."""

    size: str
    fused: bool
    needs_params: bool
    sparse: bool
    has_slots: bool
    has_counters: bool
    uses_step: bool
    other_shapes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One algorithm in one configuration.

    Attributes:
        name: The id of the row in test names.
        algorithm: The row of the table.
        kwargs: Every argument, as numbers.
    """

    name: str
    algorithm: Algorithm
    kwargs: dict[str, Any]

    @property
    def recipe(self) -> Callable[..., torchopt.GradientTransformation]:
        """The functional face."""
        return self.algorithm.recipe

    @property
    def cls(self) -> type[torchopt.Optimizer]:
        """The object-oriented face."""
        return self.algorithm.cls

    @property
    def meta(self) -> Any:
        """The differentiable face."""
        return self.algorithm.meta

    @cached_property
    def torch_cls(self) -> Any:
        """The class of ``torch.optim`` that does the same, or ``None``."""
        twin = self.algorithm.torch_cls
        taken = inspect.signature(twin).parameters if twin is not None else {}
        return twin if self.kwargs.keys() <= taken.keys() else None

    @cached_property
    def tunable(self) -> tuple[str, ...]:
        """The differentiable numbers; ``"betas.0"`` is the first of the pair ``betas``."""
        names: list[str] = []
        for name, value in self.kwargs.items():
            if isinstance(value, tuple):
                names += [f"{name}.{k}" for k, x in enumerate(value) if isinstance(x, float)]
            elif isinstance(value, float) and name not in self.algorithm.fixed:
                names.append(name)
        return tuple(names)

    @cached_property
    def specs(self) -> dict[str, Any]:
        """What the transformation declares of each argument that is a hyperparameter."""
        return self.algorithm.specs()

    def flat(self, name: str) -> bool:
        """Whether meta-gradients by one of ``tunable``, or by ``"gradients"``, are zero."""
        return name.partition(".")[0] in self.algorithm.flat

    @cached_property
    def tunable_by_entry(self) -> tuple[str, ...]:
        """Those of ``tunable`` that may have a value for each entry of a parameter."""
        return tuple(n for n in self.tunable if not self.specs[n.partition(".")[0]].scalar)

    @property
    def decay(self) -> dict[str, float]:
        """The numbers by which weights shrink, where they are not 0."""
        return {n: self.kwargs[n] for n in self.algorithm.decays if self.kwargs.get(n)}

    @property
    def needs_params(self) -> bool:
        """Whether ``update`` needs the parameters."""
        return self.algorithm.needs_params or bool(self.kwargs.get("weight_decay"))

    @property
    def sparse(self) -> bool:
        """Whether it takes sparse gradients."""
        return self.algorithm.sparse and not self.needs_params

    @property
    def complex(self) -> bool:
        """Whether it takes complex numbers."""
        return all(part.accepts_complex for part in self.tx().parts)

    @property
    def scale_free(self) -> bool:
        """Whether updates have the same size whatever the size of the gradients (above 1e-4) is."""
        numbers = [self.value(name) for name in self.tunable if name in ("eps", "eps_root")]
        return not self.algorithm.linear and max(numbers, default=0.0) <= 1e-3

    @cached_property
    def kind(self) -> Kind:
        """What the mechanisms of the library may tell rows apart by."""
        algorithm, tx = self.algorithm, self.tx()
        slots = tx.init(torch.ones(2, 2)).slots
        return Kind(
            algorithm.size,
            algorithm.fused,
            self.needs_params,
            self.sparse,
            bool(slots),
            bool(tx.plan.counters),
            any(part.uses_step for part in tx.parts),
            tuple(sorted(algorithm.shapes.keys() & slots.keys())),
        )

    @cached_property
    def family(self) -> Any:
        """What rows have in common that differ for few mechanisms: see ``sampling.py``."""
        kind = self.kind
        return kind.size, kind.sparse, kind.has_slots, kind.has_counters, bool(kind.other_shapes)

    def value(self, name: str) -> float:
        """Return the number that the row gives to one of ``tunable``."""
        field, _, index = name.partition(".")
        value = self.kwargs[field]
        return value[int(index)] if index else value

    def arguments(self, changed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the arguments with some of ``tunable`` replaced: ``{"betas.0": tensor}``."""
        arguments = dict(self.kwargs)
        for name, value in (changed or {}).items():
            field, _, index = name.partition(".")
            if index:
                values = list(arguments[field])
                values[int(index)] = value
                value = tuple(values)
            arguments[field] = value
        return arguments

    def tx(
        self, changed: Mapping[str, Any] | None = None, use_accelerated_op: bool | None = None
    ) -> torchopt.GradientTransformation:
        """Return the transformation, with some of ``tunable`` replaced."""
        return self.recipe(**self.arguments(changed), use_accelerated_op=use_accelerated_op)

    def larger_eps(self, eps: float = 1e-2) -> dict[str, float]:
        """Return an ``eps`` so large that differences see no kink, where there is one."""
        return {"eps": max(eps, self.value("eps"))} if "eps" in self.tunable else {}

    def smooth(
        self, eps: float = 1e-2, use_accelerated_op: bool | None = None
    ) -> torchopt.GradientTransformation:
        """Return the transformation with a :meth:`larger_eps`."""
        return self.tx(self.larger_eps(eps), use_accelerated_op)

    def tensors(self, **options: Any) -> dict[str, torch.Tensor]:
        """Return every one of ``tunable`` as a float64 tensor of its own."""
        return {name: torch.tensor(self.value(name), **F64, **options) for name in self.tunable}
