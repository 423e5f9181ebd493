"""A vector of residuals near a point: its products with the Jacobian, and the matrix."""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from torchopt.linear_solve import (
    LinearOperator,
    LinearSolution,
    LinearSolver,
    solve_gmres,
    solve_lu,
)
from torchopt.solvers.flat import OfTree


#: Up to so many unknowns the Jacobian is written down where no linear solver is given.
DENSE = 500


class Linearized:
    r"""A function of a vector and its Jacobian :math:`J` at a point, by reverse mode.

    Args:
        function: Of a vector; called once.
        x: The point.
        create_graph: Whether what is computed here is recorded.

    Attributes:
        value: The function there.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], x: Tensor, create_graph: bool = False
    ) -> None:
        self.function, self.create_graph = function, create_graph
        with torch.enable_grad():
            recorded = create_graph and x.requires_grad
            self.x = x.view_as(x) if recorded else x.detach().requires_grad_()
            self.graph = function(self.x)
            if not self.graph.requires_grad:  # constant: the Jacobian is zero
                self.graph = self.graph + 0 * self.x.sum()
        self.value = self.graph if create_graph else self.graph.detach()

    def pull(self, u: Tensor) -> Tensor:
        """Return :math:`J^T u`."""
        return self._grad(self.graph, self.x, u, self.create_graph)

    def push(self, v: Tensor) -> Tensor:
        """Return :math:`J v`, the derivative of :math:`u^T J` in :math:`u`."""
        with torch.enable_grad():
            u = torch.zeros_like(self.graph).requires_grad_()
            pulled = self._grad(self.graph, self.x, u, True)
            if not pulled.requires_grad:
                return torch.zeros_like(self.value)
        return self._grad(pulled, u, v, self.create_graph)

    def matrix(self) -> Tensor:
        """Return :math:`J`, a row for each residual."""
        units = torch.eye(self.value.numel(), dtype=self.value.dtype, device=self.value.device)
        try:
            (rows,) = torch.autograd.grad(
                self.graph,
                self.x,
                units,
                retain_graph=True,
                create_graph=self.create_graph,
                is_grads_batched=True,
                materialize_grads=True,
                allow_unused=True,
            )
        except RuntimeError:  # an operation that cannot be batched; others fail here again
            return torch.stack([self.pull(unit) for unit in units])
        return rows

    @staticmethod
    def _grad(y: Tensor, x: Tensor, u: Tensor, create_graph: bool) -> Tensor:
        (found,) = torch.autograd.grad(
            y,
            x,
            u,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return found

    def solve(self, b: Tensor, solver: LinearSolver | None) -> LinearSolution:
        """Return the solution of :math:`J d = b` for a square Jacobian.

        ``None`` is LU with the matrix written down, for many unknowns GMRES.
        """
        if solver is None and b.numel() <= DENSE:
            matrix = self.matrix()
            operator = LinearOperator(lambda v, j: j @ v, matrix, adjoint=lambda u, j: j.mT @ u)
            return solve_lu(on_failure="ignore").solve(operator, b)
        operator = LinearOperator(self.push, adjoint=self.pull)
        if self.create_graph:  # a product as a function of the point can be differentiated
            function = self.function

            def push(v: Tensor, x: Tensor) -> Tensor:
                return Linearized(function, x, True).push(v)

            operator = LinearOperator(push, self.x)
        return (solver or solve_gmres(on_failure="ignore")).solve(operator, b)


class Residuals(OfTree):
    """A function of a tree that returns residuals."""

    @abc.abstractmethod
    def residual(self, x: Tensor) -> Tensor:
        """Return the residuals as a vector."""

    def linearized(self, x: Tensor) -> Linearized:
        """Return the residuals and their Jacobian near a point."""
        return Linearized(self.residual, x, self.create_graph)
