"""Keep hyperparameters in the state, where they can be read and set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, overload

from torch import Tensor

from torchopt.core import hyper
from torchopt.core.pair import as_transformation
from torchopt.core.slots import Counter
from torchopt.core.transform import GradientTransformation, check_transformation, transformation
from torchopt.transforms.named import Delegating
from torchopt.typing import Step


P = ParamSpec("P")


@transformation
class InjectHyperparams(Delegating):
    """Count hyperparameters as the state's; see :func:`inject_hyperparams`."""

    inner: GradientTransformation

    def injected(self) -> dict[str, Any]:
        """Return the hyperparameters that the state keeps, as they were given."""
        specs = self.inner.hyper_specs()
        values = self.inner.hyperparameters()
        return {n: v for n, v in values.items() if _is_one(v) and not specs[n].fixed}

    def hyper_specs(self) -> dict[str, hyper.HyperSpec]:
        """Return the other hyperparameters."""
        kept = self.injected()
        return {n: spec for n, spec in self.inner.hyper_specs().items() if n not in kept}

    def hyperparameters(self) -> dict[str, Any]:
        """Return the other hyperparameters."""
        kept = self.injected()
        return {n: v for n, v in self.inner.hyperparameters().items() if n not in kept}

    @property
    def uses_step(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner transformation reads the step count, or a schedule does."""
        return True

    @property
    def counters(self) -> tuple[Counter, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The hyperparameters, and the counters of the inner transformation."""
        own = [Counter(name, _at(value, 0)) for name, value in self.injected().items()]
        return (*own, *self.inner.plan.renamed_counters())

    def count(self, t: Step, *args: Any, **values: Any) -> dict[str, Any]:
        """Return the hyperparameters for an update: schedules recomputed, others as kept."""
        injected = self.injected()
        kept = {n: _at(v, t - 1) if _is_schedule(v) else values[n] for n, v in injected.items()}
        return {**kept, **super().count(t, **{**values, **kept})}


def _is_schedule(value: Any) -> bool:
    return callable(value) and not isinstance(value, Tensor)


def _is_one(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return _is_schedule(value) or (isinstance(value, (int, float)) and type(value) is not bool)


def _at(value: Any, count: Any) -> Any:
    value = value(count) if _is_schedule(value) else value
    return float(value) if isinstance(value, int) else value


@overload
def inject_hyperparams(inner: GradientTransformation) -> GradientTransformation: ...


@overload
def inject_hyperparams(
    inner: Callable[P, GradientTransformation],
) -> Callable[P, GradientTransformation]: ...


def inject_hyperparams(inner: Any) -> GradientTransformation:  # pyright: ignore[reportInconsistentOverload]
    """Keep the hyperparameters of a transformation in its state.

    There :func:`torchopt.tree_get` reads them and :func:`torchopt.tree_set` sets them between two
    updates: by hand, depending on a loss, or in a function that is traced or mapped. A tensor takes
    part in derivatives of the state. A schedule is computed at each update, and the state shows the
    value that the last update used; setting it has no effect.

    Pairs (``betas``), flags and values by parameter stay where they are. In the object-oriented API
    hyperparameters are in ``param_groups`` anyway, and schedulers do not reach those in the state.

    Args:
        inner: The transformation; or, as in Optax, the recipe: ``inject_hyperparams(torchopt.sgd)``
            is one then.

    Raises:
        TypeError: If ``inner`` is neither.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.inject_hyperparams(torchopt.sgd(lr=0.1))
        >>> g = [torch.ones(1)]
        >>> state = tx.init(g)
        >>> torchopt.tree_get(state, "lr")
        0.1
        >>> state = torchopt.tree_set(state, lr=0.5)
        >>> tx.update(g, state, g)[0]
        [tensor([-0.5000])]
    """
    if callable(inner) and not isinstance(inner, (type, GradientTransformation)):
        recipe: Any = inner
        return lambda *args, **kwargs: inject_hyperparams(recipe(*args, **kwargs))  # pyright: ignore[reportReturnType]
    inner = as_transformation(inner)
    check_transformation(inner, "inject_hyperparams")
    return InjectHyperparams(inner.renewed())
