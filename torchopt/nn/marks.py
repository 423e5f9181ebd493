"""What a parameter carries besides its numbers, handed from each fast weight to the next.

Attributes of the user's, and hooks. A hook filters the *gradient of the inner loss* at every step,
as it would in a training loop. It is not registered with the fast weights, where autograd would
also run it on what flows back from one step to the one before: the derivative of the whole would
then not be that of the steps that were made. At the parameter itself autograd runs it as ever.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


#: Among the attributes of a fast weight: the hooks of the tensors that it stands for.
_HOOKS, _LATE_HOOKS = "_torchopt_hooks", "_torchopt_post_accumulate_grad_hooks"

_hooks_of = operator.attrgetter("_backward_hooks")
_late_hooks_of = operator.attrgetter("_post_accumulate_grad_hooks")


class Relay:
    """The hooks of other tensors as one hook; a hook removed there is removed here.

    Args:
        sources: Dicts of hooks, as tensors keep them.
    """

    def __init__(self, sources: Sequence[Mapping[Any, Any]]) -> None:
        self.sources = sources

    def __call__(self, value: Tensor) -> Tensor | None:
        """Return what the hooks make of a gradient; ``None`` if they only look at it."""
        changed = None
        for hook in self._hooks():
            result = hook(value)
            if result is not None:
                changed = value = result
        return changed

    def _hooks(self) -> list[Any]:
        hooks = itertools.chain.from_iterable(source.values() for source in self.sources)
        return [hook for hook in hooks if not isinstance(hook, Relay)]


def any_marked(tensors: Sequence[Tensor]) -> bool:
    """Whether any tensor has attributes or hooks."""
    return (
        any(map(vars, tensors)) or any(map(_hooks_of, tensors)) or any(map(_late_hooks_of, tensors))
    )


def carry(old: Tensor, new: Tensor) -> None:
    """Give attributes and hooks of a parameter to the tensor that takes its place."""
    kept = dict(vars(old))
    hooks = _sources(kept.pop(_HOOKS, ()), old._backward_hooks)
    late = _sources(kept.pop(_LATE_HOOKS, ()), old._post_accumulate_grad_hooks)
    if kept:
        vars(new).update(kept)
    if new.grad_fn is not None:
        vars(new).update({k: v for k, v in ((_HOOKS, hooks), (_LATE_HOOKS, late)) if v})
        return
    if new.requires_grad and hooks:
        new.register_hook(Relay(hooks))
    if new.requires_grad and late:
        new.register_post_accumulate_grad_hook(Relay(late))


def filtered(
    tensors: Sequence[Tensor], grads: Sequence[Tensor | None], create_graph: bool
) -> list[Tensor | None]:
    """Return gradients after the hooks that autograd does not know of."""
    found = list(grads)
    with torch.set_grad_enabled(create_graph):
        for k, (tensor, grad) in enumerate(zip(tensors, found)):
            sources = vars(tensor).get(_HOOKS)
            if sources and grad is not None:
                changed = Relay(sources)(grad)
                found[k] = grad if changed is None else changed
    return found


def _sources(inherited: Sequence[Any], own: Mapping[Any, Any] | None) -> tuple[Any, ...]:
    sources = list(inherited)
    for hook in (own or {}).values():
        if isinstance(hook, Relay):
            sources += hook.sources
    if any(not isinstance(hook, Relay) for hook in (own or {}).values()):
        sources.append(own)
    return tuple(sources)
