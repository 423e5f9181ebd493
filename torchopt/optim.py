"""The object-oriented face: any transformation as a real ``torch.optim.Optimizer``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Concatenate, ParamSpec

from torchopt import engine, hyper, tree, whole
from torchopt.commit import all_or_nothing
from torchopt.engine import Call, advance, initialise
from torchopt.optim_state import checked_groups, checked_slots, step_to_tensor, unexpected
from torchopt.pair import as_transformation
from torchopt.recipe import renamed, signature_of_recipe
from torchopt.transform import GradientTransformation, check_transformation


P = ParamSpec("P")
#: Where ``state`` keeps what no parameter has a part of: torch.optim allows for other keys.
PAIRS = "pairs"


class Optimizer(torch.optim.Optimizer):
    """Run a transformation over parameters in place, as every ``torch.optim`` optimizer does.

    A subclass of ``torch.optim.Optimizer`` with all that comes with it: parameter groups with
    their own hyperparameters, read anew at each step; learning-rate schedulers; gradient scaling;
    hooks; closures; ``state_dict`` in ``torch.optim``'s format. Transformations that look at all
    gradients, such as clipping by norm, see those of all groups together.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or parameter groups, as in ``torch.optim``.
        tx: The transformation. Its hyperparameters are the defaults of the groups.

    Raises:
        TypeError: If ``tx`` is no transformation.
        ValueError: If a hyperparameter is out of bounds or there are no parameters.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = torchopt.Optimizer(
        ...     net.parameters(), torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam(1e-3))
        ... )
        >>> net(torch.ones(3, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.param_groups[0]["lr"]
        0.001
    """

    #: Hyperparameters that a state saved by ``torch.optim``'s class of the same name may lack.
    optional_hyperparameters: ClassVar[frozenset[str]] = frozenset()
    #: Options of ``torch.optim``'s class that must have this value in a loaded state.
    fixed_options: ClassVar[dict[str, Any]] = {}
    #: Whether ``state[p]["step"]`` is kept even if the rule does not read it.
    counts_steps: ClassVar[bool] = False

    transformation: GradientTransformation
    _stepper: Any = None

    @renamed(impl="tx")
    def __init__(self, params: Any, tx: GradientTransformation) -> None:
        tx = as_transformation(tx)
        check_transformation(tx, type(self).__name__)
        self.transformation = tx
        super().__init__(params, tx.hyperparameters())

    @property
    def impl(self) -> GradientTransformation:
        """The transformation, by its name in TorchOpt 0.7.3."""
        return self.transformation

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its missing hyperparameters take the defaults.

        Raises:
            ValueError: If a hyperparameter is out of bounds, or a parameter is in a group already.
        """
        if isinstance(param_group, dict):
            for name, spec in self.transformation.hyper_specs().items():
                if name in param_group:
                    hyper.check(name, param_group[name], spec)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the parameters from their ``grad``; those without one stay.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            TypeError: For a gradient the rule has no form for (sparse). Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        types = set(map(type, grads))
        if types <= {type(None)} or (type(None) not in types and self._step_in_place(grads)):
            return loss
        call = self._call(params, grads)
        updates, slots = advance(self.transformation, call)
        counts = self._counts_steps()
        _refuse_overlapping([p for p, u in zip(params, updates) if u is not None])
        versions = [None if p.is_inference() else p._version for p in params]
        begun = False

        def write() -> None:
            nonlocal begun
            again, begun = begun, True
            for index, (p, u) in enumerate(zip(params, updates)):
                if u is None:
                    continue
                state = self.state[p]
                if counts:
                    state["step"] = call.t[index]
                for name, column in slots.items():
                    if column[index] is not None:
                        state[name] = column[index]
                version = versions[index]
                if not again or (version is not None and p._version == version):
                    p.add_(u)
            if call.pairs:
                self.state[PAIRS] = whole.end(self.transformation.plan, call)  # pyright: ignore

        all_or_nothing(write)
        return loss

    def _step_in_place(self, grads: list[Tensor]) -> bool:
        """Let a fused kernel overwrite parameters and slots; return whether one could."""
        if not engine.accelerates(self.transformation.plan):
            return False
        if self._stepper is None:
            self._stepper = engine.in_place_stepper()
        return self._stepper.step(self, grads)

    def _row(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters of a group as they are now."""
        return {name: group[name] for name in self.transformation.hyper_specs()}

    def _call(self, params: list[Tensor], grads: list[Any]) -> Call:
        names = _parameter_names(self.param_groups)
        steps: list[Any] = [self._previous_step(p) + 1 for p in params]
        rows: list[dict[str, Any]] = []
        for group in self.param_groups:
            first, last = len(rows), len(rows) + len(group["params"])
            count = max(steps[first:last], default=1) - 1
            values = {**self.transformation.hyperparameters(), **group}
            specs = self.transformation.hyper_specs()
            group_names = names[first:last]
            rows += hyper.resolve(
                values, specs, group["params"], lambda n=group_names: n, count, names
            )
        fresh = [
            p if g is not None and not self.state.get(p) else None for p, g in zip(params, grads)
        ]
        call = Call(grads, fresh, steps, {}, rows, lambda: names, params)
        call.slots = initialise(self.transformation, call)
        for name, column in call.slots.items():
            for index, p in enumerate(params):
                if fresh[index] is None and p in self.state:
                    column[index] = self.state[p].get(name)
        call.p = params
        whole.begin(self.transformation.plan, self.state.get(PAIRS, {}), call)  # pyright: ignore
        return call

    def _previous_step(self, param: Tensor) -> int:
        """Return the count of updates so far; a state without a count (SGD's) counts as one."""
        state = self.state.get(param)
        if not state:
            return 0
        return int(state.get("step", 1))

    def _counts_steps(self) -> bool:
        if self.counts_steps or any(part.uses_step for part in self.transformation.plan.parts):
            return True
        specs = self.transformation.hyper_specs()
        values = [group.get(name) for group in self.param_groups for name in specs]
        return any(hyper.has_schedule(value) for value in values)

    # Saving and loading -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state in ``torch.optim``'s format, readable by its class of the same name.

        Schedules given as hyperparameters are code and are left out; loading keeps the live ones.
        """

        def convert(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
            state = {
                key: {n: step_to_tensor(v) if n == "step" else v for n, v in entry.items()}
                for key, entry in saved["state"].items()
            }
            groups = [
                {**self.fixed_options, **{k: v for k, v in g.items() if not hyper.has_schedule(v)}}
                for g in saved["param_groups"]
            ]
            return {**saved, "state": state, "param_groups": groups}

        hook = self.register_state_dict_post_hook(convert, prepend=True)  # before the user's
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load what :meth:`state_dict`, here or of ``torch.optim``'s class, returned.

        Tensors are copied. Slots are kept in the parameter's dtype, in float32 for half precision.

        Raises:
            TypeError: If it is no dict.
            ValueError: If the state is that of another optimizer or of other parameters. Nothing
                has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(unexpected(self, type(state_dict).__name__))
        loaded: dict[Tensor, dict[str, Any]] = {}

        def check(_: Any, given: Any) -> dict[str, Any]:
            groups = checked_groups(self, given)
            loaded.update(checked_slots(self, given["state"], groups))
            whole.check(self.transformation.plan, given["state"].get(PAIRS, {}), type(self))
            return {**given, "param_groups": groups}

        def adopt(_: Any) -> None:  # torch has cast the slots to the parameters' dtype
            for group in self.param_groups:
                for p in group["params"]:
                    if p in loaded:
                        self.state[p] = loaded[p]
                    else:
                        self.state.pop(p, None)
            if PAIRS in self.state:  # the states of pairs are copied as the slots are
                self.state[PAIRS] = tree.tree_map(_copied, self.state[PAIRS])  # pyright: ignore

        hooks = [
            self.register_load_state_dict_pre_hook(check),  # after the user's
            self.register_load_state_dict_post_hook(adopt, prepend=True),  # before the user's
        ]
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        # torch.optim.Optimizer keeps only its own attributes in pickles and deep copies
        return {**super().__getstate__(), "transformation": self.transformation}


def from_recipe(
    recipe: Callable[P, GradientTransformation],
) -> Callable[[Callable[[Any, Any], None]], Callable[Concatenate[Any, Any, P], None]]:
    """Give ``__init__(self, params)`` of a named class the arguments of its recipe as well.

    The implementation switches of ``torch.optim`` are accepted as keywords, so that calls carry
    over: ``foreach`` changes nothing, ``fused=True`` means ``use_accelerated_op=True``, and
    ``differentiable=True`` and ``capturable=True`` are refused with the way to get them.
    """

    def decorate(
        documented: Callable[[Any, Any], None],
    ) -> Callable[Concatenate[Any, Any, P], None]:
        def init(
            self: Any,
            params: Any,
            *args: Any,
            foreach: bool | None = None,
            fused: bool | None = None,
            capturable: bool = False,
            differentiable: bool = False,
            **kwargs: Any,
        ) -> None:
            _refuse_switches(type(self).__name__, capturable, differentiable)
            if fused:
                kwargs["use_accelerated_op"] = True
            Optimizer.__init__(self, params, recipe(*args, **kwargs))  # pyright: ignore[reportCallIssue]

        own = inspect.signature(init).parameters
        switches = [own[name] for name in ("foreach", "fused", "capturable", "differentiable")]
        return signature_of_recipe(init, documented, recipe, [own["self"], own["params"]], switches)

    return decorate


def _refuse_overlapping(params: list[Tensor]) -> None:
    for p in params:
        if not p.is_contiguous() and torch._debug_has_internal_overlap(p) == 1:  # pyright: ignore[reportPrivateImportUsage]
            raise RuntimeError(
                f"A parameter of shape {tuple(p.shape)} is expanded: several entries are a single "
                "memory location, which no update can change by itself. Give its contiguous() copy."
            )


def _refuse_switches(title: str, capturable: bool, differentiable: bool) -> None:
    if differentiable:
        raise ValueError(
            f"{title} changes its parameters in place. To differentiate through its steps use "
            f"torchopt.Meta{title}(module, ...) or the functional face with inplace=False."
        )
    if capturable:
        raise ValueError(f"{title} has no capturable form yet; leave capturable=False.")


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _parameter_names(groups: list[dict[str, Any]]) -> list[str]:
    names = []
    for index, group in enumerate(groups):
        given = group.get("param_names")
        names += given or [
            f"param_groups[{index}]['params'][{k}]" for k in range(len(group["params"]))
        ]
    return names
