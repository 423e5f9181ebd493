"""SAM as an optimizer: two gradients for each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.base.numerics import to_compute_dtype
from torchopt.core.apply import refuse_unwritable
from torchopt.core.engine import Leaves
from torchopt.core.transform import GradientTransformation
from torchopt.nn.buffers import keep_buffers
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.optimizer import Optimizer
from torchopt.transforms.sam import AT_ASCENT, sam
from torchopt.typing import Hyperparameter


class SAM(Optimizer):
    r""":func:`torchopt.sam` as a ``torch.optim.Optimizer``: call ``step(closure)``.

    .. math::
        g_t = \nabla f(p_{t-1}), \qquad
        \epsilon_t = \rho\, \frac{T^2 g_t}{\lVert T g_t \rVert}, \qquad
        p_t = p_{t-1} + \operatorname{base}\big(\nabla f(p_{t-1} + \epsilon_t)\big)

    with :math:`T = 1`, or :math:`T = |p_{t-1}| + \eta` if ``adaptive``.

    The closure is called twice, at the weights and at those higher up; it calls ``zero_grad`` and
    ``backward``, and the loss that ``step`` returns is the first one. In a loop of one's own, which
    accumulates gradients, say, :meth:`first_step` and :meth:`second_step` stand behind the backward
    passes.

    Groups hold ``rho``, ``adaptive`` and ``eta`` beside the hyperparameters of ``base``; learning
    rate schedulers, hooks and checkpoints are those of every optimizer.

    Args:
        params: Parameters, named ones, or groups.
        base: The transformation that makes the step, ``torchopt.sgd(0.1, momentum=0.9)``.
        rho: How far to go up, >= 0.
        adaptive: ASAM.
        eta: Of ASAM, >= 0.
        module: The network, whose buffers the second forward pass is not to change: it would count
            each batch twice in running statistics (BatchNorm). For :meth:`second_step` write
            ``with torchopt.keep_buffers(net)`` around that pass.

    Raises:
        TypeError: If ``base`` is no transformation, or ``module`` no module.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> optimizer = torchopt.SAM(net.parameters(), torchopt.sgd(0.1), rho=0.05, module=net)
        >>> x = torch.randn(8, 2)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (net(x) - 1).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> net[1].num_batches_tracked
        tensor(1)

        The same with two passes:

        >>> (net(x) - 1).square().mean().backward()
        >>> optimizer.first_step()
        >>> with torchopt.keep_buffers(net):
        ...     (net(x) - 1).square().mean().backward()
        >>> optimizer.second_step()
    """

    module: nn.Module | None = None
    #: Parameters with their values before a first step.
    _before: list[tuple[Tensor, Tensor]] | None = None
    _at_ascent: bool = False

    def __init__(
        self,
        params: Any,
        base: GradientTransformation,
        rho: Hyperparameter = 0.05,
        adaptive: bool = False,
        eta: Hyperparameter = 0.01,
        *,
        module: nn.Module | None = None,
    ) -> None:
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"module must be a network, got {type(module).__name__}.")
        self.module = module
        super().__init__(params, sam(base, rho, adaptive, eta))

    def _extra(self, params: list[Tensor], loss: Any, closure: Any) -> dict[str, Any]:
        if self._before is not None:
            raise RuntimeError(
                "The weights are where first_step() led: call second_step() with the gradients "
                "there, or restore() to go back."
            )
        extra = super()._extra(params, loss, closure)
        if self._at_ascent:
            return {**extra, AT_ASCENT: True}
        if closure is not None and self.module is not None:
            extra["grad_fn"] = _with_kept_buffers(self.module, extra["grad_fn"])
        return extra

    @torch.no_grad()
    def first_step(self, *, zero_grad: bool = True) -> None:
        """Go up, from the gradients at the weights.

        Args:
            zero_grad: Forget these gradients.

        Raises:
            RuntimeError: If it was called before, and :meth:`second_step` was not since.
        """
        if self._before is not None:
            raise RuntimeError(
                "first_step() was called already: compute the gradients where it led to, then call "
                "second_step(), or restore() to go back."
            )
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        refuse_unwritable(params, lambda k: f"params[{k}]")
        before = [(p, p.detach().clone()) for p in params]
        for p, e in zip(params, self._ascents(params)):
            p.add_(e)
        self._before = before
        if zero_grad:
            self.zero_grad()

    def _ascents(self, params: list[Tensor]) -> list[Tensor]:
        """Return what to add to parameters that have a gradient."""
        if not params:
            return []
        call = self._call(params, [p.grad for p in params])
        tx = self.transformation
        rows = tx.plan.rows_of(0, call.hyper)
        real = [torch.view_as_real if p.is_complex() else to_compute_dtype for p in params]
        g = [view(p.grad) for view, p in zip(real, params)]  # pyright: ignore[reportArgumentType]
        p = [view(x.detach()) for view, x in zip(real, params)]
        leaves = Leaves(g, p, call.t, [], rows, list(range(len(params))), call)
        found = tx.ascents(leaves)  # pyright: ignore[reportAttributeAccessIssue]
        return [torch.view_as_complex(e) if x.is_complex() else e for e, x in zip(found, params)]

    @torch.no_grad()
    def restore(self) -> None:
        """Take :meth:`first_step` back."""
        for p, value in self._before or ():
            p.copy_(value)
        self._before = None

    def second_step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Go back, and take the step of ``base`` with the gradients where :meth:`first_step` led.

        Args:
            scaler: What the losses of both passes were scaled by. It unscales the gradients, and
                leaves the step out if one is not finite; call its ``update`` afterwards. The first
                gradients stay as they are: their size does not count.

        Raises:
            RuntimeError: If :meth:`first_step` was not called before.
        """
        if self._before is None:
            raise RuntimeError(
                "second_step() needs first_step() before it, and the gradients where that led to. "
                "Or write optimizer.step(closure)."
            )
        self.restore()
        self._at_ascent = True
        try:
            if scaler is None:
                self.step()
            else:
                scaler.step(self)
        finally:
            self._at_ascent = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "module": self.module}


def _with_kept_buffers(
    module: nn.Module, grad_fn: Callable[[list[Tensor]], Any]
) -> Callable[[list[Tensor]], Any]:
    def kept(values: list[Tensor]) -> Any:
        with keep_buffers(module):
            return grad_fn(values)

    return kept


class MetaSAM(MetaOptimizer):
    r""":func:`torchopt.sam` as a differentiable optimizer of a network: call ``step(closure)``.

    .. math::
        g_t = \nabla f(p_{t-1}), \qquad
        \epsilon_t = \rho\, \frac{T^2 g_t}{\lVert T g_t \rVert}, \qquad
        p_t = p_{t-1} + \operatorname{base}\big(\nabla f(p_{t-1} + \epsilon_t)\big)

    with :math:`T = 1`, or :math:`T = |p_{t-1}| + \eta` if ``adaptive``.

    The closure returns the loss. It is called twice, the second time with the weights higher up in
    the network, which works on copies of its buffers then. Derivatives go through both gradients.

    Args:
        module: The network.
        base: The transformation that makes the step.
        rho: How far to go up, >= 0.
        adaptive: ASAM.
        eta: Of ASAM, >= 0.

    Raises:
        TypeError: If ``base`` is no transformation.
        ValueError: If a number is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> start, rho = net.weight, torch.tensor(0.05, requires_grad=True)
        >>> inner = torchopt.MetaSAM(net, torchopt.sgd(0.1), rho=rho)
        >>> x = torch.randn(8, 2)
        >>> for _ in range(2):
        ...     inner.step(lambda: (net(x) - 1).square().mean())
        >>> outer = (net(x) - 1).square().mean()
        >>> [g.shape for g in torch.autograd.grad(outer, [start, rho])]
        [torch.Size([1, 2]), torch.Size([])]
    """

    def __init__(
        self,
        module: Any,
        base: GradientTransformation,
        rho: Hyperparameter = 0.05,
        adaptive: bool = False,
        eta: Hyperparameter = 0.01,
    ) -> None:
        super().__init__(module, sam(base, rho, adaptive, eta))
