"""Gradients that a differentiable step is given instead of a loss, in the order of its entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

from torch import Tensor
from typing_extensions import TypeAlias

from torchopt.base import misuse, tree
from torchopt.core.resolving import Known
from torchopt.diff.gradient import differentiate


#: Gradients of networks: in the order of their parameters, or by name.
Gradients: TypeAlias = Union[Sequence[Union[Tensor, None]], Mapping[str, Union[Tensor, None]]]


def check_source(loss: Any, grads: Any, value: Any, retain_graph: bool | None) -> None:
    """Refuse a step that is given both a loss and gradients, or neither.

    Raises:
        TypeError: With what to type.
    """
    if grads is None:
        if loss is None:
            raise TypeError(
                f"{misuse.not_a_loss(None)} From gradients of your own: step(grads=...)."
            )
        if value is not None:
            raise TypeError("step takes value= beside grads= only; a loss is its own value.")
        return
    if loss is not None:
        raise TypeError(
            "step takes the loss or its gradients, got both. For a transformation that reads the "
            "value of the loss write step(grads=..., value=loss)."
        )
    if retain_graph is not None:
        raise TypeError(
            "retain_graph is for the loss that step differentiates; step(grads=...) differentiates "
            "nothing. Give it to torch.autograd.grad."
        )


def gradients(
    loss: Any,
    grads: Any,
    value: Any,
    params: Sequence[Tensor],
    names: Callable[[], Sequence[str]],
    known: Callable[[], Known],
    create_graph: bool,
    retain_graph: bool | None,
) -> tuple[Any, list[Tensor | None]]:
    """Return the value of the loss and a gradient of each parameter, given or taken of the loss.

    Raises:
        TypeError, ValueError: As ``MetaOptimizer.step``.
    """
    if loss is None or grads is not None or value is not None:
        check_source(loss, grads, value, retain_graph)
        found = in_order(grads, names(), known, create_graph)
    elif isinstance(loss, (Mapping, list, tuple)):
        raise TypeError(f"{misuse.not_a_loss(loss)} From gradients of your own: step(grads=...).")
    else:
        value, found = loss, list(differentiate(loss, params, create_graph, retain_graph))
    if isinstance(value, Tensor) and not create_graph:
        value = value.detach()
    return value, found


def in_order(
    grads: Any, names: Sequence[str], known: Callable[[], Known], create_graph: bool
) -> list[Tensor | None]:
    """Return copies of given gradients, one for each parameter that takes part.

    They are copies, for an update may keep what it is given, in slots or in its graph, and buffers
    in which gradients are accumulated are zeroed and used again.

    Args:
        grads: A sequence, or a mapping by name.
        names: The names of the parameters that take part, in order.
        known: A function that returns all, frozen ones as well, with the further names of tied
            ones.
        create_graph: Whether the copies are connected to what was given.

    Raises:
        TypeError: For another kind of container, or an entry that is no tensor.
        ValueError: If they are not those of the parameters, or all of them are ``None``.
    """
    if isinstance(grads, Mapping):
        given = _by_name(dict(grads), names, known())
    elif isinstance(grads, Sequence) and not isinstance(grads, str):
        given = _by_position(list(grads), names, known)
    else:
        advice = " A loss comes first: step(loss)." if isinstance(grads, Tensor) else ""
        raise TypeError(
            "step expects grads as a list or tuple in the order of the parameters, or as a dict by "
            f"name, got {misuse.short(grads)}.{advice}"
        )
    for name, grad in zip(names, given):
        if grad is not None and not isinstance(grad, Tensor):
            raise TypeError(
                f"The gradient of {tree.quoted(name)} must be a tensor or None, got "
                f"{type(grad).__name__}.{misuse.advice_for_leaf(grad)}"
            )
    if all(grad is None for grad in given):
        raise ValueError(
            "All gradients are None, so that there is nothing to step from. Gradients of weights "
            "that a step has put into the network are not in p.grad: take them by "
            "torch.autograd.grad(loss, list(net.parameters()), create_graph=True)."
        )
    return [None if g is None else (g if create_graph else g.detach()).clone() for g in given]


def _by_position(
    grads: list[Any], names: Sequence[str], known: Callable[[], Known]
) -> list[Tensor | None]:
    """Return gradients in the order of those that take part, or of all parameters."""
    if len(grads) == len(names):
        return grads
    every = list(known().names)
    if len(grads) != len(every):
        frozen = f", {len(every)} with the frozen ones" if len(every) > len(names) else ""
        raise ValueError(
            f"step got {len(grads)} gradients for {len(names)} parameters{frozen}: "
            f"{misuse.some(names)}. Give one for each, None for those that are to stay."
        )
    return _of_trained(dict(zip(every, grads)), names)


def _by_name(grads: dict[str, Any], names: Sequence[str], known: Known) -> list[Tensor | None]:
    """Return gradients by name; a tied weight may have any of its names, or several."""
    first = {other: name for name, more in known.others.items() for other in more}
    found: dict[str, Any] = {}
    for given, grad in grads.items():
        name = first.get(given, given)
        if name not in known.names:
            raise ValueError(
                f"step got a gradient of {given!r}, which names no parameter; parameters: "
                f"{misuse.some(known.names)}."
            )
        if name in found and found[name] is not grad:
            raise ValueError(
                f"step got two gradients of the weight {name!r}, which is tied to {given!r}. "
                "Give one, their sum."
            )
        found[name] = grad
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"step got no gradient of {tree.quoted(missing[0])}. Give None for a parameter that "
            "is to stay."
        )
    return _of_trained(found, names)


def _of_trained(grads: dict[str, Any], names: Sequence[str]) -> list[Tensor | None]:
    for name, grad in grads.items():
        if grad is not None and name not in names:
            raise ValueError(
                f"step got a gradient of {tree.quoted(name)}, which is frozen. Give None, or call "
                "requires_grad_(True) on it."
            )
    return [grads[name] for name in names]
