"""Networks whose parameters get their gradients from values of the objective alone."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchopt.base.eager import eager
from torchopt.base.misuse.given import given
from torchopt.diff.zero_order.smoothing import Estimator, may_be_recorded


class ZeroOrderGradientModule(nn.Module):
    r"""A network whose ``forward`` returns an objective, differentiated by its values.

    The parameters that require grad get the gradient of the objective smoothed by noise,

    .. math:: F(w) = \operatorname E f(w + \sigma z),

    estimated as :func:`torchopt.diff.zero_order.zero_order` does, which says what value and
    derivatives are. Those by inputs are autograd's, for the parameters as they are. ::

        class Net(ZeroOrderGradientModule, method="antithetic", num_samples=100, sigma=0.1): ...

    Define ``forward(*args, **kwargs)``, which returns a scalar; it may be called with noise in all
    parameters at once, by ``torch.vmap``. Define ``sample(sample_shape)`` where the noise is not
    standard normal, or where it is to come from a generator of your own. Each parameter asks it for
    noise in its shape, for each sample.

    Args:
        method: ``"naive"``, ``"forward"`` or ``"antithetic"``.
        num_samples: How many perturbations.
        sigma: How large they are.
        vectorize: Whether all samples are computed in one ``torch.vmap``; ``None`` tries, and warns
            if that fails.
        chunk_size: With ``torch.vmap``, at most how many samples at a time.

    These are arguments of the class; a subclass has those of its base where it says nothing else.
    ``forward`` should change no buffers: BatchNorm belongs in ``eval()``.

    Raises:
        TypeError: At the definition of a class whose ``forward`` is no ordinary method, or for an
            argument of another type.
        ValueError: At the definition, for an argument out of bounds.
        RuntimeError: In a call of a network without parameters.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.nn import ZeroOrderGradientModule
        >>> class Errors(ZeroOrderGradientModule, method="antithetic", num_samples=500, sigma=0.5):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(2, 1)
        ...
        ...     def forward(self, x, y):  # how many are wrong: no gradient
        ...         return ((self.linear(x).squeeze(-1) > 0) != y).float().mean()
        ...
        ...     def sample(self, sample_shape=torch.Size()):
        ...         return torch.randn(sample_shape)
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 2)
        >>> net, y = Errors(), x[:, 0] > x[:, 1]
        >>> optimizer = torchopt.Adam(net.parameters(), lr=0.1)
        >>> for _ in range(30):
        ...     optimizer.zero_grad()
        ...     net(x, y).backward()
        ...     optimizer.step()
        >>> net(x, y).item() < 0.1
        True

    Reference:
        As of :func:`torchopt.diff.zero_order.zero_order`.
    """

    _settings: ClassVar[dict[str, Any]] = {}
    _estimator: ClassVar[Estimator]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__()
        known = {"method", "num_samples", "sigma", "vectorize", "chunk_size"}
        if strange := sorted(options.keys() - known):
            raise TypeError(
                f"class {cls.__name__}(ZeroOrderGradientModule, ...) has no argument "
                f"{strange[0]!r}; it has {sorted(known)}."
            )
        cls._settings = {**cls._settings, **options}
        cls._estimator = Estimator(f"{cls.__name__}.forward", cls.__name__, **cls._settings)
        if "forward" in vars(cls):
            cls.forward = _smoothed(vars(cls)["forward"], cls)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the objective, a scalar. Define it."""
        raise NotImplementedError(
            f"{type(self).__name__} must define forward(...), which returns the objective."
        )

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - as distributions have it
        """Return noise of a shape; standard normal, unless it is defined otherwise."""
        return torch.randn(sample_shape)


class _Inner(nn.Module):
    """A network under another ``forward``, for ``functional_call``."""

    def __init__(self, inner: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.inner, *args, **kwargs)


#: The networks whose parameters are perturbed at the moment.
_perturbed: contextvars.ContextVar[tuple[int, ...]] = contextvars.ContextVar(
    "_perturbed", default=()
)


def _smoothed(function: Any, owner: type) -> Any:
    """Return a ``forward`` that has the gradient of its smoothed self.

    Where the parameters are perturbed already (it is ``super().forward()``), it is the plain one.

    Raises:
        TypeError: If it is no ordinary method.
    """
    if isinstance(function, (staticmethod, classmethod)) or not callable(function):
        raise TypeError(f"{owner.__name__}.forward must be a method, got {given(function)}.")

    @functools.wraps(function)
    @eager
    def forward(self: ZeroOrderGradientModule, *args: Any, **kwargs: Any) -> Any:
        named = {f"inner.{name}": p for name, p in self.named_parameters()}
        if not named:
            raise RuntimeError(f"{type(self).__name__} has no parameters to perturb.")
        trained = {name: p for name, p in named.items() if may_be_recorded(p)}
        if not trained or id(self) in _perturbed.get():
            return function(self, *args, **kwargs)
        inner = _Inner(self, function)

        def objective(leaves: list[Tensor]) -> Any:
            weights = dict(zip(trained, leaves))
            return torch.func.functional_call(inner, weights, args, kwargs)

        estimator = self._estimator
        at_work = _perturbed.set((*_perturbed.get(), id(self)))
        try:
            return estimator(objective, list(trained.values()), estimator.noise_of(self.sample))
        finally:
            _perturbed.reset(at_work)

    return forward
