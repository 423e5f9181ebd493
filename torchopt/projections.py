"""Euclidean projections: the nearest point of a set, for any tree of tensors.

The balls, spheres and the simplex take a tree as one vector. Each is differentiable in the tree and
in the numbers that describe the set; at a corner, where there is no derivative, it is the one of
a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.base import misuse
from torchopt.base import tree as trees
from torchopt.base.numerics import root, to_compute_dtype
from torchopt.typing import TensorTree


Scale = Union[float, Tensor]

__all__ = [
    "projection_box",
    "projection_halfspace",
    "projection_hypercube",
    "projection_hyperplane",
    "projection_l1_ball",
    "projection_l1_sphere",
    "projection_l2_ball",
    "projection_l2_sphere",
    "projection_linf_ball",
    "projection_non_negative",
    "projection_simplex",
]


def __dir__() -> list[str]:
    return list(__all__)


def projection_non_negative(tree: TensorTree) -> TensorTree:
    r"""Return the nearest tree without negative entries: :math:`\max(x, 0)`.

    The derivative is 1 inside and 0 from zero down.

    Example:
        >>> import torch
        >>> from torchopt.projections import projection_non_negative
        >>> projection_non_negative({"w": torch.tensor([-1.0, 2.0])})
        {'w': tensor([0., 2.])}
    """
    return _each("projection_non_negative", tree, torch.relu)


def projection_box(tree: TensorTree, lower: Any, upper: Any) -> TensorTree:
    r"""Return the nearest tree between bounds: :math:`\min(\max(x, l), u)`.

    The derivative is 1 inside and at a bound, 0 outside, and there 1 in the bound.

    Args:
        tree: Any tree of tensors.
        lower: :math:`l`; a number, a tensor, or a tree of tensors like ``tree``.
        upper: :math:`u \ge l`, likewise.

    Raises:
        ValueError: If both are numbers, the lower one above the upper one.

    Example:
        >>> import torch
        >>> from torchopt.projections import projection_box
        >>> projection_box([torch.tensor([-1.0, 0.25, 2.0])], 0.0, 1.0)
        [tensor([0.0000, 0.2500, 1.0000])]
    """
    if isinstance(lower, (int, float)) and isinstance(upper, (int, float)) and not lower <= upper:
        raise ValueError(f"lower must be <= upper, got {lower!r} > {upper!r}.")
    leaves, spec = _leaves("projection_box", tree)
    lows, highs = _bounds("lower", lower, tree, spec), _bounds("upper", upper, tree, spec)
    clamped = [_clamped(x, low, high) for x, low, high in zip(leaves, lows, highs)]
    return _unflatten(spec, clamped)


def projection_hypercube(tree: TensorTree, scale: Scale = 1.0) -> TensorTree:
    r"""Return the nearest tree with entries from 0 to :math:`c`.

    Args:
        tree: Any tree of tensors.
        scale: :math:`c > 0`.

    Raises:
        ValueError: If ``scale`` is a number <= 0.

    Example:
        >>> import torch
        >>> from torchopt.projections import projection_hypercube
        >>> projection_hypercube(torch.tensor([-1.0, 0.25, 2.0]))
        tensor([0.0000, 0.2500, 1.0000])
    """
    return projection_box(tree, 0.0, _checked(scale))


def projection_linf_ball(tree: TensorTree, scale: Scale = 1.0) -> TensorTree:
    r"""Return the nearest tree with entries from :math:`-c` to :math:`c`.

    Args:
        tree: Any tree of tensors.
        scale: :math:`c > 0`.

    Raises:
        ValueError: If ``scale`` is a number <= 0.

    Example:
        >>> import torch
        >>> from torchopt.projections import projection_linf_ball
        >>> projection_linf_ball(torch.tensor([-3.0, 0.25, 2.0]))
        tensor([-1.0000,  0.2500,  1.0000])
    """
    scale = _checked(scale)
    return projection_box(tree, -scale, scale)


def projection_simplex(tree: TensorTree, scale: Scale = 1.0) -> TensorTree:
    r"""Return the nearest tree without negative entries whose entries add up to :math:`c`.

    With the entries that stay positive, :math:`S`, it is

    .. math::
        y_i = \max\!\Big(x_i - \tfrac{1}{|S|} \Big(\sum_{j \in S} x_j - c\Big), 0\Big)

    (Held, Wolfe and Crowder, 1974), and the derivative is that of this expression for a fixed
    :math:`S`.

    Args:
        tree: Any tree of tensors, taken as one vector.
        scale: :math:`c > 0`.

    Raises:
        ValueError: If ``scale`` is a number <= 0.

    Example:
        >>> import torch
        >>> from torchopt.projections import projection_simplex
        >>> projection_simplex(torch.tensor([0.5, 0.25, -2.0]))
        tensor([0.6250, 0.3750, 0.0000])
    """
    scale = _checked(scale)
    return _as_vector("projection_simplex", tree, lambda x: _simplex(x, scale))


def projection_l1_sphere(tree: TensorTree, scale: Scale = 1.0) -> TensorTree:
    r"""Return the nearest tree whose absolute values add up to :math:`c`, signs kept.

    Args:
        tree: Any tree of tensors, taken as one vector. A zero has no sign, and stays.
        scale: :math:`c > 0`.

    Raises:
        ValueError: If ``scale`` is a number <= 0.

    Example:
        >>> import torch
        >>> from torchopt.projections import projection_l1_sphere
        >>> projection_l1_sphere(torch.tensor([-3.0, 2.5]))
        tensor([-0.7500,  0.2500])
    """
    scale = _checked(scale)
    return _as_vector("projection_l1_sphere", tree, lambda x: _l1_sphere(x, scale))


def projection_l1_ball(tree: TensorTree, scale: Scale = 1.0) -> TensorTree:
    r"""Return the nearest tree whose absolute values add up to :math:`c` at most.

    Args:
        tree: Any tree of tensors, taken as one vector.
        scale: :math:`c > 0`.

    Raises:
        ValueError: If ``scale`` is a number <= 0.

    Example:
        >>> import torch
        >>> from torchopt.projections import projection_l1_ball
        >>> projection_l1_ball(torch.tensor([-3.0, 2.5]))
        tensor([-0.7500,  0.2500])
        >>> projection_l1_ball(torch.tensor([-0.5, 0.25]))
        tensor([-0.5000,  0.2500])
    """
    scale = _checked(scale)
    return _as_vector(
        "projection_l1_ball",
        tree,
        lambda x: torch.where(x.abs().sum() <= scale, x, _l1_sphere(x, scale)),
    )


def projection_l2_sphere(tree: TensorTree, scale: Scale = 1.0) -> TensorTree:
    r"""Return the nearest tree of norm :math:`c`: :math:`c\, x / \lVert x \rVert`.

    Args:
        tree: Any tree of tensors, taken as one vector. Zero has no direction, and stays.
        scale: :math:`c > 0`.

    Raises:
        ValueError: If ``scale`` is a number <= 0.

    Example:
        >>> import torch
        >>> from torchopt.projections import projection_l2_sphere
        >>> projection_l2_sphere([torch.tensor([3.0]), torch.tensor([4.0])])
        [tensor([0.6000]), tensor([0.8000])]
    """
    scale = _checked(scale)
    return _as_vector("projection_l2_sphere", tree, lambda x: x * (scale / _norm_or_one(x)))


def projection_l2_ball(tree: TensorTree, scale: Scale = 1.0) -> TensorTree:
    r"""Return the nearest tree of norm :math:`c` at most.

    The derivative inside and on the sphere is that of :math:`x`, outside that of
    :math:`c\, x / \lVert x \rVert`.

    Args:
        tree: Any tree of tensors, taken as one vector.
        scale: :math:`c > 0`.

    Raises:
        ValueError: If ``scale`` is a number <= 0.

    Example:
        >>> import torch
        >>> from torchopt.projections import projection_l2_ball
        >>> projection_l2_ball([torch.tensor([3.0]), torch.tensor([4.0])], scale=2.5)
        [tensor([1.5000]), tensor([2.])]
    """
    scale = _checked(scale)

    def project(x: Tensor) -> Tensor:
        norm = _norm_or_one(x)
        return torch.where(root(x.square().sum()) <= scale, x, x * (scale / norm))

    return _as_vector("projection_l2_ball", tree, project)


def projection_hyperplane(tree: TensorTree, a: TensorTree, b: Scale) -> TensorTree:
    r"""Return the nearest tree with :math:`a \cdot x = b`.

    Args:
        tree: Any tree of tensors, taken as one vector.
        a: A tree of tensors like it, not zero.
        b: The value.

    Example:
        >>> import torch
        >>> from torchopt.projections import projection_hyperplane
        >>> projection_hyperplane(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), 2.0)
        tensor([2., 0.])
    """
    normal = _vector_like("projection_hyperplane", tree, a)
    return _as_vector("projection_hyperplane", tree, lambda x: x - _over(x, normal, b) * normal)


def projection_halfspace(tree: TensorTree, a: TensorTree, b: Scale) -> TensorTree:
    r"""Return the nearest tree with :math:`a \cdot x \le b`.

    Args:
        tree: Any tree of tensors, taken as one vector.
        a: A tree of tensors like it, not zero.
        b: The bound.

    Example:
        >>> import torch
        >>> from torchopt.projections import projection_halfspace
        >>> projection_halfspace(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), 9.0)
        tensor([3., 1.])
    """
    normal = _vector_like("projection_halfspace", tree, a)
    return _as_vector(
        "projection_halfspace", tree, lambda x: x - torch.relu(_over(x, normal, b)) * normal
    )


# Vectors ------------------------------------------------------------------------------------------


def _simplex(x: Tensor, scale: Scale) -> Tensor:
    if x.numel() == 0:
        return x
    values = x.detach().sort(descending=True).values
    sums, ranks = values.cumsum(0), torch.arange(1, x.numel() + 1, device=x.device)
    c = scale.detach() if isinstance(scale, Tensor) else scale
    number = (c / ranks + (values - sums / ranks) > 0).sum().clamp(min=1)
    least = values.gather(0, number.reshape(1) - 1)
    stays = (x.detach() >= least).to(x.dtype)
    number = stays.sum()
    return torch.relu(x - (x * stays).sum() / number + scale / number)


def _l1_sphere(x: Tensor, scale: Scale) -> Tensor:
    return x.sign() * _simplex(x.abs(), scale)


def _norm_or_one(x: Tensor) -> Tensor:
    norm = root(x.square().sum())
    return torch.where(norm == 0, 1.0, norm)


def _over(x: Tensor, normal: Tensor, b: Scale) -> Tensor:
    return ((x * normal).sum() - b) / normal.square().sum()


def _checked(scale: Scale) -> Scale:
    misuse.check_values(scale=scale)
    if not isinstance(scale, Tensor) and not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale!r}.")
    return scale


# Trees --------------------------------------------------------------------------------------------


def _leaves(owner: str, given: TensorTree) -> tuple[list[Any], Any]:
    leaves, spec = trees.flatten(given)
    for leaf in leaves:
        if leaf is not None and (not isinstance(leaf, Tensor) or leaf.is_complex()):
            what = f"dtype {leaf.dtype}" if isinstance(leaf, Tensor) else misuse.short(leaf)
            raise TypeError(f"{owner} expects real tensors, got {what}.")
    return leaves, spec


def _unflatten(spec: Any, leaves: list[Any]) -> Any:
    return trees.unflatten(spec, leaves)


def _each(owner: str, given: TensorTree, function: Any) -> Any:
    leaves, spec = _leaves(owner, given)
    return _unflatten(spec, [None if x is None else function(x) for x in leaves])


def _as_vector(owner: str, given: TensorTree, function: Any) -> Any:
    """Apply a function to all entries of a tree as one vector."""
    leaves, spec = _leaves(owner, given)
    there = [x for x in leaves if x is not None]
    if not there:
        return given
    flat = torch.cat([to_compute_dtype(x).reshape(-1) for x in there])
    parts = iter(function(flat).split([x.numel() for x in there]))
    found = [None if x is None else next(parts).reshape(x.shape).to(x.dtype) for x in leaves]
    return _unflatten(spec, found)


def _vector_like(owner: str, given: TensorTree, other: TensorTree) -> Tensor:
    _, spec = _leaves(owner, given)
    leaves = trees.flatten_like(other, given, spec, "a", "the tree")
    return torch.cat([to_compute_dtype(x).reshape(-1) for x in leaves if x is not None])


def _bounds(name: str, bound: Any, given: TensorTree, spec: Any) -> Sequence[Any]:
    if isinstance(bound, (int, float, Tensor)):
        return [bound] * spec.num_leaves
    return trees.flatten_like(bound, given, spec, name, "the tree")


def _clamped(x: Any, low: Any, high: Any) -> Any:
    if x is None:
        return None
    for bound, least in ((low, True), (high, False)):
        beyond = x < bound if least else x > bound
        x = torch.where(beyond, bound, x).to(x.dtype)
    return x
