"""SAM and ASAM: the gradient at a point nearby where the loss is higher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.numerics import to_compute_dtype
from torchopt.core.call_trees import as_list, as_tree
from torchopt.core.engine import Leaves
from torchopt.core.hyper import flag, hyper
from torchopt.core.transform import GradientTransformation, transformation
from torchopt.transforms.clip import all_zero, global_norm
from torchopt.transforms.inside import Wrapper, prepared
from torchopt.typing import Hyperparameter


#: Among the extra values of a call: that the gradients are those at the ascended point already.
AT_ASCENT = "at_ascent"


@transformation
class SharpnessAware(Wrapper):
    """Run ``inner`` with the gradient at a point nearby; see :func:`sam`."""

    inner: GradientTransformation
    rho: Hyperparameter = hyper(0.05, ge=0)
    adaptive: bool = flag(False)
    eta: Hyperparameter = hyper(0.01, ge=0)

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The gradients elsewhere, and what the inside reads."""
        return ("grad_fn", AT_ASCENT, *super().reads)

    @property
    def accepts_complex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inside is right for complex numbers; the adaptive step has none of them."""
        return super().accepts_complex and self.adaptive is False

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
        """Ascend, ask for the gradients there, and run the inside with them."""
        g = leaves.g if leaves.call.extra.get(AT_ASCENT) else self._gradients_there(leaves)
        return self.run_inner(leaves, g, leaves.t, range(len(g)))

    def ascents(self, leaves: Leaves) -> list[Tensor]:
        """Return what is to be added to each parameter; nothing where all gradients are zero."""
        factors, scaled = [], []
        for g, p, h in zip(leaves.g, leaves.p, leaves.hyper):
            size = misuse.given_params("sam", p).abs() + h["eta"] if h["adaptive"] else None
            factors.append(h["rho"] if size is None else size * h["rho"])
            scaled.append(g if size is None else g * size)
        norm = global_norm(scaled)
        flat = norm == 0
        over = torch.where(flat, 0.0, 1 / torch.where(flat, 1.0, norm))
        return [x * (f * over.to(device=x.device, dtype=x.dtype)) for x, f in zip(scaled, factors)]

    def _gradients_there(self, leaves: Leaves) -> list[Tensor]:
        """Return the gradients at the ascended point, as the inside takes them."""
        call = leaves.call
        grad_fn = call.extra.get("grad_fn")
        if grad_fn is None and all_zero(leaves.g):
            return leaves.g  # there is no way up, so these are the gradients there
        if not callable(grad_fn):
            given = "none" if grad_fn is None else misuse.short(grad_fn)
            raise ValueError(
                f"sam needs the gradients at a second point, got {given} of a function of the "
                "parameters. Write tx.update(grads, state, params, grad_fn=...), or "
                "optimizer.step(closure) with a closure that computes the loss again; of a "
                "torchopt.SAM also first_step() and second_step(), or second_step(scaler) where a "
                "torch.amp.GradScaler scales the losses."
            )
        values = list(call.p)
        for i, p, e in zip(leaves.index, leaves.p, self.ascents(leaves)):
            there = p + e
            whole = call.p[i]
            there = torch.view_as_complex(there) if whole.is_complex() else there
            values[i] = there.to(whole.dtype)
        found = as_list(call, grad_fn(as_tree(call, values)), "What grad_fn returned", "params")
        return [_as_taken(leaves, k, found[i]) for k, i in enumerate(leaves.index)]


def _as_taken(leaves: Leaves, position: int, found: Any) -> Tensor:
    """Return a gradient in the dtype of computation; it is zero where there is none."""
    like, own = leaves.g[position], leaves.call.g[leaves.index[position]]
    if found is None:
        return torch.zeros_like(like)
    if not isinstance(found, Tensor) or found.shape != own.shape:
        given = misuse.short(found)
        if isinstance(found, Tensor):
            given = f"a tensor of shape {tuple(found.shape)}"
        raise ValueError(
            f"grad_fn returned {given} for {leaves.name(position)}, whose shape is "
            f"{tuple(own.shape)}."
        )
    if found.is_complex():
        return torch.view_as_real(found)
    return to_compute_dtype(found).to(like.dtype)


def sam(
    base: GradientTransformation,
    rho: Hyperparameter = 0.05,
    adaptive: bool = False,
    eta: Hyperparameter = 0.01,
) -> GradientTransformation:
    r"""Sharpness-aware minimization: another optimizer, on the gradient at a point higher up.

    .. math::
        g_t = \nabla f(p_{t-1}), \qquad
        \epsilon_t = \rho\, \frac{T^2 g_t}{\lVert T g_t \rVert}, \qquad
        p_t = p_{t-1} + \operatorname{base}\big(\nabla f(p_{t-1} + \epsilon_t)\big)

    with the update of ``base``, which for :func:`torchopt.sgd` is minus the learning rate times its
    argument, the norm over all parameters as one vector, and :math:`T = 1`; or, if ``adaptive``
    (ASAM), :math:`T = |p_{t-1}| + \eta`, entry by entry, so that the neighbourhood is the same for
    a network whose weights are scaled. Where the norm is zero, so is :math:`\epsilon_t`.

    The second gradient is computed in the middle of a step. How, depends on the API:

    * ``update(grads, state, params, grad_fn=...)``: a function of parameters that returns
      gradients, ``torch.func.grad(loss)``, say, on the same batch. Optax calls this opaque mode,
      and gives the function a number besides.
    * :class:`torchopt.SAM` and ``torchopt.Optimizer``: ``step(closure)``, which calls the closure
      twice, and refuses one that does not begin with ``zero_grad()``; or
      :meth:`torchopt.SAM.first_step` and :meth:`torchopt.SAM.second_step` in a loop of one's own.
    * :class:`torchopt.MetaSAM` and ``torchopt.MetaOptimizer``: ``step(closure)``, where the closure
      returns the loss.

    A second forward pass counts a batch twice in running statistics (BatchNorm). ``MetaOptimizer``
    lets it work on copies of the buffers, and so does ``SAM(..., module=net)``; elsewhere write
    ``with torchopt.keep_buffers(net)``. Dropout is drawn again in the second pass.

    Args:
        base: The transformation that makes the step. What acts on gradients (clipping, say) belongs
            in it: in a chain before ``sam`` it would see the first gradient only.
        rho: :math:`\rho \ge 0`, how far to go up; for ASAM the paper takes 0.5 to 2.
        adaptive: ASAM.
        eta: :math:`\eta \ge 0` of ASAM. (The authors' code takes :math:`T = 1` for biases.)

    Slots: those of ``base``, and its counters. What a meta-gradient reaches: everything, through
    both gradients; ``grad_fn`` has to be differentiable for that. A parameter that has no gradient
    at the second point has the gradient zero there.

    Raises:
        TypeError: If ``base`` is no transformation.
        ValueError: If a number is out of bounds, or there is no second gradient.

    Example:
        >>> import torch, torchopt
        >>> loss = lambda w: (w**4).sum()
        >>> tx = torchopt.sam(torchopt.sgd(0.1), rho=0.5)
        >>> w = torch.tensor([1.0, 0.0])
        >>> grad = torch.func.grad(loss)
        >>> tx.apply_gradients(grad(w), tx.init(w), w, inplace=False, grad_fn=grad)[0]
        tensor([-0.3500,  0.0000])

    Reference:
        Foret et al., Sharpness-aware minimization for efficiently improving generalization, ICLR
        2021, https://arxiv.org/abs/2010.01412; Kwon et al., ASAM, ICML 2021,
        https://arxiv.org/abs/2102.11600.
    """
    return SharpnessAware(prepared(base, "sam"), rho, adaptive, eta)
