"""The block of inner_loop and the optimizer that it gives, used as what they are not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from torch import nn
from typing_extensions import ParamSpec

from torchopt.base.misuse.given import given
from torchopt.base.misuse.transformations import not_a_transformation
from torchopt.base.misuse.trees import not_a_module


P = ParamSpec("P")
T = TypeVar("T")


class Block(contextlib.ContextDecorator, Generic[T]):
    """A ``with`` block made of a generator, which says so where it is used as what it yields."""

    def __init__(self, enter: Callable[[], AbstractContextManager[T]], name: str) -> None:
        self._enter, self._name = enter, name
        self._open: list[AbstractContextManager[T]] = []

    def __enter__(self) -> T:
        manager = self._enter()
        value = manager.__enter__()
        self._open.append(manager)
        return value

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.pop().__exit__(*error)

    def __repr__(self) -> str:
        return f"<{self._name}(...), a block: with {self._name}(...) as inner>"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self._name}(...) has no attribute {name!r}. {self._words()}")

    def __getitem__(self, key: Any) -> Any:
        # also what Python asks when it unpacks something
        raise TypeError(
            f"{self._name}(...) returns one block: no pair, and nothing to iterate over. "
            f"{self._words()}"
        )

    def _words(self) -> str:
        return (
            f"It opens a block that gives the optimizer: write `with torchopt.{self._name}"
            "(net, tx) as inner:` and call inner.step(loss) inside."
        )


def block(function: Callable[P, Iterator[T]]) -> Callable[P, Block[T]]:
    """Make a generator function a ``with`` block, as ``contextlib.contextmanager`` does."""
    manager = contextlib.contextmanager(function)

    @functools.wraps(function)
    def open_block(*args: P.args, **kwargs: P.kwargs) -> Block[T]:
        return Block(lambda: manager(*args, **kwargs), function.__name__)

    return open_block


def check_inner_loop(module: Any, tx: object) -> None:
    """Refuse arguments of ``inner_loop`` in another order, or of another kind.

    Raises:
        TypeError: With what to give.
    """
    if isinstance(tx, nn.Module) and not isinstance(module, nn.Module):
        raise TypeError(
            f"inner_loop got its arguments in the other order: {type(module).__name__} and "
            f"{given(tx)}. Write inner_loop(net, tx)."
        )
    if not isinstance(module, nn.Module):
        raise TypeError(not_a_module(module, "inner_loop"))
    if not hasattr(tx, "hyper_specs") and not hasattr(type(tx), "extract_state"):
        raise TypeError(not_a_transformation(tx, "inner_loop"))


def step_after_block(*args: Any, **kwargs: Any) -> None:
    """Refuse a step when the block has ended: it would change the network for good.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        "The inner_loop block of this optimizer has ended, and its network is what it was before. "
        "Step inside of the block; to adapt a network for good there is "
        "torchopt.MetaOptimizer(net, tx), and for the outer step an optimizer of torch.optim."
    )


class NoPlainOptimizer:
    """What a differentiable optimizer answers to calls that other optimizers know."""

    _elsewhere = {
        "zero_grad": "step(loss) takes the gradient of the loss itself and fills no p.grad; the "
        "outer optimizer has one: outer.zero_grad().",
        "state": "it is returned by torchopt.extract_state_dict(optimizer) and state_dict().",
        "defaults": "they are optimizer.transformation.hyperparameters().",
        "param_groups": "its hyperparameters are optimizer.transformation.hyperparameters().",
        "update": "it takes steps, step(loss); optimizer.transformation has update.",
    }

    def __getattr__(self, name: str) -> Any:
        where = self._elsewhere.get(name)
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}"
            + (f": {where}" if where else "")
        )

    def __getitem__(self, key: Any) -> Any:
        # also what Python asks when it unpacks something
        raise TypeError(
            f"{type(self).__name__} is one optimizer and no pair (network, optimizer) as in "
            "higher: write `with torchopt.inner_loop(net, tx) as inner:` and go on calling net."
        )
