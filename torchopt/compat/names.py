"""Functions and types of TorchOpt 0.7.3 that have another signature or another name here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Union

from torch import Tensor
from typing_extensions import TypeAlias

from torchopt.core.accelerated_op import accelerated
from torchopt.core.chaining import Chain, chain
from torchopt.core.recipe import ignoring_moment_requires_grad
from torchopt.core.transform import GradientTransformation
from torchopt.optimizers import adam, adamax, radam
from torchopt.transforms.basic import add_decayed_weights, flip_sign
from torchopt.typing import Hyperparameter


@ignoring_moment_requires_grad
def scale_by_adam(
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 0.0,
) -> GradientTransformation:
    """:func:`torchopt.scale_by_adam` with the arguments that ``torchopt.transform`` had for it."""
    return adam.scale_by_adam((b1, b2), eps, eps_root)


@ignoring_moment_requires_grad
def scale_by_accelerated_adam(
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 0.0,
) -> GradientTransformation:
    """The same with a fused kernel required."""
    return accelerated(adam.scale_by_adam((b1, b2), eps, eps_root), True)


@ignoring_moment_requires_grad
def scale_by_adamax(
    b1: Hyperparameter = 0.9, b2: Hyperparameter = 0.999, eps: Hyperparameter = 1e-6
) -> GradientTransformation:
    """:func:`torchopt.scale_by_adamax` with the arguments and defaults it had there."""
    return adamax.scale_by_adamax((b1, b2), eps)


@ignoring_moment_requires_grad
def scale_by_radam(
    b1: Hyperparameter = 0.9, b2: Hyperparameter = 0.999, eps: Hyperparameter = 1e-6
) -> GradientTransformation:
    """:func:`torchopt.scale_by_radam` with the arguments and defaults it had there."""
    return radam.scale_by_radam((b1, b2), eps)


def flip_sign_and_add_weight_decay(
    weight_decay: Hyperparameter = 0.0, maximize: bool = False
) -> GradientTransformation:
    """:func:`torchopt.flip_sign` and :func:`torchopt.add_decayed_weights`, in this order."""
    return chain(flip_sign(maximize), add_decayed_weights(weight_decay))


class _Empty(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Chain) and not instance.parts


class IdentityGradientTransformation(metaclass=_Empty):
    """What :func:`torchopt.identity` returns: the empty chain."""

    def __new__(cls) -> Any:
        """Return it."""
        return chain()


Scalar: TypeAlias = Union[float, int, bool]
Numeric: TypeAlias = Union[Tensor, float, int, bool]
ScalarOrSchedule: TypeAlias = Union[float, Callable[[Numeric], Numeric]]
OptionalTensor: TypeAlias = Tensor | None
ListOfTensors: TypeAlias = list[Tensor]
TupleOfTensors: TypeAlias = tuple[Tensor, ...]
SequenceOfTensors: TypeAlias = Sequence[Tensor]
TensorOrTensors: TypeAlias = Union[Tensor, Sequence[Tensor]]
ListOfOptionalTensors: TypeAlias = list[Tensor | None]
TupleOfOptionalTensors: TypeAlias = tuple[Tensor | None, ...]
SequenceOfOptionalTensors: TypeAlias = Sequence[Tensor | None]
OptionalTensorOrOptionalTensors: TypeAlias = Union[Tensor, Sequence[Tensor | None], None]
TensorContainer: TypeAlias = dict[str, Tensor | None]
ModuleTensorContainers: TypeAlias = tuple[dict[str, Tensor | None], ...]
