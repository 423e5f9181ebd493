"""Schedules: functions ``count -> value`` that may stand in place of any hyperparameter.

``count`` is 0 at the first update. Schedules are dataclasses: they print, compare and pickle; their
values may be tensors and receive gradients; ``count`` may be a 0-d tensor.
"""

import sys as _sys

from torchopt.base import lazy as _lazy
from torchopt.schedules.basic import (
    constant,
    exponential_decay,
    linear,
    piecewise_constant,
    polynomial,
)
from torchopt.schedules.cosine import (
    cosine,
    cosine_annealing_lr,
    cosine_annealing_warm_restarts,
    cosine_decay,
)
from torchopt.schedules.interpolation import (
    cosine_onecycle,
    linear_onecycle,
    piecewise_interpolate,
)
from torchopt.schedules.joining import (
    join,
    product,
    sgdr,
    warmup_constant,
    warmup_cosine,
    warmup_exponential_decay,
)
from torchopt.schedules.torch_schedulers import (
    constant_lr,
    cyclic_lr,
    exponential_lr,
    linear_lr,
    multi_step_lr,
    one_cycle_lr,
    one_cycle_momentum,
    polynomial_lr,
    step_lr,
)


# Names in TorchOpt 0.7.3 and Optax.
constant_schedule = constant
linear_schedule = linear
polynomial_schedule = polynomial
cosine_decay_schedule = cosine_decay
cosine_onecycle_schedule = cosine_onecycle
linear_onecycle_schedule = linear_onecycle
piecewise_constant_schedule = piecewise_constant
piecewise_interpolate_schedule = piecewise_interpolate
join_schedules = join
sgdr_schedule = sgdr
warmup_constant_schedule = warmup_constant
warmup_cosine_decay = warmup_cosine
warmup_cosine_decay_schedule = warmup_cosine
warmup_exponential_decay_schedule = warmup_exponential_decay

__all__ = [
    "constant",
    "constant_lr",
    "constant_schedule",
    "cosine",
    "cosine_annealing_lr",
    "cosine_annealing_warm_restarts",
    "cosine_decay",
    "cosine_decay_schedule",
    "cosine_onecycle",
    "cosine_onecycle_schedule",
    "cyclic_lr",
    "exponential_decay",
    "exponential_lr",
    "join",
    "join_schedules",
    "linear",
    "linear_lr",
    "linear_onecycle",
    "linear_onecycle_schedule",
    "linear_schedule",
    "multi_step_lr",
    "one_cycle_lr",
    "one_cycle_momentum",
    "piecewise_constant",
    "piecewise_constant_schedule",
    "piecewise_interpolate",
    "piecewise_interpolate_schedule",
    "polynomial",
    "polynomial_lr",
    "polynomial_schedule",
    "product",
    "sgdr",
    "sgdr_schedule",
    "step_lr",
    "warmup_constant",
    "warmup_constant_schedule",
    "warmup_cosine",
    "warmup_cosine_decay",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay",
    "warmup_exponential_decay_schedule",
]

__dir__ = _lazy.shown(_sys.modules[__name__])
