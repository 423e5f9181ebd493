"""Evolution strategies: minimise a function that has no derivative, by its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor
from typing_extensions import TypeAlias

from torchopt.base import misuse, tree
from torchopt.base.misuse.given import given
from torchopt.core.pair import as_transformation
from torchopt.core.transform import GradientTransformation, check_transformation
from torchopt.diff.zero_order.evaluation import Evaluator, check_count, check_leaves, check_sigma
from torchopt.diff.zero_order.noise import Drawn, Noise
from torchopt.typing import TensorTree


#: What values count: by their ranks, as they are, or by a function of all of them.
Shaping: TypeAlias = Union[str, Callable[[Tensor], Tensor], None]


class Evolved(NamedTuple):
    """Where :func:`torchopt.diff.zero_order.evolution_strategies` ended."""

    #: The parameters, a tree like those at the start.
    params: TensorTree
    #: The state of the transformation, to go on from.
    state: Any
    #: What the objective was at all perturbed points, of shape ``(num_steps, 2 * num_samples)``.
    values: Tensor


class _Strategy:
    """An estimate that can be made again and again, with what has been checked once."""

    def __init__(
        self,
        owner: str,
        objective: Callable[[Any], Any],
        params: TensorTree,
        num_samples: int,
        sigma: float,
        shaping: Shaping,
        maximize: bool,
        distribution: Drawn,
        generator: torch.Generator | None,
        vectorize: bool | None,
        chunk_size: int | None,
    ) -> None:
        if not callable(objective):
            raise TypeError(
                f"{owner} expects a function of params as objective, got {given(objective)}."
            )
        if not (shaping is None or shaping == "ranks" or callable(shaping)):
            raise ValueError(
                "shaping must be 'ranks', None or a function of all values, got "
                f"{misuse.short(shaping)}."
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {given(generator)}.")
        check_count("num_samples", num_samples)
        leaves, self.spec = tree.flatten(params)
        names = [tree.quoted(name) for name in tree.leaf_names(params)]
        check_leaves(leaves, names, owner)
        self.objective, self.num_samples = objective, num_samples
        self.sigma = check_sigma(sigma)
        self.shaping, self.sign = shaping, -1.0 if maximize else 1.0
        self.noise = Noise(distribution, owner, symmetric=True)
        if self.noise.density is not None and bool(self.noise.center != 0):
            raise ValueError(f"{owner} needs noise of mean 0, got {distribution}.")
        self.generator = generator
        name = getattr(objective, "__name__", type(objective).__name__)
        self.evaluator = Evaluator(name, owner, vectorize, chunk_size)

    @torch.no_grad()
    def estimate(self, params: TensorTree) -> tuple[TensorTree, Tensor]:
        leaves = [x.detach() for x in tree.flatten(params)[0]]
        noise = self.noise.draw(leaves, self.num_samples, self.generator)
        points = [
            torch.cat([x + self.sigma * z, x - self.sigma * z]) for x, z in zip(leaves, noise)
        ]
        values = self.evaluator(lambda x: self.objective(tree.unflatten(self.spec, x)), points)
        weights = self._shaped(self.sign * values)
        there, here = weights.chunk(2)
        factor = (there - here) / (2 * self.num_samples * self.sigma)
        scores = [self.noise.score(z) for z in noise]
        grads = [torch.tensordot(factor.to(s), s, 1).to(x) for x, s in zip(leaves, scores)]
        return tree.unflatten(self.spec, grads), values

    def _shaped(self, values: Tensor) -> Tensor:
        if self.shaping == "ranks":
            return centered_ranks(values)
        weights = values if self.shaping is None else self._by_function(self.shaping, values)
        if not bool(torch.isfinite(weights).all()):
            raise ValueError(
                f"{int((~torch.isfinite(weights)).sum())} of {len(weights)} values at perturbed "
                "points are not finite. shaping='ranks' takes them for the worst there are."
            )
        return weights

    @staticmethod
    def _by_function(shaping: Any, values: Tensor) -> Tensor:
        weights = shaping(values)
        if not isinstance(weights, Tensor) or weights.shape != values.shape:
            raise ValueError(
                f"shaping must return a tensor of shape {tuple(values.shape)}, as it was given, "
                f"got {misuse.short(weights)}."
            )
        return weights


def centered_ranks(values: Tensor) -> Tensor:
    """Return ranks from -1/2, the least, to 1/2; equal values share theirs, nan is the greatest.

    Equal values must not be told apart: a plateau would give a gradient made of chance.
    """
    values = torch.where(values.isnan(), float("inf"), values)
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    dtype = values.dtype if values.dtype == torch.float64 else torch.float32
    return (below + up_to - 1).to(dtype) / (2 * (len(values) - 1)) - 0.5


def es_gradient(
    objective: Callable[[Any], Any],
    params: TensorTree,
    *,
    num_samples: int = 64,
    sigma: float = 0.1,
    shaping: Shaping = "ranks",
    maximize: bool = False,
    distribution: Drawn = torch.randn,
    generator: torch.Generator | None = None,
    vectorize: bool | None = None,
    chunk_size: int | None = None,
) -> tuple[TensorTree, Tensor]:
    r"""Estimate which way a function rises from its values at pairs of points.

    .. math::
        g = \frac1{2 n \sigma} \sum_{i=1}^n (u_i^+ - u_i^-)\, s(z_i), \qquad
        f_i^\pm = f(p \pm \sigma z_i)

    with the score :math:`s` of the noise, :math:`z_i` itself if it is standard normal, and
    :math:`u = f` for ``shaping=None``: then :math:`g` is unbiased for the gradient of
    :math:`\operatorname E f(p + \sigma z)`. With ``"ranks"``, :math:`u` are the ranks of all
    :math:`2 n` values, from :math:`-\frac12` for the least to :math:`\frac12`. They keep a
    direction and no scale: no outlier counts for more than another, and a growing function of the
    objective gives the same estimate.

    Args:
        objective: From parameters, a tree like ``params``, to a scalar: a tensor or a number.
        params: Any pytree of floating-point tensors.
        num_samples: Pairs of points :math:`n \ge 1`, so that the objective is called
            :math:`2 n` times.
        sigma: :math:`\sigma > 0`.
        shaping: ``"ranks"``, where equal values share their rank and one that is no number is the
            worst; ``None``; or a function from all values, of shape ``(2 * num_samples,)``, those
            on the side of :math:`+z` first, to weights of this shape. Of an objective to be
            maximised it is given the negative.
        maximize: Whether to return the gradient of the negative objective, for a transformation
            that descends.
        distribution: Of :math:`z`, as in :func:`torchopt.diff.zero_order.zero_order`; symmetric
            about 0.
        generator: What it is drawn from, as there.
        vectorize: Whether the objective is called for all points in one ``torch.vmap``, as there.
        chunk_size: With ``torch.vmap``, at most how many points at a time.

    Returns:
        A tree like ``params``, and the objective at all points, of shape ``(2 * num_samples,)``.
        Both are constants.

    Raises:
        TypeError: If an argument has another type, a leaf is no floating-point tensor, or the
            objective returns no real number.
        ValueError: If an argument is out of bounds, the objective returns several numbers, or a
            value is not finite and ``shaping`` is not ``"ranks"``.
        RuntimeError: If ``vectorize=True`` and ``torch.vmap`` cannot call the objective.

    Example:
        >>> import torch
        >>> from torchopt.diff.zero_order import es_gradient
        >>> params = {"x": torch.tensor([1.0, -2.0])}
        >>> grads, values = es_gradient(
        ...     lambda p: p["x"].round().abs().sum(), params, num_samples=200, sigma=0.5
        ... )
        >>> grads["x"].sign(), values.shape
        (tensor([ 1., -1.]), torch.Size([400]))

    Reference:
        Salimans et al., Evolution strategies as a scalable alternative to reinforcement learning,
        2017, https://arxiv.org/abs/1703.03864.
    """
    strategy = _Strategy(
        "es_gradient", objective, params, num_samples, sigma, shaping, maximize,
        distribution, generator, vectorize, chunk_size,
    )  # fmt: skip
    return strategy.estimate(params)


def evolution_strategies(
    objective: Callable[[Any], Any],
    params: TensorTree,
    tx: GradientTransformation,
    *,
    num_steps: int,
    state: Any = None,
    num_samples: int = 64,
    sigma: float = 0.1,
    shaping: Shaping = "ranks",
    maximize: bool = False,
    distribution: Drawn = torch.randn,
    generator: torch.Generator | None = None,
    vectorize: bool | None = None,
    chunk_size: int | None = None,
) -> Evolved:
    r"""Minimise a function from its values, by evolution strategies as OpenAI has them.

    .. math:: p_{k+1} = p_k + u_k(g_k, p_k)

    with the estimate :math:`g_k` of :func:`torchopt.diff.zero_order.es_gradient` instead of a
    gradient, and the update :math:`u_k` of any transformation.

    Args:
        objective: From parameters, a tree like ``params``, to a scalar: a tensor or a number.
        params: Any pytree of floating-point tensors; left as it is.
        tx: What makes updates of estimates. Ranks have no scale, so that Adam suits them; weight
            decay keeps parameters from growing where the objective does not.
        num_steps: How many estimates and updates.
        state: That of what an earlier run returned, to go on from; by default a fresh one. With the
            same generator, two runs of ten steps are then one of twenty.
        num_samples: Pairs of points for each step.
        sigma: How far they are from the parameters.
        shaping: What their values count: ``"ranks"``, ``None`` or a function.
        maximize: Whether the objective is to be maximised.
        distribution: What points are drawn from.
        generator: The random numbers to draw.
        vectorize: Whether the objective is called for all points in one ``torch.vmap``.
        chunk_size: With ``torch.vmap``, at most how many points at a time.

    Returns:
        The parameters, the state and all values. None of them has a graph.

    Raises:
        TypeError: If ``tx`` is no transformation; and as ``es_gradient`` does.
        ValueError: As ``es_gradient`` does.
        RuntimeError: As ``es_gradient`` does.

    Example:
        The objective counts mistakes, so that it has no gradient to follow:

        >>> import torch, torchopt
        >>> from torchopt.diff.zero_order import evolution_strategies
        >>> x = torch.linspace(-1, 1, 101)
        >>> def mistakes(params):
        ...     return ((x > params["threshold"]) != (x > 0.3)).sum()
        >>> params = {"threshold": torch.tensor(-0.5)}
        >>> tx = torchopt.adam(lr=0.05)
        >>> generator = torch.Generator().manual_seed(0)
        >>> evolved = evolution_strategies(mistakes, params, tx, num_steps=100, generator=generator)
        >>> mistakes(params).item(), mistakes(evolved.params).item() <= 1
        (40, True)

    Reference:
        Salimans et al., Evolution strategies as a scalable alternative to reinforcement learning,
        2017, https://arxiv.org/abs/1703.03864.
    """
    tx = as_transformation(tx)
    check_transformation(tx, "evolution_strategies")
    check_count("num_steps", num_steps)
    strategy = _Strategy(
        "evolution_strategies", objective, params, num_samples, sigma, shaping, maximize,
        distribution, generator, vectorize, chunk_size,
    )  # fmt: skip
    params = tree.tree_map(torch.Tensor.detach, params)
    state = tx.init(params) if state is None else state
    history: list[Tensor] = []
    for _ in range(num_steps):
        grads, values = strategy.estimate(params)
        with torch.no_grad():
            params, state = tx.apply_gradients(grads, state, params, inplace=False)
        history.append(values)
    return Evolved(params, state, torch.stack(history))
