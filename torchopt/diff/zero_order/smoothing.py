"""The gradient of a smoothed function, estimated from values of the function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.base.eager import eager
from torchopt.base.levels import is_tracked
from torchopt.base.misuse.given import given
from torchopt.base.torch_internals import in_forward_mode
from torchopt.diff.zero_order.evaluation import Evaluator, check_count, check_leaves, check_sigma
from torchopt.diff.zero_order.noise import Drawn, Noise


Function = TypeVar("Function", bound=Callable[..., Any])

METHODS = ("naive", "forward", "antithetic")


def zero_order(
    distribution: Drawn,
    method: str = "naive",
    argnums: int | Sequence[int] = (0,),
    num_samples: int = 1,
    sigma: float = 1.0,
    *,
    generator: torch.Generator | None = None,
    vectorize: bool | None = None,
    chunk_size: int | None = None,
) -> Callable[[Function], Function]:
    r"""Let a function have the gradient of its smoothed self, estimated from its values.

    With noise :math:`z` of density :math:`p` and the score :math:`s(z) = -\nabla \log p(z)`, which
    is :math:`z` itself if :math:`p` is standard normal,

    .. math::
        F(x) = \operatorname E f(x + \sigma z), \qquad
        \nabla F(x) = \frac1\sigma \operatorname E \big[f(x + \sigma z)\, s(z)\big],

    so that each of these is unbiased for :math:`\nabla F(x)`, whether :math:`f` has a derivative or
    not:

    .. math::
        \text{naive:}\quad & \frac1{n \sigma} \sum_{i=1}^n f(x + \sigma z_i)\, s(z_i) \\
        \text{forward:}\quad & \frac1{n \sigma} \sum_i \big(f(x + \sigma z_i) - f(x)\big)\, s(z_i)\\
        \text{antithetic:}\quad &
            \frac1{2 n \sigma} \sum_i \big(f(x + \sigma z_i) - f(x - \sigma z_i)\big)\, s(z_i)

    The variance of ``"naive"`` grows with :math:`f(x)^2 / \sigma^2`: use it only where the value at
    :math:`x` is near zero. ``"antithetic"`` has by far the least where :math:`f` is smooth.

    The value is :math:`f(x)` itself, computed once where nothing is perturbed, not that of
    :math:`F`. While a derivative by a listed argument is being recorded, the function is called at
    the perturbed points too, at once: :math:`n` times, or :math:`2 n` times if antithetic.
    Otherwise no noise is drawn. Derivatives by all other arguments, and by tensors that the
    function reads besides, are those of :math:`f(x)` by autograd.

    The result can be differentiated again and again, in reverse and forward mode and by
    ``torch.func``. Each derivative by listed arguments is unbiased for that of :math:`F`, mixed
    ones are for those of :math:`\operatorname E \partial f(x + \sigma z, y) / \partial y`. Two of
    them by listed arguments have a variance of order :math:`\sigma^{-4}`. For the mixed ones the
    graphs of all samples are kept where another argument requires grad: detach it to save memory.

    Args:
        distribution: ``torch.randn``; an object with ``sample(shape)``; or a function of a shape.
            It is asked for noise in the shape of each tensor, for each sample, and what it draws is
            converted to the tensor's dtype and device. A :class:`torch.distributions.Distribution`
            of single numbers on the whole line, whatever its mean and variance, is taken for what
            it is. All else is taken for standard normal. Other noise of mean 0 and variance 1, such
            as random signs, gives unbiased gradients where :math:`f` is quadratic; elsewhere those
            of another smoothing, and no second derivatives.
        method: ``"naive"``, ``"forward"`` or ``"antithetic"``, whose noise must be symmetric.
        argnums: Which arguments to perturb, counted from 0: each a tensor or any pytree of them. An
            argument may be given by its keyword.
        num_samples: :math:`n \ge 1`.
        sigma: :math:`\sigma > 0`.
        generator: What the noise is drawn from, instead of PyTorch's own. It stands in for it while
            the distribution draws, so that it serves every distribution that draws by PyTorch on
            the generator's device. The function's own random numbers are not drawn from it.
        vectorize: ``True`` calls the function once for all samples, by ``torch.vmap``, each with
            random numbers of its own; it is an error if that fails. ``False`` calls it once for
            each: it then may return a Python number, branch by values, or leave PyTorch. ``None``
            tries the former; if it fails, it warns, and does the latter from then on.
        chunk_size: With ``torch.vmap``, at most how many samples at a time, to save memory.

    Returns:
        A decorator of functions that return a scalar, a tensor without dimensions or a number.
        Numbers and integers become tensors of the first perturbed tensor's dtype. The function
        should have no side effects. Under ``torch.vmap`` the batch's noise is drawn as its argument
        ``randomness`` says.

    Raises:
        TypeError: If an argument has another type, a leaf to perturb is no real floating-point
            tensor, or the function returns no real number.
        ValueError: If an argument is out of bounds, the function returns several numbers, or the
            distribution draws other shapes.
        RuntimeError: If ``vectorize=True`` and ``torch.vmap`` cannot call the function.

    Example:
        A function made of steps, whose derivative is zero almost everywhere:

        >>> import torch
        >>> from torchopt.diff.zero_order import zero_order
        >>> generator = torch.Generator().manual_seed(0)
        >>> @zero_order(
        ...     torch.randn, "antithetic", num_samples=10_000, sigma=0.5, generator=generator
        ... )
        ... def stairs(params, scale):
        ...     return scale * params["x"].round().sum()
        >>> params = {"x": torch.tensor([0.3, 1.6], requires_grad=True)}
        >>> scale = torch.tensor(3.0, requires_grad=True)
        >>> value = stairs(params, scale)
        >>> value.backward()
        >>> value.item(), scale.grad.item()
        (6.0, 2.0)
        >>> ((params["x"].grad - 3).abs() < 0.2).all()  # the mean slope of 3 round(x) is 3
        tensor(True)

    Reference:
        Nesterov and Spokoiny, Random gradient-free minimization of convex functions, 2017,
        https://doi.org/10.1007/s10208-015-9296-2; higher orders as by Foerster et al., DiCE, 2018,
        https://arxiv.org/abs/1802.05098. TorchOpt 0.7.3 multiplied ``"forward"`` by
        :math:`\sigma^2`, and had :math:`z` for the score of any distribution.
    """
    places = _checked_argnums(argnums)
    settings: Any = (method, num_samples, sigma, generator, vectorize, chunk_size)
    noise = Estimator("", "zero_order", *settings).noise_of(distribution)

    def decorate(function: Function) -> Function:
        if not callable(function):
            raise TypeError(f"zero_order decorates a function, got {given(function)}.")
        name = getattr(function, "__name__", type(function).__name__)
        estimator = Estimator(name, "zero_order", *settings)

        @functools.wraps(function)
        @eager
        def smoothed(*args: Any, **kwargs: Any) -> Tensor:
            call = _Call(function, name, places, args, kwargs)
            return estimator(call, call.leaves, noise)

        return smoothed  # pyright: ignore[reportReturnType]

    return decorate


class Estimator:
    """Calls a function and gives what it returns the derivatives of the smoothed function.

    Args:
        name: Of the function, in messages.
        owner: Who calls it, in messages.
        method: As all that follow, of :func:`zero_order`.
    """

    def __init__(
        self,
        name: str,
        owner: str,
        method: str = "naive",
        num_samples: int = 1,
        sigma: float = 1.0,
        generator: torch.Generator | None = None,
        vectorize: bool | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}.")
        check_count("num_samples", num_samples)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {given(generator)}.")
        self.owner, self.method, self.num_samples = owner, method, num_samples
        self.sigma, self.generator = check_sigma(sigma), generator
        self.evaluator = Evaluator(name, owner, vectorize, chunk_size)

    def noise_of(self, distribution: Drawn) -> Noise:
        """Return what draws the perturbations."""
        return Noise(distribution, self.owner, symmetric=self.method == "antithetic")

    def __call__(
        self, function: Callable[[list[Tensor]], Any], leaves: list[Tensor], noise: Noise
    ) -> Tensor:
        r"""Return ``function(leaves)`` with the derivatives of its smoothed self.

        Of fixed points :math:`y_i = x + \sigma z_i` the density
        :math:`q_x(y_i) \propto p((y_i - x) / \sigma)` depends on :math:`x`. So all derivatives of
        :math:`\frac1n \sum_i f(y_i)\, q_x(y_i) / q_{x_0}(y_i)` at :math:`x_0 = x` are unbiased for
        those of :math:`F`. With the ratio less 1 the value of the sum is zero.
        """
        here = [x.detach() for x in leaves]
        value = self.evaluator.value(function(here), here[0])
        if not any(map(may_be_recorded, leaves)):
            return value
        sides = [noise.draw(here, self.num_samples, self.generator)]
        if self.method == "antithetic":
            sides.append([noise.mirrored(z) for z in sides[0]])
        samples = [torch.cat(both) for both in zip(*sides)]
        values = self.evaluator(function, [x + self.sigma * z for x, z in zip(here, samples)])
        if self.method != "naive":
            # of the antithetic pairs it lowers the variance of second derivatives only
            values = values - value.detach()
        shifts = [(x - x0) / self.sigma for x, x0 in zip(leaves, here)]
        ratio = torch.expm1(noise.log_ratio(samples, shifts)).to(values.device)
        derivative: Any = _Differentiated.apply(value, (values * ratio).mean().to(value))
        return derivative


def may_be_recorded(x: Tensor) -> bool:
    """Whether a derivative by a tensor is recorded now, at any level of ``torch.func``.

    A batch inside of ``torch.func.grad`` does not say that it requires grad; what it wraps does.
    """
    return (torch.is_grad_enabled() or in_forward_mode()) and is_tracked(x)


class _Differentiated(torch.autograd.Function):
    """A value as it is, with the derivatives of it and of another number.

    Their sum would not do: where the function is infinite at a perturbed point, the other one,
    which is zero otherwise, is no number.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, other: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the value."""
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return what comes, to both."""
        return grad, grad

    @staticmethod
    def jvp(ctx: Any, value: Tensor, other: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the sum."""
        return value + other


class _Call:
    """The arguments of a call, and how to call the function with others in the listed places."""

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        places: tuple[int, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.keys = [_key(function, name, place, args, kwargs) for place in places]
        listed = [args[key] if isinstance(key, int) else kwargs[key] for key in self.keys]
        self.leaves, self.spec = tree.flatten(listed)
        words = [f"argument {k!r}" if isinstance(k, str) else f"argument {k}" for k in self.keys]
        names = [
            f"{words[path[0]]}, {tree.quoted(tree.dotted(path[1:]))}"
            if path[1:]
            else words[path[0]]
            for path in tree.leaf_paths(listed)
        ]
        check_leaves(self.leaves, names, "zero_order")

    def __call__(self, leaves: list[Tensor]) -> Any:
        args, kwargs = list(self.args), dict(self.kwargs)
        for key, value in zip(self.keys, tree.unflatten(self.spec, leaves)):
            if isinstance(key, int):
                args[key] = value
            else:
                kwargs[key] = value
        return self.function(*args, **kwargs)


def _key(
    function: Callable[..., Any],
    name: str,
    place: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> int | str:
    """Return where an argument was given: its place, or its keyword.

    Raises:
        ValueError: If it was not given.
    """
    if place < len(args):
        return place
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    if place < len(names) and names[place] in kwargs:
        return names[place]
    raise ValueError(
        f"argnums has {place}, but {name} was called with {len(args)} positional arguments"
        + (f" and the keywords {misuse.some(list(kwargs))}." if kwargs else ".")
    )


def _checked_argnums(argnums: Any) -> tuple[int, ...]:
    places = argnums if isinstance(argnums, (tuple, list)) else (argnums,)
    for place in places:
        if not isinstance(place, int) or isinstance(place, bool):
            raise TypeError(f"argnums must be a whole number or several, got {given(place)}.")
        if place < 0:
            raise ValueError(f"argnums counts from 0, got {place}.")
    if not places or len(set(places)) < len(places):
        raise ValueError(f"argnums must name at least one argument, each once, got {argnums!r}.")
    return tuple(places)
