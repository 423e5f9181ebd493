"""Clipping of the gradients of single examples, for differential privacy."""

from __future__ import annotations

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.base.numerics import root, to_compute_dtype
from torchopt.core.hyper import HyperSpec, check_number
from torchopt.typing import TensorTree


def per_example_global_norm_clip(
    grads: TensorTree, l2_norm_clip: float | Tensor
) -> tuple[TensorTree, Tensor]:
    r"""Clip the gradient of each example by its norm, and sum the results.

    .. math::
        g = \sum_i g_i \min\!\left(1, \frac{C}{\lVert g_i \rVert}\right)

    where the norm is that of all tensors of an example taken as one vector. So no example moves the
    sum by more than :math:`C`, which is what differentially private SGD adds its noise to. It is a
    function and no transformation: what goes in has the examples in a first dimension, as
    ``torch.func.vmap`` of ``torch.func.grad`` gives it, and what comes out has not.

    Args:
        grads: A tree of tensors with one entry for each example in their first dimension; ``None``
            stays.
        l2_norm_clip: :math:`C \ge 0`, a number or a tensor with one.

    Returns:
        The sum of the clipped gradients, and how many have been clipped.

    Differentiable in gradients and :math:`C`; at a gradient that is zero the derivative of the norm
    is zero.

    Raises:
        TypeError: If a leaf is no floating tensor.
        ValueError: If there are none, or not the same number of examples in all; if :math:`C` is
            negative.

    Example:
        Differentially private SGD, of Abadi et al.:

        >>> import torch, torchopt
        >>> x, y = torch.randn(8, 3), torch.randn(8)
        >>> params = {"w": torch.zeros(3), "b": torch.zeros(())}
        >>> def loss(params, x, y):
        ...     return (x @ params["w"] + params["b"] - y).square()
        >>> of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        >>> tx, clip, noise = torchopt.sgd(lr=0.1), 1.0, 1.1
        >>> state = tx.init(params)
        >>> total, clipped = torchopt.per_example_global_norm_clip(of_each(params, x, y), clip)
        >>> grads = {n: (g + clip * noise * torch.randn_like(g)) / 8 for n, g in total.items()}
        >>> updates, state = tx.update(grads, state, params)

        The rows of a matrix as the gradients of three examples:

        >>> rows = [torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.3, 0.4]])]
        >>> torchopt.per_example_global_norm_clip(rows, 1.0)
        ([tensor([0.9000, 1.2000])], tensor(1))

    Reference:
        Abadi et al., Deep learning with differential privacy, CCS 2016,
        https://arxiv.org/abs/1607.00133.
    """
    if not isinstance(l2_norm_clip, Tensor):
        check_number("l2_norm_clip", l2_norm_clip, HyperSpec(ge=0))
    elif l2_norm_clip.numel() != 1:
        raise ValueError(
            f"l2_norm_clip must be one number, got {misuse.short(l2_norm_clip)}: the norm is that "
            "of all tensors together."
        )
    leaves, spec = tree.flatten(grads)
    present = _checked(leaves, tree.leaf_names(grads))
    wide = [to_compute_dtype(x) for x in present]
    real = [torch.view_as_real(x) if x.is_complex() else x for x in wide]
    squares = [x.reshape(len(x), -1).square().sum(1) for x in real]
    norms = root(torch.stack([s.to(squares[0]) for s in squares]).sum(0))
    if isinstance(l2_norm_clip, Tensor):
        l2_norm_clip = l2_norm_clip.reshape(()).to(norms)
    above = norms > l2_norm_clip
    # where nothing is clipped, no quotient by zero must be differentiated
    factors = torch.where(above, l2_norm_clip / torch.where(above, norms, 1.0), 1.0)
    sums = iter(
        torch.tensordot(factors.to(w), w, dims=1).to(x.dtype) for x, w in zip(present, wide)
    )
    return tree.unflatten(spec, [x if x is None else next(sums) for x in leaves]), above.sum()


def _checked(leaves: list[Tensor | None], names: list[str]) -> list[Tensor]:
    """Return the tensors among the leaves."""
    examples: int | None = None
    for name, leaf in zip(names, leaves):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"per_example_global_norm_clip expects floating tensors, got "
                f"{misuse.short(leaf)} for {tree.quoted(name)}."
            )
        if leaf.dim() == 0 or len(leaf) != (len(leaf) if examples is None else examples):
            raise ValueError(
                "per_example_global_norm_clip expects gradients with the examples in their first "
                f"dimension, as many in each, got shape {tuple(leaf.shape)} for "
                f"{tree.quoted(name)}"
                + (f" and {examples} examples before it." if examples is not None else ".")
            )
        examples = len(leaf)
    if examples is None:
        raise ValueError("per_example_global_norm_clip got no gradients.")
    return [leaf for leaf in leaves if leaf is not None]
