"""Random perturbations: how they are drawn, and how their density changes with a parameter."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Union

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from typing_extensions import TypeAlias

from torchopt.base.misuse.given import given, is_number
from torchopt.base.numerics import to_compute_dtype


class Samplable(Protocol):
    """Draws noise of a shape; a :class:`torch.distributions.Distribution` is one."""

    def sample(self, sample_shape: torch.Size = ..., /) -> Any:
        """Return noise of a shape."""
        ...


#: A function that draws noise of a shape.
SampleFunc: TypeAlias = Callable[[torch.Size], Any]
Drawn: TypeAlias = Union[Samplable, SampleFunc]


class Noise:
    r"""Where perturbations :math:`z` come from, with density :math:`p`.

    A :class:`torch.distributions.Distribution` says its density. Whatever else draws samples is
    taken to be standard normal, :math:`\log p(z) = -\frac12 \lVert z \rVert^2 + c`.
    """

    def __init__(self, distribution: Drawn, owner: str, symmetric: bool) -> None:
        self.owner = owner
        self.density = distribution if isinstance(distribution, Distribution) else None
        self.center: float | Tensor = 0.0
        sample = getattr(distribution, "sample", distribution)
        if isinstance(distribution, type) or not callable(sample):
            raise TypeError(
                f"{owner} expects as distribution an object with sample(shape), or a function of a "
                f"shape, got {given(distribution)}. Standard normal noise is torch.randn."
            )
        self.sample: Callable[..., Any] = sample
        if self.density is not None:
            self.density = _checked_density(self.density, owner)
            self.center = _center(self.density)
            if symmetric and not _is_symmetric(self.density, self.center):
                raise ValueError(
                    "method='antithetic' mirrors the noise at its mean, so its distribution must "
                    f"be symmetric, which {distribution} is not. Use method='forward'."
                )

    def draw(
        self, leaves: Sequence[Tensor], count: int, generator: torch.Generator | None
    ) -> list[Tensor]:
        """Return for each tensor ``count`` samples of its shape, stacked, of its dtype and device.

        Raises:
            TypeError: If what was drawn is no tensor or number.
            ValueError: If it has another shape, or does not come from the generator.
        """
        if self.sample is torch.randn:
            return [_randn((count, *x.shape), x, generator) for x in leaves]
        with _drawing_from(generator, self.owner, any(x.numel() for x in leaves)):
            return [self._of_shape(x, count) for x in leaves]

    def _of_shape(self, x: Tensor, count: int) -> Tensor:
        with torch.no_grad():
            if self.density is not None:
                return self._checked(self.sample((count, *x.shape)), (count, *x.shape), x)
            rows = [self._checked(self.sample(x.shape), x.shape, x) for _ in range(count)]
        return torch.stack(rows)

    def _checked(self, z: Any, shape: Sequence[int], like: Tensor) -> Tensor:
        if not isinstance(z, Tensor) and not is_number(z):
            raise TypeError(f"The distribution must draw tensors, got {given(z)}.")
        z = torch.as_tensor(z).to(like)
        if z.shape != torch.Size(shape):
            raise ValueError(
                f"The distribution was asked for a sample of shape {tuple(shape)} and gave "
                f"{tuple(z.shape)}; it must be that of the parameter."
            )
        return z

    def mirrored(self, z: Tensor) -> Tensor:
        """Return noise on the other side of the mean, which is as likely."""
        return 2 * self.center - z if isinstance(self.center, Tensor) else -z

    def score(self, z: Tensor) -> Tensor:
        r"""Return :math:`-\nabla \log p(z)` of each entry, in the dtype of computation."""
        z = to_compute_dtype(z)
        if self.density is None:
            return z
        with torch.enable_grad():
            at = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.density.log_prob(at).sum(), at)
        return -slope

    def log_ratio(self, noise: Sequence[Tensor], shifts: Sequence[Tensor]) -> Tensor:
        r"""Return :math:`\log p(z_i - \delta) - \log p(z_i)` for each sample :math:`i`.

        The shifts :math:`\delta` are zero; what matters is the derivative by them.
        """
        wide = [(to_compute_dtype(z), to_compute_dtype(d)) for z, d in zip(noise, shifts)]
        return torch.stack([self._log_ratio(z, d).to(wide[0][0]) for z, d in wide]).sum(0)

    def _log_ratio(self, z: Tensor, shift: Tensor) -> Tensor:
        rows = z.reshape(len(z), shift.numel())
        if self.density is None:
            flat = shift.reshape(-1)
            return rows @ flat - flat.dot(flat) / 2
        density = self.density
        difference = density.log_prob(z - shift) - density.log_prob(z).detach()
        return difference.reshape(rows.shape).sum(1)


def _checked_density(density: Distribution, owner: str) -> Distribution:
    """Return a distribution whose samples have the shape asked for, and whose density is smooth.

    Raises:
        ValueError: If it is none such.
    """
    if density.batch_shape or density.event_shape:
        raise ValueError(
            f"{owner} draws noise in the shape of each parameter, from a distribution of single "
            f"numbers; {density} has batch_shape {tuple(density.batch_shape)} and event_shape "
            f"{tuple(density.event_shape)}."
        )
    if density.support is not constraints.real:
        raise ValueError(
            f"{owner} needs a density that is positive on the whole line, for the gradient of the "
            f"smoothed objective is taken through it; {density} has support {density.support}. "
            "Of noise with mean 0 and variance 1, a function of a shape may be given instead: it "
            "is then taken to be standard normal."
        )
    density = copy.copy(density)
    density._validate_args = False  # reads values, which vmap cannot; the support is the whole line
    return density


def _center(density: Distribution) -> Tensor:
    try:
        mean = density.mean.detach()
    except NotImplementedError:
        return torch.zeros(())
    return mean if math.isfinite(mean.item()) else torch.zeros_like(mean)


def _is_symmetric(density: Distribution, center: Tensor) -> bool:
    at = torch.tensor([0.25, 0.5, 1.0, 2.0], dtype=center.dtype, device=center.device)
    with torch.no_grad():
        there, here = density.log_prob(center + at), density.log_prob(center - at)
    return torch.allclose(there, here, rtol=1e-4, atol=1e-5)


def _randn(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    z = torch.randn(shape, dtype=like.dtype, device=device, generator=generator)
    return z.to(like.device)


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator | None, owner: str, needed: bool) -> Iterator[None]:
    """Let everything that draws from PyTorch's own generator draw from another one.

    Distributions and functions of a shape take no generator. Nothing changes if drawing fails.
    """
    if generator is None:
        yield
        return
    device = generator.device
    module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    where = () if device.type == "cpu" else (device,)
    before, state = module.get_rng_state(*where), generator.get_state()
    module.set_rng_state(state, *where)
    try:
        yield
        after = module.get_rng_state(*where)
    finally:
        module.set_rng_state(before, *where)
    if needed and torch.equal(after, state):
        raise ValueError(
            f"{owner} got a generator on {device}, but the distribution draws from another one. "
            "Give a generator on the device where it draws, or leave it out and let the "
            "distribution draw from its own."
        )
    generator.set_state(after)
