"""Named classes take the arguments of their recipe: a signature is written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, Union, overload

from torch import nn
from torch.optim.optimizer import ParamsT
from typing_extensions import ParamSpec, TypeAlias

from torchopt.base import misuse
from torchopt.core.recipe import keywords_of, signature_of_recipe
from torchopt.core.transform import GradientTransformation
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.optimizer import Optimizer


P = ParamSpec("P")
Networks: TypeAlias = Union[nn.Module, Sequence[Union[nn.Module, dict[str, Any]]]]

#: What the arguments mean that a recipe has not: those before its own, and those after them.
IN_PLACE = (
    """
    params: What to train: an iterable of tensors (``net.parameters()``), of ``(name, tensor)``
        pairs (``net.named_parameters()``), or of parameter groups, dicts ``{{"params": ...,
        "lr": ...}}`` with hyperparameters of their own. A network itself is refused.
    """,
    """
    foreach: Accepted for compatibility with ``torch.optim``, and ignored: kernels update all
        tensors together wherever there are any.
    fused: ``True`` requires fused kernels, as ``use_accelerated_op=True`` does; ``None`` and
        ``False`` change nothing. To forbid them write ``use_accelerated_op=False``.
    capturable: ``True`` is refused: steps cannot be captured in CUDA graphs. Leave it out.
    differentiable: ``True`` is refused: a step changes parameters in place. To differentiate
        through steps write ``torchopt.Meta{cls}(net, ...)``, or ``torchopt.{recipe}(...)`` with
        ``inplace=False``.
    """,
)
DIFFERENTIABLE = (
    """
    module: The network (not its parameters); or a list of networks and of dicts ``{{"params":
        network, "lr": ...}}`` with hyperparameters of their own.
    """,
    "",
)


def from_recipe(
    recipe: Callable[P, GradientTransformation],
) -> Callable[[Callable[[Any, Any], None]], Init[P]]:
    """Give ``__init__(self, params)`` of a named class the arguments of its recipe as well.

    The implementation switches of ``torch.optim`` are accepted as keywords, so that calls carry
    over: ``foreach`` changes nothing, ``fused=True`` means ``use_accelerated_op=True``, and
    ``differentiable=True`` and ``capturable=True`` are refused with the way to get them.
    """

    def decorate(documented: Callable[[Any, Any], None]) -> Any:
        def init(
            self: Any,
            params: ParamsT,
            *args: Any,
            foreach: bool | None = None,
            fused: bool | None = None,
            capturable: bool = False,
            differentiable: bool = False,
            **kwargs: Any,
        ) -> None:
            title = type(self).__name__
            misuse.refuse_switches(title, capturable, differentiable)
            kwargs = misuse.without_fixed(title, kwargs, self.fixed_options)
            misuse.check_keywords(title, kwargs, *known)
            if fused:
                kwargs["use_accelerated_op"] = True
            Optimizer.__init__(self, params, recipe(*args, **kwargs))  # pyright: ignore[reportCallIssue]

        known = keywords_of(recipe)
        own = inspect.signature(init).parameters
        switches = [own[name] for name in ("foreach", "fused", "capturable", "differentiable")]
        before = [own["self"], own["params"].replace(annotation=ParamsT)]
        return signature_of_recipe(init, documented, recipe, before, switches, IN_PLACE)

    return decorate


def meta_from_recipe(
    recipe: Callable[P, GradientTransformation],
) -> Callable[[Callable[[Any, Any], None]], MetaInit[P]]:
    """Give ``__init__(self, module)`` of a named class the arguments of its recipe as well."""

    def decorate(documented: Callable[[Any, Any], None]) -> Any:
        def init(self: Any, module: Networks, *args: Any, **kwargs: Any) -> None:
            misuse.check_keywords(type(self).__name__, kwargs, *known)
            MetaOptimizer.__init__(self, module, recipe(*args, **kwargs))  # pyright: ignore[reportCallIssue]

        known = keywords_of(recipe)
        own = inspect.signature(init).parameters
        before = [own["self"], own["module"].replace(annotation=Networks)]
        return signature_of_recipe(init, documented, recipe, before, [], DIFFERENTIABLE)

    return decorate


# What type checkers are told. The arguments of a recipe cannot be joined with keywords of one's own
# in one signature (PEP 612), so there is another for each keyword; those check the rest loosely.


class Init(Protocol[P]):
    """``__init__`` of a class in place."""

    def __get__(self, instance: Any, owner: Any = None, /) -> _BoundInit[P]:
        """Bind it."""
        ...


class _BoundInit(Protocol[P]):
    @overload
    def __call__(self, params: ParamsT, *args: P.args, **kwargs: P.kwargs) -> None: ...
    @overload
    def __call__(self, *, params: ParamsT, **kwargs: Any) -> None: ...
    @overload
    def __call__(
        self, params: ParamsT, *args: Any, foreach: bool | None, **kwargs: Any
    ) -> None: ...
    @overload
    def __call__(self, params: ParamsT, *args: Any, fused: bool | None, **kwargs: Any) -> None: ...
    @overload
    def __call__(
        self, params: ParamsT, *args: Any, capturable: Literal[False], **kwargs: Any
    ) -> None: ...
    @overload
    def __call__(
        self, params: ParamsT, *args: Any, differentiable: Literal[False], **kwargs: Any
    ) -> None: ...


class MetaInit(Protocol[P]):
    """``__init__`` of a differentiable class."""

    def __get__(self, instance: Any, owner: Any = None, /) -> _BoundMetaInit[P]:
        """Bind it."""
        ...


class _BoundMetaInit(Protocol[P]):
    @overload
    def __call__(self, module: Networks, *args: P.args, **kwargs: P.kwargs) -> None: ...
    @overload
    def __call__(self, *, module: Networks, **kwargs: Any) -> None: ...
