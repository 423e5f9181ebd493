"""GradientTransformation: hyperparameters, slots and one pure step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from torchopt.base import misuse, tree
from torchopt.base.values import describe_values, same
from torchopt.core import hyper, whole
from torchopt.core.apply import apply_updates
from torchopt.core.engine import Leaves
from torchopt.core.exchange import Exchanging
from torchopt.core.functional import advance_trees, eval_trees, gather_tree, slot_trees
from torchopt.core.gather import initialise
from torchopt.core.opt_state import OptState
from torchopt.core.plan import Plan
from torchopt.core.slots import Counter, Slot, as_slot
from torchopt.typing import Step, TensorTree


C = TypeVar("C", bound=type)
T = TypeVar("T")  # a tree: what comes out is like what goes in


# hyper and its kin are no field specifiers: checkers find a default there by keyword only
@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def transformation(cls: C) -> C:
    """Make a class a transformation: its annotated fields become its hyperparameters.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.core.hyper import hyper
        >>> @torchopt.transformation
        ... class ScaleByRoot(torchopt.ElementwiseTransformation):
        ...     floor: float = hyper(1.0, gt=0)
        ...
        ...     def rule(self, g, p, t, slots, *, floor):
        ...         return g / (g.abs() + floor).sqrt(), slots
        >>> tx = torchopt.chain(ScaleByRoot(floor=1.0), torchopt.scale(-0.1))
        >>> g = [torch.tensor([8.0, -3.0])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([-0.2667,  0.1500])]
    """
    decorated: Any = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    decorated.declared = hyper.specs_of(decorated)
    return decorated


#: Fields that are shown where they say something.
_SELDOM = ("use_accelerated_op", "slot_dtypes")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GradientTransformation(Exchanging):
    r"""A rule that turns gradients into updates, written once and used through three APIs.

    A subclass is a frozen dataclass (decorate it with :func:`transformation`). Fields declared with
    :func:`~torchopt.hyper` or :func:`~torchopt.flag` are its hyperparameters, ``slots`` names the
    buffers it keeps for each parameter, and :meth:`step` is the rule over lists of tensors;
    :class:`ElementwiseTransformation` asks for the rule of one tensor only.

    Example:
        >>> import torch, torchopt
        >>> tx = torchopt.adam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0, -2.0])}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": torch.tensor([0.5, 0.5])}, state, params)
        >>> torchopt.apply_updates(params, updates)
        {'w': tensor([ 0.9000, -2.1000])}
    """

    #: ``None`` uses fused kernels where they are available, ``True`` requires and ``False`` forbids
    #: them.
    use_accelerated_op: bool | None = dataclasses.field(default=None, kw_only=True, compare=False)
    #: The dtypes of slots that are kept in another one; see :meth:`with_slot_dtypes`.
    slot_dtypes: tuple[tuple[str, torch.dtype], ...] = dataclasses.field(default=(), kw_only=True)

    #: The class of a pair of functions, and what joins transformations: both are built on this
    #: class, so their modules set them.
    of_functions: ClassVar[type[GradientTransformation]]
    joined: ClassVar[Callable[..., GradientTransformation]]

    #: The declared hyperparameters, by field name; set by :func:`transformation`.
    declared: ClassVar[dict[str, hyper.HyperSpec]] = {}
    #: The buffers kept for each parameter; a name alone is a slot that starts as zeros.
    slots: ClassVar[tuple[Slot, ...]] = ()
    #: The numbers kept beside them; see :meth:`count`.
    counters: ClassVar[tuple[Counter, ...]] = ()
    #: Whether the rule reads the step count (bias correction).
    uses_step: ClassVar[bool] = False
    #: Whether rule and initial slots depend on each entry of a parameter by itself.
    elementwise: ClassVar[bool] = False
    #: Whether the rule is right for sparse gradients.
    accepts_sparse: ClassVar[bool] = False
    #: Whether it is right for complex numbers, which it sees as pairs of reals in a last dimension.
    accepts_complex: ClassVar[bool] = True
    #: Names of the extra values of a call that it reads, as ``"value"``, the loss; ``"*"`` for any.
    reads: ClassVar[tuple[str, ...]] = ()
    #: Whether ``refreshed`` does something; set where a class defines it.
    refreshes: ClassVar[bool] = False
    #: Whether ``refuses`` has anything to say; set where a class defines it.
    is_selective: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        misuse.check_declarations(cls)
        cls.is_selective = cls.is_selective or "refuses" in vars(cls)
        cls.refreshes = cls.refreshes or "refreshed" in vars(cls)
        if isinstance(declared := vars(cls).get("slots"), tuple):
            cls.slots = tuple(map(as_slot, declared))

    if TYPE_CHECKING:

        @overload
        def __init__(
            self,
            *,
            use_accelerated_op: bool | None = None,
            slot_dtypes: tuple[tuple[str, torch.dtype], ...] = (),
        ) -> None: ...
        @overload
        def __init__(self, init: Callable[..., Any], update: Callable[..., Any]) -> None: ...
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    else:

        def __new__(cls, *args, **kwargs):
            """``GradientTransformation(init, update)`` makes a pair of functions of this class."""
            if cls is GradientTransformation and (args or "init" in kwargs):
                return object.__new__(cls.of_functions)
            return object.__new__(cls)

    def __post_init__(self) -> None:
        misuse.check_decorated(self)
        for name, spec in self.hyper_specs().items():
            given = getattr(self, name)
            value = hyper.plain(given)
            hyper.check(name, value, spec)
            value = tuple(value) if spec.length else value
            if value is not given:
                object.__setattr__(self, name, value)

    # What a subclass defines ------------------------------------------------------------------

    def count(self, t: Step, *args: Any, **values: Any) -> dict[str, Any]:
        """Return the counters for update ``t`` (1 at the first); pure.

        Args:
            t: The step count.
            *args: None; here so that a subclass may name its hyperparameters.
            **values: The counters as they were, and the hyperparameters, by name.
        """
        raise TypeError(f"{type(self).__name__} has counters, and defines no count(t, ...).")

    def step(self, leaves: Leaves) -> tuple[list[Tensor], list[tuple[Tensor | None, ...]]]:
        """Return the updates and the new slots of all parameters; pure."""
        raise TypeError(misuse.no_step(self))

    def refreshed(self, leaves: Leaves) -> list[tuple[Tensor | None, ...]]:
        """Return the slots for a step that is given some of the values in ``reads``; pure.

        The rule sees these, and is computed as ever, by kernels where they are available.
        """
        return leaves.slots

    #: Whether the weights to evaluate with are others than those that are trained.
    evaluates: ClassVar[bool] = False

    def converted(self, leaves: Leaves, to_eval: bool) -> list[Tensor]:
        """Return parameters as they are evaluated, or from those as they are trained; pure."""
        return leaves.p

    def takes_sparse(self, **hyperparameters: Any) -> bool:
        """Whether the rule is right for sparse gradients with these hyperparameters."""
        return self.accepts_sparse

    def refuses(self, param: Tensor) -> str:
        """Return why a parameter cannot have this rule, and what to do; empty if it can."""
        return ""

    # Structure --------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[GradientTransformation, ...]:
        """The transformations that a chain applies one after the other."""
        return (self,)

    def hyper_specs(self) -> dict[str, hyper.HyperSpec]:
        """Return the declared hyperparameters by name."""
        return self.declared

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters by name: what ``torch.optim`` calls a parameter group."""
        return {name: getattr(self, name) for name in self.hyper_specs()}

    def slot_names(self) -> tuple[str, ...]:
        """Return the names of the buffers kept for each parameter."""
        names = self.__dict__.get("_slot_names")
        if names is None:
            names = tuple(as_slot(slot).name for slot in self.slots)
            object.__setattr__(self, "_slot_names", names)
        return names

    def first_slots(self, param: Tensor, **hyperparameters: Any) -> tuple[Tensor | None, ...]:
        """Return the initial buffers of one parameter, in the order of ``slots``."""
        return tuple(slot.first(param, hyperparameters) for slot in self.kept(self.slots))

    def whole_slots(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Return the slots that are one tree for all parameters; see ``torchopt.core.whole``."""
        return {}

    def renewed(self) -> GradientTransformation:
        """Return the same with such slots of its own."""
        return self

    @property
    def plan(self) -> Plan:
        """Where each part finds its hyperparameters and slots among those of the whole."""
        plan = self.__dict__.get("_plan")  # not cached_property: its lock cannot be compiled
        if plan is None:
            plan = Plan(self.parts)
            object.__setattr__(self, "_plan", plan)
        return plan

    def chain(self, following: GradientTransformation) -> GradientTransformation:
        """Return ``chain(self, following)``."""
        return self.joined(self, following)

    def with_accelerated_op(self, use_accelerated_op: bool | None) -> GradientTransformation:
        """Return this transformation with another setting of the fused kernels."""
        return dataclasses.replace(self, use_accelerated_op=use_accelerated_op)

    # The functional API ----------------------------------------------------------------------

    def init(self, params: TensorTree) -> OptState:
        """Return the state for ``params``, any pytree of tensors.

        Raises:
            TypeError: If a leaf is neither a tensor nor ``None``.
        """
        leaves, spec = tree.flatten(params)
        starts = {name: counter.start for name, counter in self.plan.counters.items()}
        call = gather_tree(self, params, None, leaves, [1] * len(leaves), {})
        slots = slot_trees(self, params, params, spec, initialise(self, call))
        whole.begin(self.plan, {}, call)
        return OptState(0, {**slots, **whole.end(self.plan, call)}, starts)

    def update(
        self,
        grads: T,
        state: OptState | tuple[Any, ...] | None,
        params: TensorTree | None = None,
        *,
        inplace: bool = True,
        **extra: Any,
    ) -> tuple[T, OptState]:
        """Turn gradients into updates, to be added by :func:`torchopt.apply_updates`.

        Args:
            grads: Gradients, with the structure of ``params``. ``None`` leaves a parameter and its
                slots alone.
            state: What :meth:`init` or the last :meth:`update` returned; its parts, as a tuple; or
                ``None`` where nothing is kept.
            params: The parameters; needed by weight decay and by masks given as a function.
            inplace: ``True`` is leave to reuse the buffers of ``grads`` and ``state``. ``False`` is
                pure, and differentiable in every input.
            **extra: Further values for transformations that read them, by ``leaves.call.extra`` in
                :meth:`step`, or by an argument of the second function of a pair
                ``GradientTransformation(init, update)``; others ignore them.

        Returns:
            The updates, with the structure of ``grads``, and the new state.

        Raises:
            ValueError: If a structure, shape or device does not match, or the state belongs to
                another transformation.
            TypeError: If a dtype does not match or a gradient is sparse and the rule has no
                sparse form.
            RuntimeError: If ``inplace=True`` and a gradient is being recorded through an input.
        """
        updates, _, spec, new_state = advance_trees(self, grads, state, params, inplace, extra)
        return tree.unflatten(spec, updates), new_state

    def apply_gradients(
        self,
        grads: TensorTree,
        state: OptState | tuple[Any, ...] | None,
        params: T,
        *,
        inplace: bool = True,
        **extra: Any,
    ) -> tuple[T, OptState]:
        r"""Take a step: :meth:`update` and :func:`torchopt.apply_updates` in one.

        .. math:: p \leftarrow p + u(g, p)

        With ``inplace=False`` a fused kernel does both in one pass over memory, and both are one
        node of the graph. The values are the same bits; in half precision the sum is rounded once
        instead of twice.

        Args:
            grads: As for :meth:`update`.
            state: As for :meth:`update`.
            params: The parameters. Where the gradient is ``None`` they stay.
            inplace: ``True`` changes the tensors in ``params`` and returns them. ``False`` makes
                new ones, differentiable in every input.
            **extra: As for :meth:`update`.

        Returns:
            The parameters after the step, with the structure of ``params``, and the new state.

        Raises:
            ValueError, TypeError, RuntimeError: As :meth:`update` and
                :func:`torchopt.apply_updates`; nothing has changed then.

        Example:
            >>> import torch, torchopt
            >>> tx = torchopt.sgd(lr=0.1)
            >>> params = {"w": torch.tensor([1.0, -2.0])}
            >>> grads = {"w": torch.tensor([0.5, 0.5])}
            >>> params, state = tx.apply_gradients(grads, tx.init(params), params, inplace=False)
            >>> params
            {'w': tensor([ 0.9500, -2.0500])}
        """
        # update does without parameters, and refuses if some are there and others are not
        given, received = (any(x is not None for x in tree.flatten(t)[0]) for t in (params, grads))
        if received and not given:
            raise TypeError(
                "apply_gradients needs the parameters, got none; update(grads, state) gives the "
                "updates alone."
            )
        if inplace:
            updates, new_state = self.update(grads, state, params, **extra)
            return apply_updates(params, updates), new_state
        new, p, spec, new_state = advance_trees(self, grads, state, params, False, extra, True)
        new = [old if x is None else x for x, old in zip(new, p)]
        return tree.unflatten_like(params, grads, spec, new), new_state

    def eval_params(self, state: OptState | tuple[Any, ...] | None, params: T) -> T:
        """Return the parameters to evaluate with; the same unless the optimizer trains others.

        Schedule-free optimizers and ASGD take gradients at one point and recommend another. The
        result is differentiable in ``state`` and ``params``.

        Args:
            state: What the last :meth:`update` returned.
            params: The parameters that are trained.

        Raises:
            ValueError, TypeError: If the state does not fit, as for :meth:`update`.

        Example:
            >>> import torch, torchopt
            >>> tx = torchopt.schedule_free_sgd(lr=1.0, momentum=0.5)
            >>> params = [torch.tensor([1.0])]
            >>> params, state = tx.apply_gradients([torch.tensor([1.0])], tx.init(params), params)
            >>> params, tx.eval_params(state, params)
            ([tensor([0.])], [tensor([0.])])
        """
        return eval_trees(self, state, params)

    # Printing, comparing, hashing ---------------------------------------------------------------

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{field.name}={describe_values(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if field.name not in _SELDOM or getattr(self, field.name) not in (None, ())
        )
        return f"{type(self).__name__}({fields})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        names = [f.name for f in dataclasses.fields(self) if f.compare]
        return all(same(getattr(self, name), getattr(other, name)) for name in names)

    def __hash__(self) -> int:
        return hash(type(self))

    def __getstate__(self) -> dict[str, Any]:
        # without the plan, which is made again
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def check_transformation(tx: object, where: str) -> None:
    """Refuse anything but a transformation.

    Raises:
        TypeError: Naming what was given and what to give.
    """
    if not isinstance(tx, GradientTransformation):
        raise TypeError(misuse.not_a_transformation(tx, where))
