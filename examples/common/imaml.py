"""iMAML: a task is learned by steps that are not recorded, and its solution differentiated.

With initial weights ``theta`` a task learns the minimum ``phi`` of ``L(phi)`` plus half of
``strength`` times the squared distance of ``phi`` from ``theta``. There the gradient is zero,
whatever the steps were, so that the derivative by ``theta`` is that of
``grad L(phi) + strength * (phi - theta) = 0``: the inverse of ``I + (Hessian of L) / strength``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap

from common.episodes import Task
from common.maml import INNER_OPTIMIZERS, Learner, Params
from torchopt.diff.implicit import custom_root
from torchopt.linear_solve import solve_cg


@dataclass
class ImplicitLearner(Learner):
    """How a network learns one task, with a memory that does not grow with its steps.

    Attributes:
        strength: How strongly the weights are held at the initial ones.
        cg_steps: How many iterations of conjugate gradients a derivative takes at most. A handful
            may not solve the system, and what they have come to is taken, as in the paper.
        damping: Added to the Hessian in the derivative: where the Hessian has negative eigenvalues
            that ``strength`` does not make up for, the derivative may be of any size. The larger,
            the nearer it is in direction to that of the first-order approximation.
        rtol: The residual of that system at which fewer iterations are enough.
    """

    strength: float = 0.1
    cg_steps: int = 5
    damping: float = 0.0
    rtol: float = 0.01

    def adapt(self, params: Params, rates: Params, x: Tensor, y: Tensor, steps: int) -> Params:
        """Return the weights after ``steps`` inner steps, differentiated as those of the solution.

        See :meth:`common.maml.Learner.adapt`.
        """
        tx = INNER_OPTIMIZERS[self.optimizer](lr=rates)
        solve = solve_cg(
            rtol=self.rtol, maxiter=self.cg_steps, ridge=self.damping, on_failure="ignore"
        )

        def slope(weights: Params, initial: Params) -> Params:
            return self._slope(weights, initial, x, y)

        @custom_root(slope, argnums=1, solve=solve)
        def solver(weights: Params, initial: Params) -> Params:
            state = tx.init(weights)
            for _ in range(steps):
                grads = slope(weights, initial)
                weights, state = tx.apply_gradients(grads, state, weights, inplace=False)
            return weights

        return solver({name: p.detach() for name, p in params.items()}, params)

    def unsolved(self, params: Params, rates: Params, task: Task, steps: int) -> Tensor:
        """Return how much of the inner problem's first gradient is left after ``steps``, by task.

        The derivative is that of a solution, where nothing is left.
        """

        def one(x: Tensor, y: Tensor) -> Tensor:
            adapted = self.adapt(params, rates, x, y, steps)
            return norm(self._slope(adapted, params, x, y)) / norm(
                self._slope(params, params, x, y)
            )

        with torch.no_grad():
            return vmap(one)(task.support_x, task.support_y)

    def _slope(self, weights: Params, initial: Params, x: Tensor, y: Tensor) -> Params:
        """Return the gradient of the inner problem."""
        grads = grad(self.loss)(weights, x, y)
        return {
            name: g + self.strength * (weights[name] - initial[name]) for name, g in grads.items()
        }


def norm(tree: Params) -> Tensor:
    """Return the Euclidean norm over all leaves together."""
    return torch.stack([t.square().sum() for t in tree.values()]).sum().sqrt()
