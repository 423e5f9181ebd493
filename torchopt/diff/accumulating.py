"""Gradients of a large batch, micro-batch by micro-batch, to be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchopt.base import tree
from torchopt.base.misuse.given import given
from torchopt.base.values import describe
from torchopt.diff.replay import schedules
from torchopt.diff.replay.loop import Loop, called
from torchopt.diff.replay.run import replayed
from torchopt.diff.replay.sums import SumStore
from torchopt.typing import PyTree


Size = Callable[[PyTree], Any]


def accumulate(
    grad_fn: Callable[..., PyTree], *, micro_batches: int, size: Size | None = None
) -> Callable[..., PyTree]:
    r"""Let a gradient be computed in micro-batches, whose derivative takes the memory of one.

    With the batch divided into parts of :math:`n_i` examples, :math:`n` in all, the gradient is

    .. math:: g(\theta) = \sum_i \frac{n_i}{n}\, g_i(\theta)

    and its derivative along a cotangent :math:`v` the sum of those of the parts: each is computed
    from a graph of its own (a double backward pass), which is freed before the next one is made.
    In a training run that is differentiated the derivative of the *update* comes first, as for any
    optimizer, and its result for the gradient is the :math:`v` of all micro-batches.

    Everything that ``grad_fn`` is given or closes over is differentiated, at every order. Random
    numbers (dropout) are drawn for each micro-batch, and drawn again where it is computed again.
    A loss that is no mean over examples (contrastive ones), and BatchNorm in training mode, are
    other functions in micro-batches than in the whole.

    Args:
        grad_fn: A function ``grad_fn(params, batch, *others)`` that returns the gradient of a mean
            over ``batch``, a pytree of tensors whose first dimension counts examples; for example
            ``torch.func.grad(loss)``. Whatever tree of tensors it returns is averaged, so that
            ``torch.func.grad_and_value(loss)`` gives the loss too.
        micro_batches: Into how many parts the batch is divided, as evenly as it can be; a batch of
            fewer examples into single ones.
        size: What a part weighs: a function of its batch that returns a number that adds up, such
            as how many tokens a mean over tokens counts. By default the number of examples.

    Returns:
        A function with the arguments and results of ``grad_fn``.

    Raises:
        TypeError: If ``grad_fn`` is no function, ``micro_batches`` no whole number, or a leaf of
            the batch or of the gradient no tensor.
        ValueError: If ``micro_batches`` is below 1, or leaves of the batch differ in length.

    Example:
        >>> import torch
        >>> from torchopt.diff import accumulate
        >>> def loss(params, batch):
        ...     x, y = batch
        ...     return (x @ params["w"] - y).square().mean()
        >>> params = {"w": torch.zeros(3)}
        >>> batch = torch.randn(10, 3), torch.randn(10)
        >>> grads = accumulate(torch.func.grad(loss), micro_batches=4)(params, batch)
        >>> torch.allclose(grads["w"], torch.func.grad(loss)(params, batch)["w"])
        True

    Reference:
        Bergson's two-stage derivative of micro-batches; Engstrom et al., Optimizing ML training
        with metagradient descent, arXiv 2503.13751.
    """
    if not callable(grad_fn):
        raise TypeError(
            f"accumulate expects a function grad_fn(params, batch, *others), got {given(grad_fn)}."
        )
    if not isinstance(micro_batches, int) or isinstance(micro_batches, bool):
        raise TypeError(f"micro_batches must be a whole number, got {given(micro_batches)}.")
    if micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1, got {micro_batches}.")
    return _Accumulated(grad_fn, micro_batches, size)


@dataclass(eq=False)
class _Accumulated:
    """What :func:`accumulate` returns."""

    grad_fn: Callable[..., PyTree]
    micro_batches: int
    size: Size | None
    _zeros: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, params: PyTree, batch: PyTree, *others: Any) -> PyTree:
        """Return the gradient."""
        total = _length(batch)
        parts = min(self.micro_batches, total)
        if parts == 1:
            return self.grad_fn(params, batch, *others)
        least, more = divmod(total, parts)
        lengths = [least + (i < more) for i in range(parts)]
        starts = [sum(lengths[:i]) for i in range(parts)]

        def part(batch: PyTree, index: int) -> PyTree:
            return tree.tree_map(lambda x: x.narrow(0, starts[index], lengths[index]), batch)

        sizes = lengths if self.size is None else [self._size(part(batch, i)) for i in range(parts)]
        whole = sum(sizes)

        def step(carry: Any, _: None) -> Any:
            index, sums, arguments = carry
            params, batch, *others = arguments
            grads = self.grad_fn(params, part(batch, index), *others)
            leaves, _ = tree.flatten(grads)
            share = sizes[index] / whole
            sums = [old + share * new for old, new in zip(sums, leaves)]
            return (index + 1, sums, arguments), None

        sums, spec = self._start(params, part(batch, 0), others)
        loop = Loop(step, (0, sums, (params, batch, *others)), None, parts)
        loop.unchanged = frozenset(range(1 + len(sums), len(loop.start)))
        name = f"accumulate(..., micro_batches={self.micro_batches})"
        every_step = lambda length: schedules.Segments(length, 1)  # noqa: E731
        leaves, ys = replayed(loop, name, every_step, SumStore, check=False)
        (_, sums, _), _ = loop.result(leaves, ys)
        return tree.unflatten(spec, sums)

    def _size(self, batch: PyTree) -> Any:
        assert self.size is not None
        found = self.size(batch)
        return found.detach() if isinstance(found, Tensor) else found

    def _start(self, params: PyTree, batch: PyTree, others: tuple[Any, ...]) -> Any:
        """Return zeros like the gradient; the first micro-batch tells once what it is like."""
        key = tuple(
            (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x)
            for x in tree.flatten((params, others))[0]
        )
        if key not in self._zeros:
            with torch.random.fork_rng(_cuda(batch)):
                leaves, spec = tree.flatten(self.grad_fn(params, batch, *others))
            for name, leaf in zip(tree.leaf_names(tree.unflatten(spec, leaves)), leaves):
                if not isinstance(leaf, Tensor):
                    raise TypeError(
                        f"accumulate adds up what grad_fn returns, and {called(name, 'that')} is "
                        f"{given(leaf)} instead of a tensor."
                    )
            if len(self._zeros) > 8:
                self._zeros.clear()
            self._zeros[key] = [(x.shape, x.dtype, x.device) for x in leaves], spec
        likes, spec = self._zeros[key]
        return [torch.zeros(shape, dtype=d, device=at) for shape, d, at in likes], spec


def _cuda(batch: PyTree) -> list[int]:
    leaves = tree.flatten(batch)[0]
    return sorted({x.device.index or 0 for x in leaves if x.device.type == "cuda"})


def _length(batch: PyTree) -> int:
    leaves, names = tree.flatten(batch)[0], tree.leaf_names(batch)
    for name, leaf in zip(names, leaves):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            what = "a 0-d tensor" if isinstance(leaf, Tensor) else given(leaf)
            raise TypeError(
                f"accumulate divides {called(name, 'the batch')}, so it must be a tensor whose "
                f"first dimension counts examples, got {what}. What all examples share is given "
                "after the batch: grad_fn(params, batch, *others)."
            )
    lengths = {leaf.shape[0] for leaf in leaves}
    if len(lengths) != 1 or 0 in lengths:
        shown = ", ".join(f"{n!r}: {describe(x)}" for n, x in zip(names, leaves))
        raise ValueError(f"All leaves of the batch must have the same number of examples: {shown}.")
    return lengths.pop()
