"""One loop: a step, the structure of its carry, and what a step may return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.misuse.given import given
from torchopt.base.torch_internals import peek_interpreter_stack
from torchopt.base.values import describe
from torchopt.typing import PyTree


Step = Callable[[Any, Any], Any]


class Loop:
    """A step that is taken ``length`` times, from one carry to the next.

    Between steps a carry is the list of its leaves. Structure, shapes, dtypes and devices of the
    carry stay what they were at the start, and those of ``y`` what they were after the first step.
    """

    def __init__(
        self,
        step: Step,
        carry: PyTree,
        xs: PyTree,
        length: int | None,
        like: tuple[Any, list[Any]] | None = None,
    ) -> None:
        if not callable(step):
            raise TypeError(
                f"step must be a function step(carry, x) -> (carry, y), got {given(step)}."
            )
        self.step = step
        self.start, self.spec = tree.flatten(carry)
        if like is not None and like[0] == self.spec:  # many loops share what they have in common
            self.spec, self.paths = like
        else:
            self.paths = tree.leaf_paths(carry)
        self.xs, self.xs_spec = tree.flatten(xs)
        self.kinds = [_kind(leaf) for leaf in self.start]
        self.length = _length(self.xs, tree.leaf_names(xs), length)
        #: Leaves of the carry by which there is a derivative only if there is one at the start:
        #: those that the step hands on as they are, and all of a single step.
        self.unchanged: frozenset[int] = frozenset()
        self.end = self.spec  # the structure of the last carry
        self.y_spec: Any = None
        self.y_names: list[str] = []
        self.y_likes: list[Any] = []

    def x(self, xs: Sequence[Any], index: int) -> PyTree:
        """Return what the step is given at one index of these leaves."""
        return tree.unflatten(self.xs_spec, [None if x is None else x[index] for x in xs])

    def take(self, leaves: Sequence[Any], x: PyTree) -> tuple[list[Any], list[Any]]:
        """Take one step; return the leaves of the carry and those of ``y``.

        Raises:
            TypeError: If the step returns no pair, or a leaf of another kind.
            ValueError: If it returns a carry of another structure, or a leaf of another shape,
                dtype or device, or ``y`` of another structure than before.
        """
        return self.results(self.step(tree.unflatten(self.spec, leaves), x))

    def results(self, result: Any) -> tuple[list[Any], list[Any]]:
        """Return the leaves of what a step has returned, as :meth:`take` does."""
        _, new, spec, y = self._checked(result)
        if spec == self.spec:
            return new, y
        difference = _other_node(spec, self.spec)
        if difference is not None:
            raise ValueError(
                f"step must keep the structure of the carry, and what its {difference.__name__} "
                "holds beside its leaves; a step that is taken again starts from the first."
            )
        return new, y

    def step_from(self, carry: PyTree, x: PyTree) -> tuple[PyTree, list[Any]]:
        """Take one step; return the carry as the step returned it, and the leaves of ``y``."""
        carry, _, _, y = self._checked(self.step(carry, x))
        return carry, y

    def _checked(self, result: Any) -> tuple[PyTree, list[Any], Any, list[Any]]:
        """Return the carry, its leaves in the order of the start, their structure, and ``y``."""
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "step must return the pair (carry, y); return (carry, None) where there is no y. "
                f"Got {given(result)}."
            )
        carry, y = result
        leaves, spec = tree.flatten(carry)
        if spec != self.spec:
            leaves = self._in_order(carry, leaves)
        if [_kind(leaf) for leaf in leaves] != self.kinds:
            for path, old, new in zip(self.paths, self.start, leaves):
                if _kind(old) != _kind(new):
                    _refuse_leaf(called(tree.dotted(path), "the carry"), old, new)
        return carry, leaves, spec, self._y_leaves(y)

    def _in_order(self, carry: PyTree, leaves: list[Any]) -> list[Any]:
        paths = tree.leaf_paths(carry)
        if paths == self.paths:
            return leaves
        by_path = dict(zip(paths, leaves))
        if len(paths) != len(self.paths) or by_path.keys() != set(self.paths):
            difference = tree.first_difference(paths, self.paths)
            raise ValueError(
                f"step must return a carry of the structure that it was given: {difference}. "
                "Return what it was given, with new values."
            )
        return [by_path[path] for path in self.paths]

    def _y_leaves(self, y: PyTree) -> list[Any]:
        leaves, spec = tree.flatten(y)
        if self.y_spec is None:
            for name, leaf in zip(tree.leaf_names(y), leaves):
                if leaf is not None and not isinstance(leaf, (Tensor, bool, int, float, complex)):
                    raise TypeError(
                        f"What step returns as {called(name, 'y')} is stacked, so it must be a "
                        f"tensor, a number or None; got {given(leaf)}."
                    )
            self.y_spec, self.y_likes, self.y_names = spec, _likes(leaves), tree.leaf_names(y)
            return leaves
        if spec != self.y_spec and tree.leaf_names(y) != self.y_names:
            raise ValueError(
                "step must return y of the same structure at every step: "
                f"{tree.first_difference(tree.leaf_names(y), self.y_names)}."
            )
        for name, like, leaf in zip(self.y_names, self.y_likes, leaves):
            if _kind(like) != _kind(leaf):
                _refuse_leaf(called(name, "y"), like, leaf)
        return leaves

    def stacked(self, rows: Sequence[Sequence[Any]]) -> list[Any]:
        """Return each leaf of ``y`` for all steps: tensors with one more dimension, or ``None``."""
        return [_stack(column) for column in zip(*rows)]

    def result(self, leaves: Sequence[Any], ys: Sequence[Any]) -> tuple[PyTree, PyTree]:
        """Return what the loop returns."""
        return tree.unflatten(self.end, list(leaves)), tree.unflatten(self.y_spec, list(ys))

    def plain(
        self,
        before: Callable[[int, PyTree], PyTree] = lambda t, carry: carry,
        after: Callable[[int, list[Any]], list[Any]] = lambda t, y: y,
    ) -> tuple[list[Any], list[Any]]:
        """Run all steps as they are; whatever is recording records them.

        ``before`` may exchange the carry before each step, and ``after`` its ``y``.
        """
        carry, rows = tree.unflatten(self.spec, self.start), []
        for t in range(self.length):
            flat, spec = tree.flatten(before(t, carry))
            carry, y = self.step_from(tree.unflatten(spec, apart(flat)), self.x(self.xs, t))
            rows.append(after(t, y))
        leaves, self.end = tree.flatten(carry)
        return leaves, self.stacked(rows)


def apart(leaves: list[Any]) -> list[Any]:
    """Return leaves of which none has been computed from another, as far as autograd can tell.

    A step is a function of its carry. Where it calls ``torch.autograd.grad`` by one leaf, others
    are constants, though the step before may have computed them from that one.
    """
    if not torch.is_grad_enabled():
        return leaves
    # torch 2.6 does not compile the second question
    if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
        return leaves
    recorded = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    if len(recorded) > 1:
        for i in recorded:
            leaves[i] = leaves[i].view_as(leaves[i])
    return leaves


def called(name: str, of: str) -> str:
    """Return how errors call a leaf."""
    return f"leaf {name!r} of {of}" if name else of


def _length(xs: list[Any], names: list[str], length: int | None) -> int:
    """Return how many steps there are.

    Raises:
        TypeError: If a leaf of ``xs`` is no tensor, or ``length`` no integer.
        ValueError: If lengths are missing, differ or are zero.
    """
    if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
        raise TypeError(f"length must be an integer, got {given(length)}.")
    lengths = {} if length is None else {"length": length}
    for name, x in zip(names, xs):
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.ndim == 0:
            what = "a 0-d tensor" if isinstance(x, Tensor) else given(x)
            raise TypeError(
                f"What is given as {called(name, 'xs')} must be a tensor whose first dimension "
                f"counts the steps, got {what}. What is the same in all steps the step can close "
                "over."
            )
        lengths[called(name, "xs")] = x.shape[0]
    if not lengths:
        raise ValueError("How many steps? Pass xs, or length=n where the steps take no input.")
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name}: {n}" for name, n in lengths.items())
        raise ValueError(f"xs and length must all give one number of steps, got {shown}.")
    number = next(iter(lengths.values()))
    if number < 1:
        raise ValueError(f"unroll takes at least one step, got {number}.")
    return number


def _other_node(spec: Any, other: Any) -> type | None:
    """Return the class of the first node of two trees with the same paths that differs.

    Plain containers may stand for each other, as the tuple that ``autograd.grad`` returns for a
    list; what another node holds beside its leaves has to be the same.
    """
    if spec == other:
        return None
    if not _is_container(spec.type) or not _is_container(other.type):
        return other.type or spec.type
    found = (_other_node(a, b) for a, b in zip(spec.children(), other.children()))
    return next((node for node in found if node is not None), None)


def _is_container(kind: type | None) -> bool:
    return kind is not None and issubclass(kind, (tuple, list, dict))


def _likes(leaves: Sequence[Any]) -> list[Any]:
    """Return examples to compare leaves with, that hold no graph and no memory of their own."""
    return [
        torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape)
        if isinstance(x, Tensor)
        else x
        for x in leaves
    ]


def _kind(leaf: Any) -> Any:
    """Return what a leaf must keep from step to step."""
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf)


def _refuse_leaf(what: str, old: Any, new: Any) -> None:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        where = f" on {old.device}", f" on {new.device}"
        place = where if old.device != new.device else ("", "")
        raise ValueError(
            f"step must keep shape, dtype and device of {what}: it was {describe(old)}{place[0]} "
            f"and is {describe(new)}{place[1]}."
        )
    cure = ""
    if isinstance(new, Tensor) and isinstance(old, (int, float)):
        cure = f" Start from torch.tensor({old})."
    raise TypeError(
        f"step must keep the kind of {what}: it was {given(old)} and is {given(new)}.{cure}"
    )


def _stack(column: Sequence[Any]) -> Any:
    if column[0] is None:
        return None
    if isinstance(column[0], Tensor):
        return torch.stack(list(column))
    return torch.tensor(column)
