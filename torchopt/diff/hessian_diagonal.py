"""Estimates of the diagonal of a Hessian from a few more gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.base import misuse, tree
from torchopt.typing import TensorTree


DISTRIBUTIONS = ("normal", "rademacher")


def hutchinson_diagonal(
    loss_fn: Callable[[Any], Tensor],
    params: TensorTree,
    *,
    num_samples: int = 1,
    distribution: str = "rademacher",
    generator: torch.Generator | None = None,
    create_graph: bool = False,
) -> TensorTree:
    r"""Estimate the diagonal of the Hessian of a loss by products with random vectors.

    .. math::
        \hat h = \frac1n \sum_{i=1}^n v_i \odot (\nabla^2 f(p)\, v_i), \qquad
        \operatorname E[v_i v_i^\top] = I
        \quad\Longrightarrow\quad \operatorname E[\hat h] = \operatorname{diag} \nabla^2 f(p)

    A product costs about as much as two gradients. The loss must be twice differentiable by
    backward passes.

    Args:
        loss_fn: From parameters, a tree like ``params``, to a scalar. Of a network:
            ``lambda params: loss(torch.func.functional_call(net, params, x))``.
        params: Any pytree of floating-point tensors.
        num_samples: :math:`n \ge 1`.
        distribution: Of the entries of :math:`v`: ``"rademacher"``, signs as in Optax, or
            ``"normal"`` as in the paper, whose variance is larger by :math:`2 h^2` for each entry.
        generator: What draws them; ``None`` is PyTorch's own.
        create_graph: Whether the result is differentiable in ``params`` and in what ``loss_fn``
            reads besides. Otherwise it is a constant.

    Returns:
        A tree like ``params``.

    Raises:
        TypeError: If a leaf is no floating-point tensor, or the loss no tensor.
        ValueError: If the loss is not scalar, or an argument is out of bounds.

    Example:
        Of a loss without mixed terms signs give the diagonal itself:

        >>> import torch, torchopt
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> torchopt.hutchinson_diagonal(lambda p: (p["w"] ** 3).sum(), params)
        {'w': tensor([ 6., 12.])}

    Reference:
        Hutchinson, 1990; Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix,
        2007, https://doi.org/10.1016/j.apnum.2007.01.003; as algorithm 1 of Liu et al.,
        https://arxiv.org/abs/2305.14342.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution must be one of {list(DISTRIBUTIONS)}, got {distribution!r}."
        )
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise ValueError(f"num_samples must be a whole number >= 1, got {num_samples!r}.")
    leaves, spec = _checked(params, "hutchinson_diagonal")

    def gradient(*leaves: Tensor) -> tuple[Tensor, ...]:
        def loss(*leaves: Tensor) -> Tensor:
            return _scalar(loss_fn(tree.unflatten(spec, list(leaves))))

        return torch.func.grad(loss, tuple(range(len(leaves))))(*leaves)

    with contextlib.nullcontext() if create_graph else torch.no_grad():
        given = leaves if create_graph else [x.detach() for x in leaves]
        product: Any = torch.func.vjp(gradient, *given)[1]
        total = [torch.zeros_like(x) for x in given]
        for _ in range(num_samples):
            v = [_drawn(x, distribution, generator) for x in given]
            total = [a + x * hx for a, x, hx in zip(total, v, product(tuple(v)))]
    return tree.unflatten(spec, [x / num_samples for x in total])


def gauss_newton_bartlett(
    logits_fn: Callable[[Any], Tensor],
    params: TensorTree,
    *,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
) -> TensorTree:
    r"""Estimate the diagonal of the Gauss-Newton matrix of a mean cross-entropy.

    .. math::
        \hat y_b \sim \operatorname{softmax}(z_b(p)), \qquad
        \hat g = \nabla_p \frac1B \sum_{b=1}^B \operatorname{CE}(z_b(p), \hat y_b), \qquad
        \hat h = B\, \hat g \odot \hat g \\
        \operatorname E[\hat h] = \operatorname{diag} \frac1B \sum_b J_b^\top S_b J_b

    with the Jacobian :math:`J_b` of the logits :math:`z_b` and the Hessian :math:`S_b` of the
    cross-entropy by them (Bartlett's second identity). It is never negative, costs one gradient,
    and reads no labels: they are drawn from the model's own predictions.

    Args:
        logits_fn: From parameters, a tree like ``params``, to logits of shape ``(..., classes)``;
            each of the ``...`` is one prediction of the :math:`B`. Leave out what has no loss,
            such as padding.
        params: Any pytree of floating-point tensors.
        generator: What draws the labels; ``None`` is PyTorch's own.
        create_graph: Whether the result is differentiable in ``params`` and in what ``logits_fn``
            reads besides, for the labels that were drawn. Otherwise it is a constant.

    Returns:
        A tree like ``params``.

    Raises:
        TypeError: If a leaf is no floating-point tensor, or the logits no tensor.
        ValueError: If there is no prediction or no class.

    Example:
        >>> import torch, torchopt
        >>> net, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
        >>> params = dict(net.named_parameters())
        >>> estimate = torchopt.gauss_newton_bartlett(
        ...     lambda params: torch.func.functional_call(net, params, x), params
        ... )
        >>> estimate["weight"].shape, bool((estimate["weight"] >= 0).all())
        (torch.Size([3, 4]), True)

    Reference:
        Liu et al., ICLR 2024, algorithm 2, https://arxiv.org/abs/2305.14342.
    """
    leaves, spec = _checked(params, "gauss_newton_bartlett")

    def loss(*leaves: Tensor) -> Tensor:
        logits = logits_fn(tree.unflatten(spec, list(leaves)))
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits_fn must return a tensor, got {misuse.short(logits)}.")
        if logits.dim() < 1 or not logits.numel():
            raise ValueError(
                f"logits_fn must return logits of shape (..., classes), got {tuple(logits.shape)}."
            )
        _refuse_constant(logits, "logits_fn")
        rows = logits.reshape(-1, logits.shape[-1])
        chances = rows.detach().float().softmax(-1)
        labels = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
        # whose gradient, squared, is B times that of the mean
        return torch.nn.functional.cross_entropy(rows, labels) * len(rows) ** 0.5

    with contextlib.nullcontext() if create_graph else torch.no_grad():
        given = leaves if create_graph else [x.detach() for x in leaves]
        wanted = tuple(range(len(given)))
        grads = torch.func.grad(loss, wanted)(*given)
        return tree.unflatten(spec, [g * g for g in grads])


def _checked(params: TensorTree, owner: str) -> tuple[list[Tensor], Any]:
    leaves, spec = tree.flatten(params)
    for name, x in zip(tree.leaf_names(params), leaves):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = f"dtype {x.dtype}" if isinstance(x, Tensor) else misuse.short(x)
            raise TypeError(
                f"{owner} expects floating-point tensors, got {given} as {tree.quoted(name)}."
                f"{misuse.advice_for_leaf(x)}"
            )
    if not leaves:
        raise ValueError(f"{owner} got no parameters.")
    return leaves, spec


def _refuse_constant(result: Tensor, owner: str) -> None:
    """Refuse a result that is not computed with the parameters that the function was given."""
    if not result.requires_grad:  # at the level of torch.func that this is
        raise ValueError(
            f"What {owner} returned does not depend on the parameters that it was given. Of a "
            "network write torch.func.functional_call(net, params, x) instead of net(x)."
        )


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(misuse.not_a_loss(loss))
    _refuse_constant(loss, "loss_fn")
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn must return a scalar, got shape {tuple(loss.shape)}; take its mean()."
        )
    return loss.reshape(())


def _drawn(like: Tensor, distribution: str, generator: torch.Generator | None) -> Tensor:
    options: Any = {"dtype": like.dtype, "device": like.device, "generator": generator}
    if distribution == "normal":
        return torch.randn(like.shape, **options)
    return torch.randint(0, 2, like.shape, **options) * 2 - 1
