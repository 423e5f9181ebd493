r"""The solution of a linear system as an operation with a derivative of its own.

With :math:`A(c)\, x = b`:

.. math::
    \dot x = A^{-1} (\dot b - \dot A x), \qquad
    \bar b = A^{-H} \bar x, \quad \bar c = -\Big(\frac{\partial A(c)\, x}{\partial c}\Big)^H \bar b

The solves in these lines are this operation again, and :math:`x` is its own result, connected by
the graph; so derivatives of any order are right. (With a detached :math:`x` the first is right and
the second is not.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from torchopt.base.batched_grads import over_batches
from torchopt.base.layout import is_inexact
from torchopt.base.torch_internals import (
    TransformType,
    get_interpreter_stack,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)
from torchopt.linear_solve.outcome import Outcome, code_of
from torchopt.linear_solve.product import Map, Product, Transposed
from torchopt.linear_solve.pulling import copies_of, pull_back
from torchopt.linear_solve.system import CONVERGED, Remembering, Solved, System
from torchopt.linear_solve.vectors import norm


_NON_FINITE = code_of(Outcome.NON_FINITE)


class Algorithm(Protocol):
    """What this file needs of a solver."""

    def run(self, system: System) -> Solved:
        """Solve systems of flat vectors."""
        ...

    def limits(self, b: Tensor, rtol: float) -> tuple[Tensor, int]:
        """Return the largest norms of residuals, and the most iterations."""
        ...

    def judge(self, report: dict[str, Any], tol: Tensor, of: str) -> None:
        """Warn or raise where a system was not solved, by choice."""
        ...


@dataclass(frozen=True)
class Job:
    """All of a system but its tensors.

    Attributes:
        solver: Solves it.
        product: The operator.
        precondition: An approximate inverse, or ``None``.
        is_real: Whether no entry belongs to a complex number.
        rtol: A relative tolerance for the dtypes, where the solver has none.
        of: What it is, in words for warnings.
        memory: Of solutions of systems like this, or ``None``.
        report: Where the solver leaves iterations, residuals and codes.
    """

    solver: Algorithm
    product: Product
    precondition: Product | None
    is_real: bool
    rtol: float
    of: str = " was"
    memory: Remembering | None = None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> list[Tensor]:
        """The tensors, those of the operator first."""
        return [*self.product.values, *(self.precondition.values if self.precondition else ())]

    def parts(self, values: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the tensors of the operator and those of the preconditioner."""
        count = len(self.product.values)
        return values[:count], values[count:]

    def derived(self, of: str) -> Job:
        """Return the same system for a derivative."""
        memory = self.memory and self.memory.part(of)
        return dataclasses.replace(self, of=of, memory=memory, report={})

    def transposed(self) -> Job:
        """Return the adjoint system."""
        of = " of a derivative (the adjoint system) was"
        other = self.precondition and self.precondition.transposed()
        return dataclasses.replace(
            self.derived(of), product=self.product.transposed(), precondition=other
        )

    def batched(self, dims: Sequence[int | None], size: int) -> Job:
        """Return the systems of a batch; what they report is reported here."""
        of_product, of_other = self.parts(dims)  # pyright: ignore[reportArgumentType]
        other = self.precondition and self.precondition.batched(of_other, size)  # pyright: ignore[reportArgumentType]
        return dataclasses.replace(
            self,
            product=self.product.batched(of_product, size),  # pyright: ignore[reportArgumentType]
            precondition=other,
        )


def solve_flat(
    job: Job, b: Tensor, start: Tensor | None, values: Sequence[Tensor] | None = None
) -> Tensor:
    """Return the solution of a system of flat vectors, with its derivative."""
    values = job.values if values is None else values
    _refuse_nested_forward_mode([b, *values])
    return _Solution.apply(job, b, start, *values)  # pyright: ignore[reportReturnType]


def _quiet(function: Map) -> Map:
    """Return a map that records nothing to the outside.

    Gradients are on inside of a product, which may compute some itself.
    """
    recording = not isinstance(function, Transposed)

    def called(v: Tensor) -> Tensor:
        with torch.set_grad_enabled(recording):
            return function(v.detach()).detach()

    return called


def _solved(job: Job, b: Tensor, start: Tensor | None, values: Sequence[Tensor]) -> Tensor:
    """Solve systems of plain tensors; nothing is recorded to the outside."""
    if not b.numel():
        nothing = torch.zeros_like(b[..., :1].sum(-1, keepdim=True), dtype=torch.int64)
        _write(job.report, Solved(b, nothing, nothing + CONVERGED), nothing)
        return b.clone()
    of_product, of_other = job.parts(copies_of(values))
    forward, backward = map(_quiet, job.product.bind(of_product))
    precondition = _same if job.precondition is None else _quiet(job.precondition.bind(of_other)[0])
    with torch.no_grad():
        tol, most = job.solver.limits(b, job.rtol)
        rest = tol, most, job.product.tags, job.is_real, job.memory
        found = job.solver.run(System(forward, backward, b, start, precondition, *rest))
        residual = norm(b - forward(found.x)) if found.residual is None else found.residual
        _write(job.report, found, residual)
        job.solver.judge(job.report, tol, job.of)
        # Where b or a product is nan no iteration is made, and zero, the start, is no answer.
        lost = (found.code == _NON_FINITE) | ~torch.isfinite(residual)
        x = torch.where(lost, torch.nan, found.x)
        if job.memory is not None:
            job.memory.keep(x, job.report["most"])
    return x


def _write(report: dict[str, Any], found: Solved, residual: Tensor) -> None:
    """Write down how it went, in numbers: no level of ``torch.func`` is open here."""
    report.update(
        codes=found.code.reshape(-1).tolist(),
        iterations=found.iterations.squeeze(-1),
        most=int(found.iterations.max()) if found.iterations.numel() else 0,
        residual=residual.squeeze(-1),
        largest=float(residual.max()) if residual.numel() else 0.0,
        extra=None if found.extra is None else found.extra.squeeze(-1),
        method=found.method,
    )


def _same(v: Tensor) -> Tensor:
    return v


class _Solution(torch.autograd.Function):
    """The operation; see the module."""

    @staticmethod
    def forward(job: Job, b: Tensor, start: Tensor | None, *values: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve."""
        return _solved(job, b, start, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keep the solution, connected, and the tensors of the operator."""
        job, _, _, *values = inputs
        ctx.job = job
        ctx.save_for_backward(output, *values)
        ctx.save_for_forward(output, *values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve the adjoint system."""
        job: Job = ctx.job
        x, *values = ctx.saved_tensors
        of_product, _ = job.parts(values)
        needed = ctx.needs_input_grad[3:]
        places = [k for k, v in enumerate(of_product) if needed[k] and is_inexact(v)]

        def gradients(grad: Tensor) -> list[Tensor | None]:
            grad_b = solve_flat(job.transposed(), grad, None, values)
            grads: list[Tensor | None] = [None] * len(values)
            if places:
                product = _product_of(job, x, of_product, places)
                pull = pull_back(product, [values[k] for k in places])
                for k, found in zip(places, pull(-grad_b)):
                    grads[k] = found
            return [grad_b, *grads]

        grad_b, *grads = over_batches(gradients, [grad])
        return None, grad_b, None, *grads

    @staticmethod
    def jvp(ctx: Any, _: Any, b: Tensor | None, start: Any, *tangents: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Solve the system for the tangents."""
        job: Job = ctx.job
        x, *values = ctx.saved_tensors
        of_product, _ = job.parts(values)
        places = [k for k in range(len(of_product)) if tangents[k] is not None]
        right = torch.zeros_like(x) if b is None else b
        if places:
            function = _product_of(job, x, of_product, places)
            moved = [tangents[k] for k in places]
            right = right - _push(function, [values[k] for k in places], moved, x)
        return solve_flat(job.derived(" of a derivative (its tangent) was"), right, None, values)

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: Any, job: Job, b: Tensor, start: Any, *values: Tensor
    ) -> Any:
        """Solve all systems of a batch together; each ends by itself."""
        _, b_dim, start_dim, *dims = in_dims
        size = info.batch_size
        b = _leading(b, b_dim, size)
        start = None if start is None else _leading(start, start_dim, size)
        moved = [v if d is None else v.movedim(d, 0) for v, d in zip(values, dims)]
        in_front = [None if d is None else 0 for d in dims]
        return solve_flat(job.batched(in_front, size), b, start, moved), 0


def _product_of(job: Job, x: Tensor, values: Sequence[Tensor], places: Sequence[int]) -> Any:
    """Return the product with ``x`` as a function of the tensors at some places."""

    def function(*changed: Tensor) -> Tensor:
        all_values = list(values)
        for k, value in zip(places, changed):
            all_values[k] = value
        return job.product.bind(all_values)[0](x)

    return function


def _push(
    function: Any, primals: Sequence[Tensor], tangents: Sequence[Any], like: Tensor
) -> Tensor:
    """Return a derivative in forward mode by two in reverse mode, which nest everywhere."""

    def pulled(u: Tensor) -> Tensor:
        parts = pull_back(function, primals)(u)
        pairs = [_real_dot(part, tangent) for part, tangent in zip(parts, tangents)]
        return torch.stack(pairs).sum()

    with torch.enable_grad():
        one = torch.ones((), dtype=like.dtype, device=like.device)
        return pull_back(pulled, [torch.zeros_like(like)])(one)[0]


def _real_dot(x: Tensor, y: Tensor) -> Tensor:
    product = x.conj() * y if x.is_complex() else x * y
    return (product.real if product.is_complex() else product).sum()


def _leading(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _refuse_nested_forward_mode(tensors: Sequence[Tensor]) -> None:
    """Refuse what torch answers with zeros: forward mode over forward mode through a Function.

    Raises:
        NotImplementedError: Naming what to write instead.
    """
    if peek_interpreter_stack() is None:
        return
    stack = get_interpreter_stack() or ()
    if sum(level.key() == TransformType.Jvp for level in stack) < 2:
        return
    if any(is_functorch_wrapped_tensor(x) for x in tensors):
        raise NotImplementedError(
            "The solution of a linear system has no second derivative by forward mode over forward "
            "mode (jacfwd of jacfwd, jvp of jvp): torch would compute zero. Take reverse mode for "
            "one of the two: torch.func.jacfwd(torch.func.jacrev(f)), torch.func.hessian."
        )
