"""L-BFGS as a ``torch.optim.Optimizer``: an API of ``torchopt.solvers.LBFGS``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base.misuse.given import given
from torchopt.optim.checkpoint import unexpected
from torchopt.solvers import lbfgs
from torchopt.solvers.base import plain
from torchopt.solvers.closure import ClosureObjective
from torchopt.solvers.flat import Layout, Objective
from torchopt.solvers.line_search import StrongWolfe
from torchopt.solvers.outcome import Outcome


#: Names of the flat vectors, lists of them, and numbers of a state, as ``torch.optim`` has them.
VECTORS = ("d", "prev_flat_grad")
LISTS = ("old_stps", "old_dirs", "ro")
NUMBERS = ("t", "H_diag", "prev_loss")
COUNTS = ("func_evals", "n_iter")
HYPERPARAMETERS = {
    *("lr", "max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size"),
    "line_search_fn",
}


class LBFGS(torch.optim.Optimizer):
    r"""L-BFGS, which evaluates the loss itself, as often as it needs.

    .. math:: p_{k+1} = p_k - t_k H_k \nabla f(p_k)

    as in :class:`torchopt.solvers.LBFGS`. One call of :meth:`step` makes up to ``max_iter``
    iterations; what is remembered of the way is kept from call to call. The steps are those of
    ``torch.optim.LBFGS``, and the ``state_dict`` interchange. Near a minimum, where losses differ
    by less than they are rounded, the line search calls the closure less often.

    All parameters are one vector: there is one parameter group, on one device. A parameter without
    a gradient counts as one whose gradient is zero; sparse gradients are made dense.

    Args:
        params: Parameters, or ``(name, parameter)`` pairs, or one parameter group.
        lr: The length of a step, or the first that a line search tries, >= 0.
        max_iter: Most iterations in one call of :meth:`step`.
        max_eval: Most calls of the closure in one call of :meth:`step` (at least one iteration is
            made; a line search ends at this number or one later); by default
            ``max_iter * 5 // 4``.
        tolerance_grad: End where no entry of the gradient is larger; >= 0.
        tolerance_change: End where an iteration changes no entry of the parameters by more, or the
            loss by less; >= 0.
        history_size: How many pairs of vectors are remembered, >= 1.
        line_search_fn: ``None``, ``"strong_wolfe"`` or ``"backtracking"`` (which
            ``torch.optim.LBFGS`` does not know).

    Attributes:
        outcome: Why the last call of :meth:`step` ended, a :class:`torchopt.solvers.Outcome`.

    Slots: of all parameters together, in the state of the first: ``d``, ``t``, ``old_dirs``,
    ``old_stps``, ``ro``, ``H_diag``, ``prev_flat_grad``, ``prev_loss``, ``n_iter``,
    ``func_evals``. Not differentiable; :func:`torchopt.solvers.minimize` is.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of bounds, there are no parameters, or more than one group.

    Example:
        >>> import torch, torchopt
        >>> x = torch.tensor([-1.5, 2.0], requires_grad=True)
        >>> optimizer = torchopt.LBFGS([x], line_search_fn="strong_wolfe", max_iter=50)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        ...     loss.backward()
        ...     return loss
        >>> loss_before = optimizer.step(closure)
        >>> x.detach(), optimizer.outcome.success
        (tensor([1.0000, 1.0000]), True)

    Reference:
        Liu and Nocedal, On the limited memory BFGS method for large scale optimization,
        Mathematical Programming 45, 1989; ``torch.optim.LBFGS``.
    """

    outcome: Outcome | None = None
    _known: list[Tensor] | None = None  # the parameters that the state is of

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
    ) -> None:
        misuse.check_parameters(params, type(self).__name__)
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
        }
        solver_of(defaults)
        if max_eval is None:
            defaults["max_eval"] = max_iter * 5 // 4
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the parameter group; there is only one, given to the constructor.

        Raises:
            ValueError: If there is one already, or a hyperparameter is out of bounds. Nothing has
                changed then.
        """
        title = type(self).__name__
        if self.param_groups:
            raise ValueError(
                f"{title} doesn't support per-parameter options (parameter groups): all parameters "
                "are one vector with one line search. Give all of them in one list."
            )
        misuse.check_group(param_group, title)
        solver_of({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make up to ``max_iter`` iterations.

        A step of a line search that leads to an infinite or ``nan`` loss is shortened. Without a
        line search, or where the first loss or gradient is not finite, the parameters stay at the
        last place where both were, and a ``RuntimeWarning`` is given.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward()`` and returns the
                loss.

        Returns:
            What ``closure`` returned at first, for the parameters before the step.

        Raises:
            TypeError: If there is no closure, or it returns no number.
            ValueError: If it returns several or complex numbers, leaves no gradient, or the
                parameters are not those of the steps before. In all cases, and if ``closure``
                itself raises, parameters and state are as before the call.
        """
        group = self._group()
        params: list[Tensor] = group["params"]
        objective = ClosureObjective(closure, params, type(self).__name__)
        memory = self._remembered(params, objective.layout)
        solver, total = solver_of(group), self.state.get(params[0], {})
        try:
            state = solver.start(objective, objective.written)
            state = dataclasses.replace(state, **memory)
            while (outcome := _why_to_end(solver, state)) is None:
                if solver.line_search_fn is None and state.iterations + 1 == solver.max_iter:
                    state = _leap(solver, objective, state)
                else:
                    state = solver.advance(objective, state)
            objective.write(state.x)
        except BaseException:
            objective.restore()
            raise
        counts = zip(COUNTS, (state.evaluations, state.iterations))
        entry = {**total, **{name: total.get(name, 0) + n for name, n in counts}}
        if state.iterations:
            entry.update(_saved(state, group["history_size"]))
        self.state[params[0]] = entry  # a new dict: a state dict is a snapshot
        self._known, self.outcome = list(params), outcome
        if outcome is Outcome.NOT_FINITE:
            warnings.warn(f"{type(self).__name__}.step: {outcome.text}", RuntimeWarning, 4)
        return objective.first

    def _group(self) -> dict[str, Any]:
        if len(self.param_groups) != 1:
            raise ValueError(
                f"{type(self).__name__} has one parameter group, found {len(self.param_groups)} in "
                "param_groups."
            )
        return self.param_groups[0]

    def _remembered(self, params: list[Tensor], layout: Layout) -> dict[str, Any]:
        """Return what the state of the last step remembers, as fields of the solver's state."""
        known = params if self._known is None else self._known
        same = len(known) == len(params) and all(a is b for a, b in zip(known, params))
        entry = self.state.get(params[0], {})
        if all(saved.get("d") is None for saved in self.state.values()):
            return {}
        if not same or "d" not in entry or entry["d"].numel() != layout.numel:
            raise ValueError(
                "The parameters are not those of the steps before, whose directions are vectors of "
                f"all of them. Make a new {type(self).__name__}, or clear its state: "
                "optimizer.state.clear()."
            )

        def own(x: Any) -> Tensor:
            return torch.as_tensor(x, dtype=layout.dtype, device=layout.device)

        columns = zip(*(map(own, entry[name]) for name in LISTS))
        return {
            "pairs": tuple(lbfgs.Pair(*column) for column in columns),
            "scale": own(entry["H_diag"]),
            "direction": own(entry["d"]),
            "length": plain(entry["t"]),
            "previous_grad": own(entry["prev_flat_grad"]),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load what ``state_dict()``, here or of ``torch.optim.LBFGS``, returned.

        Tensors are copied.

        Raises:
            TypeError: If it is no dict.
            ValueError: If it is that of another optimizer or of other parameters. Nothing has
                changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(unexpected(self, given(state_dict)))
        params = self._group()["params"]
        layout = Layout(params, "Parameters")
        entry = self._checked(state_dict, layout)
        super().load_state_dict(dict(state_dict))
        # not what torch has cast: in half precision vectors are float32
        self.state.clear()
        if entry:
            self.state[params[0]] = {name: _copied(x, layout) for name, x in entry.items()}
        self._known = list(params)

    def _checked(self, state_dict: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
        """Return the saved state of the first parameter.

        Raises:
            ValueError: If it is none, or does not fit the parameters.
        """
        title = type(self).__name__
        if not {"state", "param_groups"} <= set(state_dict):
            raise ValueError(unexpected(self, list(state_dict)))
        groups, state = state_dict["param_groups"], state_dict["state"]
        live = self.param_groups[0]
        if len(groups) != 1 or len(groups[0]["params"]) != len(live["params"]):
            found = [len(group["params"]) for group in groups]
            raise ValueError(
                f"The state has groups of {found} parameters, {title} has {[len(live['params'])]}."
            )
        missing = sorted(HYPERPARAMETERS - set(groups[0]))
        if missing:
            raise ValueError(
                f"The state is not one of {title}: its group has no {', '.join(missing)}."
            )
        solver_of(groups[0])
        if not state:
            return {}
        entry = state.get(groups[0]["params"][0])
        names = {*VECTORS, *LISTS, *NUMBERS}
        if len(state) != 1 or entry is None or not set(COUNTS) <= set(entry):
            raise ValueError(f"The state is not one of {title}: got {misuse.short(state)}.")
        if entry.get("d") is None:
            return {name: entry[name] for name in COUNTS}
        if not names <= set(entry):
            raise ValueError(f"The state of {title} lacks {', '.join(sorted(names - set(entry)))}.")
        vectors = [*(entry[name] for name in VECTORS), *entry["old_stps"], *entry["old_dirs"]]
        if len({len(entry[name]) for name in LISTS}) != 1:
            raise ValueError(f"{', '.join(LISTS)} in the state of {title} have different lengths.")
        sizes = {vector.numel() for vector in vectors}
        if sizes != {layout.numel}:
            raise ValueError(
                f"The state is that of parameters with {sorted(sizes)} entries, {title} has "
                f"{layout.numel}."
            )
        return entry

    def __getstate__(self) -> dict[str, Any]:
        # torch.optim.Optimizer keeps only its own attributes in pickles and deep copies
        return {**super().__getstate__(), "_known": self._known, "outcome": self.outcome}


def solver_of(group: Mapping[str, Any]) -> lbfgs.LBFGS:
    """Return the solver with the hyperparameters of a group.

    Raises:
        TypeError, ValueError: If one is out of bounds.
    """
    search, lr = group["line_search_fn"], group["lr"]
    if search is not None and not isinstance(search, str):
        raise TypeError(
            f"line_search_fn must be 'strong_wolfe', 'backtracking' or None, got {given(search)}. "
            "A line search of your own goes into torchopt.solvers.LBFGS."
        )
    return lbfgs.LBFGS(
        plain(lr) if isinstance(lr, Tensor) and lr.numel() == 1 else lr,
        group["history_size"],
        StrongWolfe(max_eval=None) if search == "strong_wolfe" else search,  # up to the step's own
        tolerance_grad=group["tolerance_grad"],
        tolerance_change=group["tolerance_change"],
        max_iter=group["max_iter"],
        max_eval=group["max_eval"],
    )


def _why_to_end(solver: lbfgs.LBFGS, state: lbfgs.LBFGSState) -> Outcome | None:
    """Return why to end; one iteration is made whatever ``max_eval``, as in ``torch.optim``."""
    outcome = solver.terminate(state)
    return None if outcome is Outcome.MAX_EVAL and not state.iterations else outcome


def _leap(solver: lbfgs.LBFGS, objective: Objective, state: lbfgs.LBFGSState) -> lbfgs.LBFGSState:
    """Take the last step of a fixed length, whose loss the next call of ``step`` will compute."""
    state = solver.aim(objective, state)
    if state.outcome is not None or state.direction is None:
        return state
    x = torch.add(state.x, state.direction, alpha=plain(state.length))
    return dataclasses.replace(state, x=x, outcome=Outcome.MAX_ITER)


def _saved(state: lbfgs.LBFGSState, history_size: int) -> dict[str, Any]:
    """Return what is remembered under the names of ``torch.optim.LBFGS``."""
    return {
        "d": state.direction,
        "t": state.length,
        "old_dirs": [pair.y for pair in state.pairs],
        "old_stps": [pair.s for pair in state.pairs],
        "ro": [pair.rho for pair in state.pairs],
        "H_diag": state.scale,
        "prev_flat_grad": state.previous_grad,
        "prev_loss": state.previous_value,
        "al": [None] * history_size,  # room that torch.optim.LBFGS computes in
    }


def _copied(value: Any, layout: Layout) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(layout.device, layout.dtype, copy=True)
    return [_copied(x, layout) for x in value] if isinstance(value, list) else value
