"""iMAML: a task is learned by steps that are not recorded, and its solution differentiated.

With initial weights ``theta`` a task learns the minimum ``phi`` of ``L(phi)`` plus half of
``strength`` times the squared distance of ``phi`` from ``theta``. There the gradient is zero,
whatever the steps were, so that the derivative by ``theta`` is that of
``grad L(phi) + strength * (phi - theta) = 0``: the inverse of ``I + (Hessian of L) / strength``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad

from common.maml import INNER_OPTIMIZERS, Learner, Params
from torchopt.diff.implicit import custom_root


@dataclass
class ImplicitLearner(Learner):
    """How a network learns one task, with a memory that does not grow with its steps.

    Attributes:
        strength: How strongly the weights are held at the initial ones.
        cg_steps: How many products with the Hessian a derivative takes.
        damping: Added to ``strength`` in the derivative, as the authors' code does: where the
            Hessian has negative eigenvalues the derivative may be of any size. The larger, the
            nearer it is to that of the first-order approximation.
    """

    strength: float = 2.0
    cg_steps: int = 5
    damping: float = 0.0

    def adapt(self, params: Params, rates: Params, x: Tensor, y: Tensor, steps: int) -> Params:
        """Return the weights after ``steps`` inner steps, differentiated as those of the solution.

        See :meth:`common.maml.Learner.adapt`.
        """
        tx = INNER_OPTIMIZERS[self.optimizer](lr=rates)

        def regularised(weights: Params, initial: Params) -> Tensor:
            distance = torch.stack(
                [(weights[name] - initial[name]).square().sum() for name in weights]
            ).sum()
            return self.loss(weights, x, y) + self.strength / 2 * distance

        slope = grad(regularised)

        solve = damped(truncated_cg(self.cg_steps), self.strength, self.damping)

        @custom_root(slope, argnums=1, solve=solve)
        def solver(weights: Params, initial: Params) -> Params:
            state = tx.init(weights)
            for _ in range(steps):
                grads = slope(weights, initial)
                weights, state = tx.apply_gradients(grads, state, weights, inplace=False)
            return weights

        return solver({name: p.detach() for name, p in params.items()}, params)


LinearSolver = Callable[[Callable[[Params], Params], Params], Params]


def damped(solve: LinearSolver, strength: float, damping: float) -> LinearSolver:
    """Return the solver of a problem that is held more strongly, in the units of the given one."""
    scale = (strength + damping) / strength

    def solve_damped(matvec: Callable[[Params], Params], b: Params) -> Params:
        def product(v: Params) -> Params:
            return {name: p + damping * v[name] for name, p in matvec(v).items()}

        return {name: scale * x for name, x in solve(product, b).items()}

    return solve_damped


def truncated_cg(steps: int) -> LinearSolver:
    """Return a linear solver of a few conjugate gradient steps, as iMAML takes them.

    The Hessian of a network is not positive definite everywhere, and a handful of steps do not
    solve the system. What they have found is returned all the same, up to the first direction
    without curvature: :func:`torchopt.linear_solve.solve_cg` would warn of both, and return
    nothing that has a larger residual than zero has.
    """

    def solve(matvec: Callable[[Params], Params], b: Params) -> Params:
        x = {name: torch.zeros_like(t) for name, t in b.items()}
        r, p = b, b
        rho, going = dot(r, r), None
        for _ in range(steps):
            ap = matvec(p)
            curvature = dot(p, ap)
            positive = curvature > 0
            going = positive if going is None else going & positive
            alpha = torch.where(going, rho / torch.where(going, curvature, 1.0), 0.0)
            x = {name: x[name] + alpha * p[name] for name in x}
            r = {name: r[name] - alpha * ap[name] for name in x}
            new = dot(r, r)
            beta = new / torch.where(rho > 0, rho, 1.0)
            p = {name: r[name] + beta * p[name] for name in x}
            rho = new
        return x

    return solve


def dot(a: Params, b: Params) -> Tensor:
    """Return the inner product of two trees."""
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()
