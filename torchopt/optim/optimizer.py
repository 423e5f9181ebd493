"""The object-oriented API: any transformation as a real ``torch.optim.Optimizer``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchopt.base import misuse
from torchopt.base.commit import all_or_nothing
from torchopt.core import engine, hyper, whole
from torchopt.core.accelerated_op import accelerated
from torchopt.core.apply import refuse_unwritable
from torchopt.core.engine import Call, advance
from torchopt.core.extra_values import agreed, check_extra
from torchopt.core.gather import Members, gather
from torchopt.core.gradient_checks import refuse_parameters
from torchopt.core.pair import as_transformation
from torchopt.core.recipe import renamed
from torchopt.core.transform import GradientTransformation, check_transformation
from torchopt.optim.checkpoint import load, saved, set_notes
from torchopt.optim.documented import Documented
from torchopt.optim.evaluation import refuse_step, swap_in_place
from torchopt.optim.memory import apart, refuse_released, slots_of, slots_to_keep
from torchopt.optim.part_groups import (
    PLACES,
    PartGroups,
    divide,
    parameter_names,
    warn_of_hidden_rates,
)
from torchopt.optim.schedules import LiveSchedules
from torchopt.optim.second_gradient import extra_of_step


class Optimizer(Documented, torch.optim.Optimizer):
    """Run a transformation over parameters in place, as every ``torch.optim`` optimizer does.

    A subclass of ``torch.optim.Optimizer`` with all that comes with it: parameter groups with
    their own hyperparameters, read at each step; learning-rate schedulers; gradient scaling;
    hooks; closures; ``state_dict`` in ``torch.optim``'s format. Transformations that look at all
    gradients, such as clipping by norm, see those of all groups together.

    A schedule given as a hyperparameter drives its group: ``group["lr"]`` is the number that the
    next step will use. Another number written there, by hand or by a scheduler of ``torch.optim``,
    overrides the schedule for as long as it is there.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or parameter groups, as in ``torch.optim``.
        tx: The transformation. Its hyperparameters are the defaults of the groups. Each label of a
            :func:`torchopt.partition` gets a group of its own, and so does each part of a chain of
            masked optimizers that share no parameter; their masks are read once, here.

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
    #: What a hyperparameter was in states saved before ``torch.optim``'s class had it.
    former_defaults: ClassVar[dict[str, Any]] = {"maximize": False}
    #: Hyperparameters that only a state of another optimizer has, where nothing else tells.
    foreign_hyperparameters: ClassVar[frozenset[str]] = frozenset()
    #: Options of ``torch.optim``'s class that must have this value in a loaded state.
    fixed_options: ClassVar[dict[str, Any]] = {}

    #: Whether ``state[p]["step"]`` is kept even if the rule does not read it.
    counts_steps: ClassVar[bool] = False

    transformation: GradientTransformation
    _stepper: Any = None
    _parts: PartGroups | None = None  # where each label of a partition has its own groups
    _schedules: LiveSchedules
    _lent: bool = False  # whether slots stand in a state dict too, and must not be overwritten

    @renamed(impl="tx")
    def __init__(self, params: ParamsT, tx: GradientTransformation) -> None:
        misuse.check_parameters(params, type(self).__name__)
        tx = as_transformation(tx)
        check_transformation(tx, type(self).__name__)
        self.transformation, self._parts, params = divide(tx, params)
        self._schedules = LiveSchedules()
        super().__init__(params, self._defaults())
        warn_of_hidden_rates(self)

    @property
    def impl(self) -> GradientTransformation:
        """The transformation, by its name in TorchOpt 0.7.3."""
        return self.transformation

    def add_param_group(self, param_group: Any) -> None:
        """Add a parameter group; its missing hyperparameters take the defaults.

        Args:
            param_group: A dict with ``"params"`` and hyperparameters, as in ``torch.optim``, or
                the parameters alone: a tensor, or several, or ``(name, parameter)`` pairs.
                ``"fused": True`` requires kernels, for all groups, as in the constructor.

        Raises:
            ValueError: If a hyperparameter is out of bounds, a switch is refused as in the
                constructor, or a parameter is in a group already. Nothing has changed then.
        """
        misuse.check_group(param_group, type(self).__name__)
        if not isinstance(param_group, dict):
            if not isinstance(param_group, Iterable) or isinstance(param_group, str):
                raise TypeError(
                    "param_group must be a dict with 'params', or parameters, got "
                    f"{type(param_group).__name__}. Of a module give module.parameters()."
                )
            param_group = {"params": param_group}
        places: list[int] | None = None
        if self._parts is not None:
            if "label" not in param_group:
                self._add_divided(self._parts, param_group)
                return
            places = param_group.pop(PLACES, None)
            param_group = self._parts.completed(param_group)
        for name, spec in self.group_specs(param_group).items():
            if name in param_group:
                hyper.check(name, param_group[name], spec)
        switches = [bool(param_group.get(name)) for name in ("capturable", "differentiable")]
        misuse.refuse_switches(type(self).__name__, *switches)
        tx = self.transformation
        if param_group.get("fused"):
            tx = accelerated(tx, True)
        try:
            super().add_param_group(param_group)
        except ValueError as error:
            if "non-leaf" not in str(error):
                raise
            raise ValueError(misuse.with_history(type(self).__name__)) from error
        try:
            self._refuse_parameters(self.param_groups[-1])
        except BaseException:
            del self.param_groups[-1]
            raise
        set_notes(self, self.param_groups[-1])
        if self._parts is not None:
            self._parts.place(self.param_groups[-1], places)
        self.transformation = tx
        self._adopt_schedules(self.param_groups[-1:])

    def _refuse_parameters(self, group: dict[str, Any]) -> None:
        """Refuse parameters that the rule cannot take."""
        tx = self.transformation if self._parts is None else self._parts.transform_of(group)
        names = group.get("param_names") or [f"params[{k}]" for k in range(len(group["params"]))]
        refuse_parameters(tx, zip(names, group["params"]))

    def _add_divided(self, parts: PartGroups, group: dict[str, Any]) -> None:
        before, places = len(self.param_groups), len(parts.places)
        try:
            for own in parts.divided([group]):
                self.add_param_group(own)
        except BaseException:
            del self.param_groups[before:], parts.places[places:]
            raise

    def _defaults(self) -> dict[str, Any]:
        """Return the hyperparameters of every group."""
        return (
            self.transformation.hyperparameters() if self._parts is None else self._parts.defaults
        )

    def group_specs(self, group: Mapping[str, Any]) -> dict[str, hyper.HyperSpec]:
        """Return the hyperparameters that a group holds, by name."""
        return (
            self.transformation.hyper_specs() if self._parts is None else self._parts.specs(group)
        )

    def _adopt_schedules(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            self._schedules.adopt([group], list(self.group_specs(group)), self._count)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the parameters from their ``grad``; those without one stay.

        Args:
            closure: Re-evaluates the model and returns the loss. Rules that read the loss (as
                ``value``, of :func:`torchopt.polyak_sgd`) get it from here; :func:`torchopt.sam`
                calls it twice.
            **extra: Further values for rules that read them (``hessian`` of ``torchopt.sophia``).

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            TypeError: For a gradient the rule has no form for, or a value that nothing reads.
            RuntimeError: For a parameter that cannot be changed by itself (expanded), or whose
                memory has been given back. Nothing has changed then, nor in the first case.
        """
        refuse_step(self)
        loss = None
        if extra:
            check_extra(self.transformation, extra, type(self).__name__)
        if closure is not None:
            misuse.check_closure(closure, self)
            with torch.enable_grad():
                loss = closure()
        params = list(itertools.chain.from_iterable(g["params"] for g in self.param_groups))
        grads = [p.grad for p in params]
        types = set(map(type, grads))
        if types <= {type(None)}:
            return loss
        if self._schedules.any:
            self._schedules.write(self.param_groups, self._count)
        if type(None) in types or self._lent or extra or not self._step_in_place(grads):
            self._step_by_engine(params, grads, loss, closure, extra)
        if self._schedules.any:
            self._schedules.write(self.param_groups, self._count, soon=True)
        return loss

    def eval(self) -> None:
        """Give the parameters the values to evaluate with, where they are others.

        Schedule-free optimizers and ASGD take gradients at other weights than they recommend. For
        all others nothing happens. Call :meth:`train` before the next step: training goes on at the
        same bits, since its weights are kept meanwhile, in ``state`` and in checkpoints.
        """
        self._swap(True)

    def train(self) -> None:
        """Give the parameters the values to train with again, after :meth:`eval`."""
        self._swap(False)

    def _swap(self, to_eval: bool) -> None:
        params = list(itertools.chain.from_iterable(g["params"] for g in self.param_groups))
        if self._parts is not None:
            params = [params[k] for k in self._parts.order(self.param_groups)]
        swap_in_place(self, self._call(params, [None] * len(params)), to_eval)

    def _extra(self, params: list[Tensor], loss: Any, closure: Any) -> dict[str, Any]:
        return extra_of_step(params, loss, closure)

    def _step_by_engine(
        self, params: list[Tensor], grads: list[Any], loss: Any, closure: Any, extra: dict[str, Any]
    ) -> None:
        """Compute updates and slots, then write them: new tensors for slots."""
        self._adopt_schedules(self.param_groups)
        if self._parts is not None:
            order = self._parts.order(self.param_groups)
            params, grads = [params[k] for k in order], [grads[k] for k in order]
        call = self._call(params, grads)
        counts, plan = self._counts_steps(), self.transformation.plan
        call.overwrites = not plan.narrow  # of narrow slots a rule sees copies
        call.extra = agreed(plan.reads, params, {**self._extra(params, loss, closure), **extra})
        if not (compiling := torch.compiler.is_compiling()):
            refuse_released(call)
        updates, slots = advance(self.transformation, call)
        slots = {name: apart(column, params, grads) for name, column in slots.items()}
        changed = [k for k, u in enumerate(updates) if u is not None]
        refuse_unwritable([params[k] for k in changed], lambda k: call.names()[changed[k]])
        versions = [None if compiling or p.is_inference() else p._version for p in params]
        lent = slots_of(self.state, params) if self._lent else set()
        begun = False

        def write() -> None:
            nonlocal begun
            again, begun = begun, True
            for index, (p, u) in enumerate(zip(params, updates)):
                if u is None:
                    continue
                kept = slots_to_keep(slots, index, lent)
                if counts:
                    kept["step"] = call.t[index]
                if plan.counters:
                    kept.update(plan.kept(call.hyper[index]))
                if kept:
                    self.state[p].update(kept)
                version = versions[index]
                if not again or (version is not None and p._version == version):
                    p.add_(u)
            for p in params if lent else ():
                entry = self.state.get(p, {})
                # those of a parameter without gradient, or left as they were by the rule
                entry.update({n: x.clone() for n, x in entry.items() if id(x) in lent})
            if call.pairs:
                self.state[whole.PAIRS] = whole.end(plan, call)  # pyright: ignore

        all_or_nothing(write)
        if self._lent:  # an attribute that is set cannot be compiled before torch 2.13
            self._lent = False

    def _step_in_place(self, grads: list[Tensor]) -> bool:
        """Let a fused kernel overwrite parameters and slots; return whether one could."""
        if not engine.accelerates(self.transformation.plan):
            return False
        if self._stepper is None:
            self._stepper = engine.in_place_stepper()
        return self._stepper.step(self, grads)

    def _row(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters of a group as they are now."""
        if self._parts is not None:
            return self._parts.row(group)
        return {name: group[name] for name in self.transformation.plan.hyper_specs}

    def _call(self, params: list[Tensor], grads: list[Any]) -> Call:
        """Gather the update of all groups, with parameters in the order they were given in."""
        plan, names = self.transformation.plan, parameter_names(self.param_groups)
        members: list[Members] = []
        for group in self.param_groups:
            row = plan.values | self._row(group)
            values = {name: hyper.as_numbers(row[name]) for name in plan.hyper_specs}
            first = sum(len(one.leaves) for one in members)
            own = names[first : first + len(group["params"])]
            # schedules are none of the groups', so the count does not matter
            members.append(Members(values, group["params"], lambda own=own: own, known=names))
        order, labels = None, None
        if self._parts is not None:
            order = self._parts.order(self.param_groups)
            labels = [group["label"] for group in self.param_groups for _ in group["params"]]
            names, labels = ([column[k] for k in order] for column in (names, labels))
        steps: list[Any] = [self._previous_step(p) + 1 for p in params]
        states = [self.state.get(p) or {} for p in params]
        slots: dict[str, Any] = {n: [s.get(n) for s in states] for n in plan.slot_names}
        counters = {n: [s.get(n, c.start) for s in states] for n, c in plan.counters.items()}
        call = Call(grads, params, steps, slots, [], lambda: names, params, labels=labels)
        fresh = [g is not None and not state for g, state in zip(grads, states)]
        gather(self.transformation, members, call, counters, order=order, fresh=fresh)
        whole.begin(plan, self.state.get(whole.PAIRS, {}), call)  # pyright: ignore
        return call

    def _previous_step(self, param: Tensor) -> int:
        """Return the count of updates so far; a state without a count (SGD's) counts as one."""
        state = self.state.get(param)
        if state is None:
            return 0
        if not isinstance(state, dict):
            raise TypeError(
                f"optimizer.state has {state!r} for a parameter of shape {tuple(param.shape)}; "
                "expected a dict of slots. Remove it with optimizer.state.pop(parameter)."
            )
        return int(state.get("step", 1)) if state else 0

    def _count(self, group: dict[str, Any]) -> int:
        """Return how often a group has been updated: the most updates of one of its parameters."""
        return max(map(self._previous_step, group["params"]), default=0)

    def _counts_steps(self) -> bool:
        return self.counts_steps or self._schedules.any or self.transformation.plan.uses_step

    def has_schedule(self, group: dict[str, Any], name: str) -> bool:
        """Whether a hyperparameter of a group was given as a schedule."""
        return self._schedules.has(group, name) or hyper.has_schedule(group[name])

    # Saving and loading -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state in ``torch.optim``'s format, readable by its class of the same name.

        It is a snapshot: count, slots and hyperparameters belong together, and no later step
        changes them, so that ``load_state_dict`` goes back to this moment. Nothing is copied for
        it here. The slots are lent to the snapshot, and the next step writes new ones instead of
        overwriting them, as the first step does; those after it are in place again. (What
        ``torch.optim`` returns goes on with the optimizer; a best state kept in memory has to be
        copied there.)

        Of a schedule given as a hyperparameter the present number is saved. Loading keeps the
        schedules of the optimizer that loads, at the loaded count.
        """
        return saved(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load what :meth:`state_dict`, here or of ``torch.optim``'s class, returned.

        Tensors are copied. Slots are kept in the parameter's dtype, in float32 for half precision.
        Parameters are matched by name where both sides have names (the optimizer was made from
        ``named_parameters()``), else by position. A hyperparameter that the state is too old to
        have is what it was at the time.

        Raises:
            TypeError: If it is no dict.
            ValueError: If the state is that of another optimizer or of other parameters. Nothing
                has changed then.
        """
        load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # torch.optim.Optimizer keeps only its own attributes in pickles and deep copies
        own = ("transformation", "_parts", "_schedules", "_lent")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}
