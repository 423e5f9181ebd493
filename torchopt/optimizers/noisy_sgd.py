"""Noisy SGD: gradients with noise that dies away."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchopt.base.distributed import spread_as
from torchopt.base.numerics import power, root
from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import chain
from torchopt.core.engine import Leaves
from torchopt.core.hyper import hyper
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.named import from_recipe, meta_from_recipe
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.basic import flip_sign, scale_by_learning_rate
from torchopt.typing import Hyperparameter, Step


_MASK = 0xFFFFFFFF


@transformation
class AddNoise(GradientTransformation):
    """Add normal noise that dies away; see :func:`add_noise`."""

    eta: Hyperparameter = hyper(0.01, ge=0)
    gamma: Hyperparameter = hyper(0.55, ge=0)
    seed: int = hyper(0, ge=0, lt=2**32, integer=True)

    uses_step = True

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Tensor | None, ...]]]:
        """Add to each gradient the noise of its parameter's name and of the step."""
        updates, names = [], leaves.call.names()
        for g, t, h, position in zip(leaves.g, leaves.t, leaves.hyper, leaves.index):
            variance = h["eta"] / power(t, h["gamma"])
            size = root(variance) if isinstance(variance, Tensor) else variance**0.5
            noise = spread_as(normal(g, h["seed"], t, names[position]), g)
            updates.append(g + noise * size)
        return updates, leaves.slots


def normal(like: Tensor, seed: int, t: Step, name: str) -> Tensor:
    """Return standard normal numbers that depend on seed, step, name and place alone.

    They are hashed from their place, not drawn from a generator: so they are those of the step,
    not of the call, on every device, and to ``vmap`` and a compiler they are arithmetic.
    """
    place = torch.arange(like.numel(), device=like.device).view(like.shape)
    key = _mixed(seed + 0x9E3779B9)
    for letter in name:
        key = _mixed(key ^ ord(letter)) + 1
    key = _mixed(key ^ (t & _MASK))
    first = _mixed(_mixed(2 * place) ^ key)
    second = _mixed(_mixed(2 * place + 1) ^ key)
    # strictly between 0 and 1, also when rounded
    u, angle = (((x >> 8).to(like.dtype) + 0.5) / 2**24 for x in (first, second))
    return (-2 * u.log()).sqrt() * (2 * math.pi * angle).cos()


def _mixed(x: Any) -> Any:
    """Return 32 bits that look unlike those given: Wellons' hash ``lowbias32``."""
    x = x & _MASK
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def add_noise(
    eta: Hyperparameter = 0.01, gamma: Hyperparameter = 0.55, seed: int = 0
) -> GradientTransformation:
    r"""Add normal noise to gradients, whose variance falls with a power of the step.

    .. math::
        u_t = g_t + \mathcal{N}(0, \sigma_t^2), \qquad \sigma_t^2 = \frac{\eta}{t^\gamma}

    Args:
        eta: :math:`\eta \ge 0`, the variance at the first step.
        gamma: :math:`\gamma \ge 0`.
        seed: Which noise: a whole number in [0, 2^32).

    The noise is a function of the seed, the step, the name of the parameter, and the place of the
    entry in it. So steps that are taken again, from a saved state or in another API, have the same
    noise, whatever other parameters there are; nothing is drawn from PyTorch's generators. (Names
    are those of errors: keys of a tree, and ``param_groups[0]['params'][1]`` for parameters that
    come without.) Two such transformations in a chain need two seeds. Under
    :func:`torch.func.vmap` all of a batch have the same.

    No slots, but the step count. Differentiable in gradients, ``eta`` and ``gamma``; the standard
    normal numbers are constants.

    Raises:
        ValueError: If a number is out of bounds.
        TypeError: If the seed is no whole number.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.add_noise(eta=1.0, seed=3)
        >>> g = [torch.zeros(10_000)]
        >>> (u,), state = tx.update(g, tx.init(g))
        >>> bool(u.mean().abs() < 0.05), bool((u.std() - 1).abs() < 0.05)
        (True, True)

    Reference:
        Neelakantan et al., Adding gradient noise improves learning for very deep networks, 2015,
        https://arxiv.org/abs/1511.06807.
    """
    return AddNoise(eta, gamma, seed)


def noisy_sgd(
    lr: Hyperparameter = 1e-3,
    eta: Hyperparameter = 0.01,
    gamma: Hyperparameter = 0.55,
    seed: int = 0,
    *,
    maximize: bool = False,
    use_accelerated_op: bool | None = None,
) -> GradientTransformation:
    r"""SGD with decaying noise added to the gradients.

    .. math::
        p_t = p_{t-1} - \alpha\, \big(g_t + \mathcal{N}(0, \eta / t^\gamma)\big)

    Args:
        lr: Learning rate :math:`\alpha \ge 0`. (Optax has no default.)
        eta: :math:`\eta \ge 0`, the variance at the first step.
        gamma: :math:`\gamma \ge 0`.
        seed: Which noise: a whole number in [0, 2^32); see :func:`torchopt.add_noise`. Optax
            takes a random key.
        maximize: Ascend instead of descend.
        use_accelerated_op: Fused kernels: ``None`` if available, ``True`` required,
            ``False`` never. The noise has none.

    No slots, but the step count. Differentiable in gradients, parameters and every number but the
    seed; the noise is a constant.

    Raises:
        ValueError: If a number is out of bounds.
        RuntimeError: If ``use_accelerated_op=True`` cannot be met.

    Example:
        >>> import torch, torchopt
        >>> optimizers = []
        >>> for _ in range(2):
        ...     w = torch.nn.Parameter(torch.ones(2))
        ...     w.grad = torch.ones(2)
        ...     torchopt.NoisySGD([w], lr=0.1, seed=7).step()
        ...     optimizers.append(w)
        >>> torch.equal(*optimizers), torch.equal(w, torch.full((2,), 0.9))
        (True, False)

    Reference:
        Neelakantan et al., 2015, https://arxiv.org/abs/1511.06807.
    """
    tx = chain(flip_sign(maximize), add_noise(eta, gamma, seed), scale_by_learning_rate(lr))
    return accelerated(tx, use_accelerated_op)


class NoisySGD(Optimizer):
    """:func:`torchopt.noisy_sgd` as a ``torch.optim.Optimizer``."""

    @from_recipe(noisy_sgd)
    def __init__(self, params: Any) -> None:
        """Take the parameters, then the arguments of :func:`torchopt.noisy_sgd`."""


class MetaNoisySGD(MetaOptimizer):
    """:func:`torchopt.noisy_sgd` as a differentiable optimizer of a network."""

    @meta_from_recipe(noisy_sgd)
    def __init__(self, module: Any) -> None:
        """Take the network, then the arguments of :func:`torchopt.noisy_sgd`."""
