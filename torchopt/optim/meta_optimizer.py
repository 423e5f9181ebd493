"""The differentiable API: optimizers that keep a network connected to what it was."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchopt.base import misuse, tree
from torchopt.base.commit import all_or_nothing
from torchopt.base.values import describe_values, same
from torchopt.core import step_tags, whole
from torchopt.core.engine import advance
from torchopt.core.evaluation import converted_call
from torchopt.core.extra_values import check_extra
from torchopt.core.opt_state import OptState
from torchopt.core.pair import as_transformation
from torchopt.core.recipe import renamed
from torchopt.core.transform import GradientTransformation, check_transformation
from torchopt.nn import marks
from torchopt.nn.checkpointing import remember_weights
from torchopt.nn.parameters import place_each
from torchopt.nn.snapshot import extract_state_dict
from torchopt.optim import given_gradients
from torchopt.optim.documented import Documented
from torchopt.optim.meta_call import known_of_all, names_of, new_call, next_states
from torchopt.optim.meta_groups import checked_group
from torchopt.optim.meta_saved import loaded_form, saved_form
from torchopt.optim.meta_state import GroupState, checked_state, state_of
from torchopt.optim.second_gradient import evaluated, gradients_in_network
from torchopt.optim.steady import Steady, Trainable


remember_weights(required=False)


class MetaOptimizer(Documented, misuse.NoPlainOptimizer):
    """Optimize a network by steps that can be differentiated through.

    :meth:`step` puts new tensors into the network, connected by the graph to the old ones, to the
    data and to every hyperparameter that is a tensor; so a later loss can be differentiated with
    respect to any of them.

    Args:
        module: The network; or a list of networks and of dicts ``{"params": network, "lr": ...}``
            with hyperparameters of their own.
        tx: The transformation. A hyperparameter may be a dict keyed by parameter name, or by the
            name of a part of the network (``{"body": a, "head": b}``).

    Attributes:
        param_groups: One dict per network: ``"params"`` and the hyperparameters, read at each step.
        create_graph: What :meth:`step` uses unless told otherwise; ``False`` gives the first-order
            approximation.

    Raises:
        TypeError: If ``tx`` is not a transformation or ``module`` not a module.
        ValueError: If a module has no parameters or a hyperparameter is out of bounds.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> start = net.weight
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> inner = torchopt.MetaOptimizer(net, torchopt.sgd(lr))
        >>> inner.step(net(torch.ones(3, 2)).square().mean())
        >>> outer_loss = net(torch.ones(3, 2)).square().mean()
        >>> [g.shape for g in torch.autograd.grad(outer_loss, [start, lr])]
        [torch.Size([1, 2]), torch.Size([])]
    """

    #: The object-oriented class of the same algorithm, which reads the same saved states: that of
    #: the same module and name, without "Meta".
    _twin: ClassVar[Any] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__name__.removeprefix("Meta")
        module = sys.modules.get(cls.__module__)
        if name != cls.__name__ and isinstance(getattr(module, name, None), type):
            cls._twin = getattr(module, name)

    @renamed(impl="tx")
    def __init__(
        self, module: nn.Module | Sequence[nn.Module | dict[str, Any]], tx: GradientTransformation
    ) -> None:
        tx = as_transformation(tx)
        check_transformation(tx, type(self).__name__)
        remember_weights()
        self.transformation = tx
        self.create_graph = True
        self.param_groups: list[dict[str, Any]] = []
        self._states: list[GroupState] = []
        self._pairs: dict[str, Any] = {}  # the states of pairs, which are of all groups together
        self._trainable = Trainable()
        self._steady: Steady | None = None
        groups: Any = module if isinstance(module, (list, tuple)) else [module]
        for group in groups:
            self.add_param_group(group)
        if not self.param_groups:
            raise ValueError(f"{type(self).__name__} got an empty list instead of a module.")

    def add_param_group(self, group: nn.Module | dict[str, Any]) -> None:
        """Let the optimizer also train another network.

        Args:
            group: The network, or ``{"params": network, "lr": ...}`` with its own hyperparameters.

        Raises:
            TypeError: If there is no module in it, or an unknown hyperparameter.
            ValueError: If the module has no parameters or shares one with another group.
        """
        whole_group, walk = checked_group(self, group)
        if self._trainable.count == len(self.param_groups):
            self._trainable.add(walk)
        self.param_groups.append(whole_group)
        plan = self.transformation.plan
        slots, counters = (
            {name: {} for name in names} for names in (plan.slot_names, plan.counters)
        )
        self._states.append(GroupState({}, slots, counters))

    @property
    def impl(self) -> GradientTransformation:
        """The transformation, by its name in TorchOpt 0.7.3."""
        return self.transformation

    @property
    def state_groups(self) -> list[OptState]:
        """What :meth:`extract_state` returns, as TorchOpt 0.7.3 had it."""
        return list(self.extract_state())

    # Stepping ---------------------------------------------------------------------------------

    def step(
        self,
        loss: Tensor | Callable[[], Tensor] | None = None,
        *,
        grads: given_gradients.Gradients | None = None,
        value: Any = None,
        create_graph: bool | None = None,
        retain_graph: bool | None = None,
        **extra: Any,
    ) -> None:
        """Differentiate the loss, update, and put the new tensors into the network.

        Or update from gradients that are given instead: accumulated over parts of the data, made by
        ``torch.func``, averaged over machines. From those that ``torch.autograd.grad`` returns with
        ``create_graph=True`` it is the same step. They are copied, so that buffers may be reused.

        Under ``torch.no_grad()`` nothing is recorded: the new tensors are leaves, for adapting
        without a meta-gradient at the memory of one step.

        Attributes of a parameter go over to the tensor that takes its place. Its hooks
        (``weight.register_hook``) filter the gradient of the loss at every step; they are not run
        on what an outer loss sends back from one step to the one before, only, as ever, on what
        arrives at the parameter itself.

        Args:
            loss: A scalar computed with the network's present tensors; or a function that computes
                it, as a rule needs that asks for gradients at other weights (:func:`torchopt.sam`).
            grads: Gradients instead of a loss: a sequence in the order of
                ``net.parameters()``, or a dict by the names of ``net.named_parameters()``, for
                several networks with the number of the group before it (``"0.weight"``). ``None``
                leaves a parameter and its slots alone.
            value: The value of the loss beside ``grads``, for transformations that read it.
            create_graph: ``False`` treats the gradient as a constant (the first-order
                approximation); ``None`` means the attribute ``create_graph``.
            retain_graph: As in :func:`torch.autograd.grad`; ``None`` means ``create_graph``.
            **extra: Further values for rules that read them (``hessian`` of ``torchopt.sophia``).

        Raises:
            TypeError: If ``loss`` is no tensor, nor its function returns one, or a gradient is
                none; if both are given, or nothing reads an extra value.
            ValueError: If ``loss`` is not scalar, has no graph or does not depend on the weights;
                if ``grads`` are not those of the parameters.
            RuntimeError: If its graph has been freed. The network and this optimizer have not
                changed then, nor in any other case of refusal.

        Example:
            >>> import torch, torchopt
            >>> net, x = torch.nn.Linear(2, 1), torch.randn(6, 2)
            >>> inner = torchopt.MetaSGD(net, lr=0.1)
            >>> grads = [torch.zeros_like(p) for p in net.parameters()]
            >>> for part in x.split(2):
            ...     loss = net(part).square().sum() / len(x)
            ...     found = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
            ...     grads = [a + b for a, b in zip(grads, found)]
            >>> inner.step(grads=grads)
        """
        if extra:
            check_extra(self.transformation, extra, type(self).__name__)
        track = torch.is_grad_enabled()
        create_graph = (self.create_graph if create_graph is None else create_graph) and track
        loss, closure = (loss, None) if isinstance(loss, Tensor) else evaluated(loss)
        entries, params = self._trainable.now(self.param_groups)
        marked = marks.any_marked(params)
        names = partial(names_of, self.param_groups, entries)
        known = partial(known_of_all, self.param_groups)
        value, g = given_gradients.gradients(
            loss, grads, value, params, names, known, create_graph, retain_graph
        )
        if marked:
            g = marks.filtered(params, g, create_graph)
        tx, plan, steady = self.transformation, self.transformation.plan, self._steady
        given = tx, self.param_groups, self._states, entries, params, g
        call = None if steady is None else steady.call(*given)
        if call is None:
            steady, call = None, new_call(*given)
        if plan.whole:
            whole.begin(plan, self._pairs, call)
        call.extra = extra if value is None else {"value": value, **extra}
        if closure is not None:
            modules = [group["params"] for group in self.param_groups]
            grad_fn = gradients_in_network(closure, modules, entries, call, create_graph)
            call.extra = {**call.extra, "grad_fn": grad_fn}
        weights, slots = advance(tx, call, apply=True)
        call.extra = {}  # calls are kept, and would keep the graph of the loss
        new_weights = [
            w if w is None or track else w.detach().requires_grad_(True) for w in weights
        ]
        for old, new in zip(params, new_weights) if marked else ():
            if new is not None:
                marks.carry(old, new)
        if track:
            step_tags.note_create_graph(new_weights, create_graph)
        steady = steady or Steady.after(self.param_groups, call, slots)
        state = None if steady is None else steady.next_state(call, slots, track)
        if state is not None:
            states = [state]
        else:
            states = next_states(self._states, entries, call, slots, track, plan.kept_at)
            steady = None
        pairs = whole.end(plan, call) if plan.whole else {}
        pairs = pairs if track else tree.tree_map(_detached, pairs)
        sites = [entry.site for entry in entries]

        def write() -> None:
            self._states, self._steady, self._pairs = states, steady, pairs
            place_each(sites, new_weights)

        all_or_nothing(write)

    def _forget(self) -> None:
        """Drop what earlier steps found out: it belongs to the optimizer that this is a copy of."""
        self._trainable, self._steady = Trainable(self._trainable.frozen), None

    # Evaluation -------------------------------------------------------------------------------

    def eval_params(self) -> dict[str, Tensor]:
        """Return the weights to evaluate with by name, connected to all they are made of.

        They are those of the network, but for schedule-free optimizers and ASGD. With several
        networks each name begins with the number of its group: ``"0.weight"``.

        Example:
            >>> import torch, torchopt
            >>> net = torch.nn.Linear(2, 1)
            >>> inner = torchopt.MetaSGDScheduleFree(net, lr=0.1)
            >>> for _ in range(2):
            ...     inner.step(net(torch.ones(1, 2)).sum())
            >>> prediction = torch.func.functional_call(net, inner.eval_params(), torch.ones(1, 2))
        """
        entries, params = self._trainable.now(self.param_groups)
        grads: list[Any] = [None] * len(params)
        call = new_call(
            self.transformation, self.param_groups, self._states, entries, params, grads
        )
        for k, entry in enumerate(entries):
            if entry.name not in self._states[entry.group].steps:  # it has taken no step
                for column in call.slots.values():
                    column[k] = None
        return dict(zip(call.names(), converted_call(self.transformation, call, True)))

    # State ------------------------------------------------------------------------------------

    def extract_state(self) -> tuple[OptState, ...]:
        """Return the state by reference, one :class:`~torchopt.OptState` per group."""
        pairs = zip(self.param_groups, self._states)
        states = tuple(state_of(group["params"], state) for group, state in pairs)
        for index, state in enumerate(states):
            state.slots = self._with_pairs(state.slots, index)
        return states

    def _with_pairs(self, slots: dict[str, Any], index: int) -> dict[str, Any]:
        """Return the slots of a group, and with the first group's the states of pairs."""
        own, _ = whole.split(self.transformation.plan, slots)
        return {**own, **(self._pairs if index == 0 else {})}

    def recover_state(self, state: Any) -> None:
        """Go back to an extracted state; see :func:`torchopt.recover_state_dict`."""
        if not isinstance(state, (tuple, list)) or not all(isinstance(s, OptState) for s in state):
            raise TypeError(misuse.not_an_optimizer_state(state, self))
        if len(state) != len(self.param_groups):
            raise ValueError(
                f"The state has {len(state)} groups, {type(self).__name__} has "
                f"{len(self.param_groups)}."
            )
        plan, frozen = self.transformation.plan, self._trainable.frozen
        split = [whole.split(plan, saved.slots) for saved in state]
        self._states = [
            checked_state(
                self,
                group["params"],
                OptState(saved.step, own, saved.counters),
                frozen.get(index, ()),
            )
            for index, (group, saved, (own, _)) in enumerate(zip(self.param_groups, state, split))
        ]
        self._pairs = split[0][1]

    def state_dict(self) -> dict[str, Any]:
        """Return state and hyperparameters in ``torch.optim``'s format, for ``torch.save``.

        The tensors are detached; :func:`torchopt.extract_state_dict` keeps their graph. Parameters
        are numbered in the network's order, frozen ones too, and named. Schedules given as
        hyperparameters are code and are left out; loading keeps the live ones.
        """
        saved = saved_form(self, self._states)
        if self._pairs:
            saved["state"][whole.PAIRS] = tree.tree_map(_detached, self._pairs)
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict`, here or of an optimizer of ``torch.optim``, returned.

        That may be ``torch.optim``'s or ours of the same algorithm, over the same network: its
        parameters are found by name, or else by their order. Tensors are copied.

        Raises:
            ValueError: If the state is that of another optimizer or network; nothing changes then.

        Example:
            >>> import torch, torchopt
            >>> net = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            >>> net(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> inner = torchopt.MetaSGD(net, momentum=0.9)
            >>> inner.load_state_dict(optimizer.state_dict())
            >>> torchopt.extract_state_dict(inner)[0].momentum_buffer["bias"]
            tensor([1.])
        """
        rest, pairs = whole.taken_out(self.transformation.plan, state_dict, type(self))
        states, groups = loaded_form(self, rest)
        self.recover_state(states)
        self._pairs = extract_state_dict(pairs, by="deepcopy")
        for live, group in zip(self.param_groups, groups):
            live.update(group)

    def clone(self, clone_module: Callable[[nn.Module], nn.Module]) -> MetaOptimizer:
        """Return an optimizer with this state over ``clone_module`` of each network."""
        cloned = copy.copy(self)
        cloned.param_groups = [
            {**g, "params": clone_module(g["params"])} for g in self.param_groups
        ]
        cloned._states = list(self._states)
        cloned._forget()
        return cloned

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trainable": Trainable(self._trainable.frozen), "_steady": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> MetaOptimizer:
        memo[id(self)] = cloned = copy.copy(self)
        keep = {}  # a hyperparameter with history cannot be copied
        for group in self.param_groups:
            for value in tree.flatten({k: v for k, v in group.items() if k != "params"})[0]:
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    keep[id(value)] = value
        memo.update(keep)
        cloned.transformation = copy.deepcopy(self.transformation, memo)
        cloned.param_groups = [copy.deepcopy(group, memo) for group in self.param_groups]
        # not by recover_state: a network that owns its optimizer is a copy in the making here
        cloned._states = [state.deepcopy() for state in self._states]
        cloned._forget()
        return cloned

    def __repr__(self) -> str:
        defaults = self.transformation.hyperparameters()
        networks = []
        for group in self.param_groups:
            live = [
                f"{name}={describe_values(group[name])}"
                for name, value in defaults.items()
                if not same(group[name], value)
            ]
            networks.append(" ".join([type(group["params"]).__name__, *live]))
        return f"{type(self).__name__}({', '.join(networks)}, {self.transformation!r})"


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
