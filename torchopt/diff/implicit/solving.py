"""Run a user's solver on numbers, and take apart what it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from torchopt.base import tree
from torchopt.base.captured import Captured
from torchopt.base.levels import any_level, is_wrapped
from torchopt.base.misuse.given import given
from torchopt.diff.implicit.running import run
from torchopt.diff.pullback import Tensors
from torchopt.typing import PyTree


class _Solve:
    """A call of a solver as a function of the tensors that it is given or closes over."""

    def __init__(
        self, solver: Callable[..., Any], args: Sequence[Any], keywords: dict[str, Any], aux: bool
    ) -> None:
        self.has_aux, self.solver = aux, solver
        self.leaves, self.spec = tree.flatten((list(args), keywords))
        self.places = [k for k, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        self.start = len(tree.flatten(args[0])[0])
        # below the levels of torch.func nothing may come from one
        self.captured = Captured(solver) if any_level() else None
        found = self.captured.values if self.captured else []
        self.hidden = [k for k, x in enumerate(found) if is_wrapped(x)]
        self.tensors = (*(self.leaves[k] for k in self.places), *(found[k] for k in self.hidden))

    def __call__(self, *tensors: Tensor) -> Tensors:
        """Call the solver, and return the tensors of what it returns."""
        solver, leaves = self.solver, list(self.leaves)
        for k, x in zip(self.places, tensors):
            asked = k < self.start and self.leaves[k].requires_grad and not any_level()
            leaves[k] = x.detach().requires_grad_() if asked else x
        if self.captured is not None and self.hidden:
            values = list(self.captured.values)
            for k, x in zip(self.hidden, tensors[len(self.places) :]):
                values[k] = x
            solver = self.captured.with_values(values)
        args, keywords = tree.unflatten(self.spec, leaves)
        self.result = self._checked(solver(*args, **keywords))
        found, self.result_spec = tree.flatten(self.result)
        self.found = [x if not isinstance(x, Tensor) else None for x in found]
        self.is_tensor = [isinstance(x, Tensor) for x in found]
        return tuple(x.detach() for x in found if isinstance(x, Tensor))

    def _checked(self, result: Any) -> Any:
        if not self.has_aux:
            return result
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"With has_aux=True the solver must return (solution, aux), got {given(result)}."
            )
        return result

    def restored(self, tensors: Sequence[Tensor]) -> Any:
        """Return what the solver returned, with other tensors."""
        parts = iter(tensors)
        leaves = [next(parts) if t else x for t, x in zip(self.is_tensor, self.found)]
        return tree.unflatten(self.result_spec, leaves)


def solved(
    solver: Callable[..., Any], args: Sequence[Any], keywords: dict[str, Any], has_aux: bool
) -> tuple[PyTree, Any]:
    """Return a solution and ``aux`` (or ``None``), with constants for tensors."""
    call = _Solve(solver, args, keywords, has_aux)
    with asking_for_grad("A solver"):
        tensors = run(call, call.tensors)
    result = call.restored(tensors)
    return result if has_aux else (result, None)


@contextlib.contextmanager
def asking_for_grad(title: str) -> Iterator[None]:
    """Tell of a solver that needs gradients what to write."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise RuntimeError(
            f"{error} {title} runs as under torch.no_grad(): write `with torch.enable_grad():` "
            "around what it differentiates by backward or autograd.grad."
        ) from error
