"""A functional optimizer that keeps its own state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from torchopt.base import misuse, tree
from torchopt.core import step_tags
from torchopt.core.extra_values import check_extra
from torchopt.core.functional import as_state
from torchopt.core.opt_state import OptState
from torchopt.core.pair import Pair, as_transformation
from torchopt.core.recipe import renamed
from torchopt.core.transform import GradientTransformation, check_transformation
from torchopt.diff.gradient import differentiate
from torchopt.nn.snapshot import extract_state_dict
from torchopt.optim.second_gradient import evaluated, gradients_of_function
from torchopt.typing import TensorTree


T = TypeVar("T")


class FuncOptimizer(misuse.NoPlainOptimizer):
    """Optimize any tree of parameters by ``params = optimizer.step(loss, params)``.

    Args:
        tx: The transformation.
        inplace: Whether :meth:`step` changes the parameters in place, by default.

    Raises:
        TypeError: If ``tx`` is no transformation.

    Example:
        >>> import torch, torchopt
        >>> optimizer = torchopt.FuncOptimizer(torchopt.sgd(0.1))
        >>> params = {"w": torch.tensor([1.0], requires_grad=True)}
        >>> params = optimizer.step(params["w"].square().sum(), params)
        >>> params["w"].detach(), params["w"].requires_grad
        (tensor([0.8000]), True)
    """

    @renamed(impl="tx")
    def __init__(self, tx: GradientTransformation, *, inplace: bool = False) -> None:
        tx = as_transformation(tx)
        check_transformation(tx, "FuncOptimizer")
        self.transformation = tx
        self.inplace = inplace
        self.state: OptState | None = None

    @property
    def impl(self) -> GradientTransformation:
        """The transformation, by its name in TorchOpt 0.7.3."""
        return self.transformation

    def __repr__(self) -> str:
        inplace = ", inplace=True" if self.inplace else ""
        return f"{type(self).__name__}({self.transformation!r}{inplace})"

    def init(self, params: TensorTree) -> None:
        """Start over; otherwise the first :meth:`step` makes the state."""
        self.state = self.transformation.init(params)

    def step(
        self,
        loss: torch.Tensor | Callable[[Any], torch.Tensor],
        params: T,
        inplace: bool | None = None,
        **extra: Any,
    ) -> T:
        """Differentiate the loss and return the updated parameters.

        Args:
            loss: A scalar computed from ``params``; or the function of them that computes it, as a
                rule needs that asks for gradients at other parameters (:func:`torchopt.sam`).
            params: Any pytree of tensors that require grad. Those it does not depend on stay.
            inplace: Change ``params`` in place, and record nothing; ``None`` means the attribute
                ``inplace``. Otherwise the result is differentiable; under ``torch.no_grad()`` it
                consists of leaves that require grad.
            **extra: Further values for rules that read them (``hessian`` of ``torchopt.sophia``).

        Raises:
            TypeError, ValueError, RuntimeError: As :meth:`torchopt.MetaOptimizer.step`.
        """
        if extra:
            check_extra(self.transformation, extra, type(self).__name__)
        inplace = self.inplace if inplace is None else inplace
        misuse.check_trees({"params": params})
        leaves, spec = tree.flatten(params)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        create_graph = not inplace and torch.is_grad_enabled()
        value, function = evaluated(loss, params)
        if function is not None:
            extra["grad_fn"] = gradients_of_function(function, params, create_graph)
        found = iter(differentiate(value, tensors, create_graph))
        grads = [
            next(found) if isinstance(leaf, torch.Tensor) and leaf.requires_grad else None
            for leaf in leaves
        ]
        state = self.transformation.init(params) if self.state is None else self.state
        gradient_tree = tree.unflatten(spec, grads)
        new_params, self.state = self.transformation.apply_gradients(
            gradient_tree,
            state,
            params,
            inplace=inplace,
            **{"value": value.detach() if inplace else value, **extra},
        )
        if not inplace:
            step_tags.note_create_graph(tree.flatten(new_params)[0], True)
        if not torch.is_grad_enabled():  # leaves, as of MetaOptimizer: the next loss needs a graph
            new_leaves, new_spec = tree.flatten(new_params)
            for old, new in zip(leaves, new_leaves):
                if new is not old and isinstance(old, torch.Tensor) and old.requires_grad:
                    new.requires_grad_(True)
            new_params = tree.unflatten(new_spec, new_leaves)
        return new_params

    def state_dict(self) -> OptState | None:
        """Return the state by reference; ``None`` before the first step."""
        return None if self.state is None else extract_state_dict(self.state)

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a state that :meth:`state_dict` or ``tx.init`` returned.

        Raises:
            TypeError: If it is no optimizer state.
            ValueError: If it belongs to another transformation.
        """
        if isinstance(self.transformation, Pair):  # whose state is any tree
            self.state = state_dict
            return
        if isinstance(state_dict, (tuple, list)):
            state_dict = as_state(self.transformation, state_dict)
        if state_dict is not None and not isinstance(state_dict, OptState):
            raise TypeError(
                f"load_state_dict expects an OptState, got {type(state_dict).__name__}."
            )
        if state_dict is not None:
            self.transformation.plan.check_slots(state_dict.slots, self.transformation)
        self.state = state_dict
