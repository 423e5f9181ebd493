"""Steps of an ``inner_loop`` block that can be taken again, when an adjoint asks for it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.base.captured import Captured
from torchopt.base.frozen_function import frozen
from torchopt.base.misuse.given import given
from torchopt.core import whole
from torchopt.diff.replay.tape import Tape
from torchopt.diff.replay.visible import names_in
from torchopt.diff.replay.watch import computed_from, newest_node
from torchopt.nn import marks, moments
from torchopt.nn.parameters import place_each, place_parameter
from torchopt.optim.meta_call import Entry, new_call
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.meta_state import GroupState


class ReplayedSteps:
    """What ``step`` of the optimizer of a block is, under an adjoint that replays.

    Args:
        optimizer: The optimizer of the block.
        modules: All modules of its networks.
        tape: What remembers the steps.
    """

    def __init__(self, optimizer: MetaOptimizer, modules: Sequence[nn.Module], tape: Tape) -> None:
        self.optimizer, self.modules, self.tape = optimizer, modules, tape
        self._placed: list[tuple[Tensor, Tensor]] = []  # buffers: put there, and the node's own

    def step(
        self,
        loss: Callable[[], Tensor] | None = None,
        *,
        grads: Any = None,
        create_graph: bool | None = None,
        **extra: Any,
    ) -> None:
        """Take a step, as :meth:`torchopt.MetaOptimizer.step` does, that is replayed.

        Raises:
            TypeError: If ``loss`` is no function.
            ValueError: If gradients are given.
        """
        if grads is not None:
            raise ValueError(
                f"step(grads=...) cannot be computed again, as adjoint={self.tape.name} asks for. "
                "Give the function that computes the loss: inner.step(lambda: loss)."
            )
        if isinstance(loss, Tensor) or not callable(loss):
            raise TypeError(
                f"With adjoint={self.tape.name} a step is computed again, so that step takes a "
                f"function that computes the loss, got {given(loss)}. Write inner.step(lambda: "
                "criterion(net(x), y))."
            )
        optimizer = self.optimizer
        if not torch.is_grad_enabled():
            type(optimizer).step(optimizer, loss, create_graph=create_graph, **extra)
            return
        self.tape.refuse_levels()
        extra.pop("retain_graph", None)
        before = optimizer._states, optimizer._pairs
        try:
            self._give_first_slots()
            entries, params = optimizer._trainable.now(optimizer.param_groups)
            places = Places(self.modules, entries, params)
            one = _Step(optimizer, places, loss, create_graph, extra)
            carry = self.tape.take(one, one.carry(params, self._buffers(places)))
        except BaseException:  # a step that is refused changes nothing
            optimizer._states, optimizer._pairs = before
            raise
        marked = marks.any_marked(params)
        for old, new in zip(params, carry["params"]) if marked else ():
            marks.carry(old, new)
        place_each([entry.site for entry in entries], carry["params"])
        buffers = [new.clone() for new in carry["buffers"]]
        self._placed = list(zip(buffers, carry["buffers"]))
        for module, name, k in places.all_buffers:
            moments.put(module, "_buffers", name, buffers[k])
        optimizer._states, optimizer._pairs = one.states(carry), carry["pairs"]
        optimizer._steady = None

    def _give_first_slots(self) -> None:
        """Let the optimizer have the slots that its first step would make."""
        optimizer = self.optimizer
        entries, params = optimizer._trainable.now(optimizer.param_groups)
        if all(e.name in optimizer._states[e.group].steps for e in entries):
            return
        plan, groups = optimizer.transformation.plan, optimizer.param_groups
        stand_ins: list[Any] = list(params)
        call = new_call(
            optimizer.transformation, groups, optimizer._states, entries, params, stand_ins
        )
        whole.begin(plan, optimizer._pairs, call)
        states = [
            GroupState(
                dict(state.steps),
                {slot: dict(column) for slot, column in state.slots.items()},
                {name: dict(column) for name, column in state.counters.items()},
            )
            for state in optimizer._states
        ]
        for k, entry in enumerate(entries):
            state = states[entry.group]
            if entry.name in state.steps:
                continue
            state.steps[entry.name] = 0
            for slot, column in call.slots.items():
                state.slots[slot][entry.name] = column[k]
            for name, counter in plan.counters.items():
                state.counters[name][entry.name] = counter.start
        optimizer._states, optimizer._pairs = states, whole.end(plan, call)
        optimizer._steady = None

    def _buffers(self, places: Places) -> list[Tensor]:
        """Return the buffers, with the results of the step before where nobody has changed them."""
        known = {id(put): own for put, own in self._placed}
        found = []
        for _, _, buffer in places.buffers:
            own = known.get(id(buffer))
            # BatchNorm writes to its buffers without counting it, so that values are compared
            same = own is not None and torch.equal(own, buffer)
            found.append(own if same else buffer.clone())
        return found


class Places:
    """What networks hold at a step besides its carry, and where the carry stands in them."""

    def __init__(
        self, modules: Sequence[nn.Module], entries: list[Entry], params: list[Tensor]
    ) -> None:
        self.entries = entries
        trained = set(map(id, params))
        self.fixed = [
            (module, name, tensor)
            for module in modules
            for name, tensor in module._parameters.items()
            if tensor is not None and id(tensor) not in trained
        ]
        self.modes = [(module, module.training) for module in modules]
        found: dict[int, tuple[nn.Module, str, Tensor]] = {}
        for module in modules:
            for name, buffer in module._buffers.items():
                if buffer is not None and not nn.parameter.is_lazy(buffer):
                    found.setdefault(id(buffer), (module, name, buffer))
        self.buffers = list(found.values())
        order = {key: k for k, key in enumerate(found)}
        self.all_buffers = [
            (module, name, order[id(buffer)])
            for module in modules
            for name, buffer in module._buffers.items()
            if id(buffer) in order
        ]
        self.marks = [_marks(p) for p in params] if marks.any_marked(params) else None

    def forget_tensors(self) -> None:
        """Hold no values of buffers: they are in the carry."""
        self.buffers = [(module, name, torch.empty(0)) for module, name, _ in self.buffers]

    @contextlib.contextmanager
    def holding(self, params: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[None]:
        """Let the networks hold a carry and all that they held at the step."""
        before: list[tuple[nn.Module, str, str, Any]] = []

        def put(module: nn.Module, kind: str, name: str, value: Any) -> None:
            holder = getattr(module, kind) if kind else vars(module)
            before.append((module, kind, name, holder.get(name, moments.ABSENT)))
            moments.put(module, kind, name, value)

        try:
            for k, (entry, tensor) in enumerate(zip(self.entries, params)):
                if not tensor.requires_grad:
                    tensor = tensor.detach().requires_grad_()
                if self.marks is not None:
                    if tensor.is_leaf and torch.is_grad_enabled():
                        # hooks filter the gradient of the loss, and not the outer one
                        tensor = tensor.view_as(tensor)
                    marks.carry(self.marks[k], tensor)
                for owner, name in entry.site.owners:
                    before.append((owner, "_parameters", name, owner._parameters.get(name)))
                    place_parameter(owner, name, tensor)
            copies = [buffer.clone() for buffer in buffers]
            for module, name, k in self.all_buffers:
                put(module, "_buffers", name, copies[k])
            for module, name, tensor in self.fixed:
                if module._parameters.get(name) is not tensor:
                    put(module, "_parameters", name, tensor)
            for module, mode in self.modes:
                if module.training != mode:
                    put(module, "", "training", mode)
            yield
        finally:
            for module, kind, name, value in reversed(before):
                moments.put(module, kind, name, value)

    def read(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters and buffers that stand there now."""
        params: list[Any] = []
        for entry in self.entries:
            owner, name = entry.site.owners[0]
            params.append(owner._parameters[name])
        buffers: list[Any] = [module._buffers[name] for module, name, _ in self.buffers]
        return params, buffers


def _marks(tensor: Tensor) -> Tensor:
    """Return a tensor without values that carries what another one does."""
    carrier = torch.empty(0, requires_grad=True) * 1
    marks.carry(tensor, carrier)
    return carrier


class _Step:
    """One step as a function of its carry, after which networks are what they were before."""

    def __init__(
        self,
        optimizer: MetaOptimizer,
        places: Places,
        loss: Callable[[], Tensor],
        create_graph: bool | None,
        extra: dict[str, Any],
    ) -> None:
        self.places, self.loss, self.options = places, frozen(loss), extra
        self.create_graph = optimizer.create_graph if create_graph is None else create_graph
        self.worker = copy.copy(optimizer)
        vars(self.worker).pop("step", None)
        self.worker._trainable = optimizer._trainable
        self.worker._states, self.worker._pairs, self.worker._steady = [], {}, None
        self.worker.param_groups = [dict(group) for group in optimizer.param_groups]
        self.before = optimizer._states, optimizer._pairs
        self.present: tuple[list[Tensor], list[Tensor], int] = [], [], 0
        self.value: Tensor | None = None
        numbers = [
            v for group in self.worker.param_groups for n, v in group.items() if n != "params"
        ]
        self.learned = any(isinstance(v, (Tensor, dict, tuple, list)) for v in numbers)

    def carry(self, params: list[Tensor], buffers: list[Tensor]) -> dict[str, Any]:
        """Return the carry before this step."""
        states, pairs = self.before
        self.before, self.present = ([], {}), (params, buffers, newest_node())
        self.places.forget_tensors()
        return self._tree(params, buffers, states, pairs)

    def _tree(
        self, params: list[Tensor], buffers: list[Tensor], states: list[GroupState], pairs: Any
    ) -> dict[str, Any]:
        def counter(value: Any) -> Any:  # a learned number makes it a tensor
            if self.learned and not isinstance(value, Tensor):
                return torch.tensor(value, dtype=torch.float64)
            return value

        return {
            "params": list(params),
            "buffers": list(buffers),
            "steps": [dict(state.steps) for state in states],
            "slots": [{s: dict(c) for s, c in state.slots.items()} for state in states],
            "counters": [
                {n: {k: counter(v) for k, v in c.items()} for n, c in state.counters.items()}
                for state in states
            ],
            "pairs": pairs,
        }

    def _refuse_earlier(self, loss: Tensor) -> None:
        """Refuse a loss that depends on the weights by way of what was computed before it.

        It would be a function of other weights than the gradient is taken by.

        Raises:
            ValueError: Naming the tensor.
        """
        (params, buffers, start), self.present = self.present, ([], [], 0)
        names = names_in(self.loss)
        names.update(
            {id(b): f"buffer {place[1]}" for b, place in zip(buffers, self.places.buffers)}
        )
        pair = computed_from([b for b in buffers if b.requires_grad], params)
        if pair is None and (pair := computed_from([loss], params, before=start)) is not None:
            read = Captured(self.loss).values
            pair = computed_from([t for t in read if id(t) not in set(map(id, params))], params)
            pair = pair or (loss, loss)
        if pair is None:
            return
        name = names.get(id(pair[0]))
        what = f"{name!r}" if name else "a tensor"
        raise ValueError(
            f"The loss of this step reads {what}, which was computed from the present weights "
            "before the step. When the step is computed again there are other weights in their "
            "place, and the gradient by way of it would be missing. Compute it inside of the "
            "function that is given to step, or detach() it."
        )

    def states(self, carry: dict[str, Any]) -> list[GroupState]:
        """Return the states of an optimizer in a carry."""
        parts = zip(carry["steps"], carry["slots"], carry["counters"])
        return [GroupState(dict(steps), slots, counters) for steps, slots, counters in parts]

    def __call__(self, carry: dict[str, Any], _: None) -> tuple[dict[str, Any], None]:
        """Take the step."""
        worker = self.worker
        worker._states, worker._pairs = self.states(carry), carry["pairs"]
        try:
            with self.places.holding(carry["params"], carry["buffers"]):
                worker.step(self._checked_loss, create_graph=self.create_graph, **self.options)
                params, buffers = self.places.read()
                return self._tree(params, buffers, worker._states, worker._pairs), None
        finally:
            worker._states, worker._pairs, worker._steady = [], {}, None

    def _checked_loss(self) -> Tensor:
        """Return the loss, which must be what it was the first time.

        Raises:
            RuntimeError: If it is another one.
        """
        loss = self.loss()
        if not isinstance(loss, Tensor):
            return loss
        if self.value is None:
            self._refuse_earlier(loss)
            self.value = loss.detach()
            return loss
        tolerance = torch.finfo(loss.dtype).eps ** 0.5
        if not torch.allclose(loss.detach(), self.value, tolerance, tolerance, equal_nan=True):
            raise RuntimeError(
                f"The loss of this step was {float(self.value):.6g}, and is "
                f"{float(loss.detach()):.6g} when the step is computed again: its function reads "
                "something that has changed since (the next batch, an attribute, a list). Give "
                "what belongs to this step to the function: "
                "inner.step(functools.partial(loss_fn, x, y))."
            )
        return loss
