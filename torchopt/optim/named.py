"""Named classes take the arguments of their recipe: a signature is written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from typing_extensions import Concatenate, ParamSpec

from torchopt.base import misuse
from torchopt.core.recipe import signature_of_recipe
from torchopt.core.transform import GradientTransformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.optimizer import Optimizer


P = ParamSpec("P")


def from_recipe(
    recipe: Callable[P, GradientTransformation],
) -> Callable[[Callable[[Any, Any], None]], Callable[Concatenate[Any, Any, P], None]]:
    """Give ``__init__(self, params)`` of a named class the arguments of its recipe as well.

    The implementation switches of ``torch.optim`` are accepted as keywords, so that calls carry
    over: ``foreach`` changes nothing, ``fused=True`` means ``use_accelerated_op=True``, and
    ``differentiable=True`` and ``capturable=True`` are refused with the way to get them.
    """

    def decorate(
        documented: Callable[[Any, Any], None],
    ) -> Callable[Concatenate[Any, Any, P], None]:
        def init(
            self: Any,
            params: Any,
            *args: Any,
            foreach: bool | None = None,
            fused: bool | None = None,
            capturable: bool = False,
            differentiable: bool = False,
            **kwargs: Any,
        ) -> None:
            misuse.refuse_switches(type(self).__name__, capturable, differentiable)
            if fused:
                kwargs["use_accelerated_op"] = True
            Optimizer.__init__(self, params, recipe(*args, **kwargs))  # pyright: ignore[reportCallIssue]

        own = inspect.signature(init).parameters
        switches = [own[name] for name in ("foreach", "fused", "capturable", "differentiable")]
        return signature_of_recipe(init, documented, recipe, [own["self"], own["params"]], switches)

    return decorate


def meta_from_recipe(
    recipe: Callable[P, GradientTransformation],
) -> Callable[[Callable[[Any, Any], None]], Callable[Concatenate[Any, Any, P], None]]:
    """Give ``__init__(self, module)`` of a named class the arguments of its recipe as well."""

    def decorate(
        documented: Callable[[Any, Any], None],
    ) -> Callable[Concatenate[Any, Any, P], None]:
        def init(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
            MetaOptimizer.__init__(self, module, recipe(*args, **kwargs))  # pyright: ignore[reportCallIssue]

        own = inspect.signature(init).parameters
        return signature_of_recipe(init, documented, recipe, [own["self"], own["module"]], [])

    return decorate
