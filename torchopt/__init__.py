"""TorchOpt: functional optimization and gradient-based meta-learning with PyTorch.

One definition of each optimizer has three faces: functional (:func:`adam`), object-oriented
(:class:`Adam`, a real ``torch.optim.Optimizer``) and differentiable (:class:`MetaAdam`).
"""

from torchopt import kernels as kernels
from torchopt import typing as typing
from torchopt import schedules as schedule
from torchopt import schedules as schedules
from torchopt.core.accelerated_op import accelerated_op_available as accelerated_op_available
from torchopt.core.apply import apply_updates as apply_updates
from torchopt.optim.func_optimizer import FuncOptimizer as FuncOptimizer
from torchopt.optim.inner_loop import inner_loop as inner_loop
from torchopt.optim.meta_optimizer import MetaOptimizer as MetaOptimizer
from torchopt.core.hyper import HyperSpec as HyperSpec
from torchopt.core.hyper import choice as choice
from torchopt.core.hyper import flag as flag
from torchopt.core.hyper import hyper as hyper
from torchopt.core.opt_state import OptState as OptState
from torchopt.core.slots import Counter as Counter
from torchopt.core.slots import Slot as Slot
from torchopt.optim.optimizer import Optimizer as Optimizer
from torchopt.optimizers.adafactor import Adafactor as Adafactor
from torchopt.optimizers.adafactor import MetaAdafactor as MetaAdafactor
from torchopt.optimizers.adafactor import adafactor as adafactor
from torchopt.optimizers.adam import Adam as Adam
from torchopt.optimizers.adam import MetaAdam as MetaAdam
from torchopt.optimizers.adam import adam as adam
from torchopt.optimizers.adam import scale_by_adam as scale_by_adam
from torchopt.optimizers.adamw import AdamW as AdamW
from torchopt.optimizers.adamw import MetaAdamW as MetaAdamW
from torchopt.optimizers.adamw import adamw as adamw
from torchopt.optimizers.lion import Lion as Lion
from torchopt.optimizers.lion import MetaLion as MetaLion
from torchopt.optimizers.lion import lion as lion
from torchopt.optimizers.lion import scale_by_lion as scale_by_lion
from torchopt.optimizers.muon import MetaMuon as MetaMuon
from torchopt.optimizers.muon import Muon as Muon
from torchopt.optimizers.muon import matrices_and_rest as matrices_and_rest
from torchopt.optimizers.muon import muon as muon
from torchopt.optimizers.muon import scale_by_muon as scale_by_muon
from torchopt.optimizers.nadam import MetaNAdam as MetaNAdam
from torchopt.optimizers.nadam import NAdam as NAdam
from torchopt.optimizers.nadam import nadam as nadam
from torchopt.optimizers.nadam import scale_by_nadam as scale_by_nadam
from torchopt.optimizers.rmsprop import MetaRMSProp as MetaRMSProp
from torchopt.optimizers.rmsprop import MetaRMSProp as MetaRMSprop
from torchopt.optimizers.rmsprop import RMSprop as RMSProp
from torchopt.optimizers.rmsprop import RMSprop as RMSprop
from torchopt.optimizers.rmsprop import rmsprop as rmsprop
from torchopt.optimizers.rmsprop import scale_by_rms as scale_by_rms
from torchopt.optimizers.rmsprop import scale_by_stddev as scale_by_stddev
from torchopt.optimizers.sgd import SGD as SGD
from torchopt.optimizers.schedule_free import AdamWScheduleFree as AdamWScheduleFree
from torchopt.optimizers.schedule_free import MetaAdamWScheduleFree as MetaAdamWScheduleFree
from torchopt.optimizers.schedule_free import MetaSGDScheduleFree as MetaSGDScheduleFree
from torchopt.optimizers.schedule_free import SGDScheduleFree as SGDScheduleFree
from torchopt.optimizers.schedule_free import schedule_free_adamw as schedule_free_adamw
from torchopt.optimizers.schedule_free import schedule_free_sgd as schedule_free_sgd
from torchopt.optimizers.sgd import MetaSGD as MetaSGD
from torchopt.optimizers.sgd import sgd as sgd
from torchopt.schedules import exponential_decay as exponential_decay
from torchopt.schedules import linear_schedule as linear_schedule
from torchopt.schedules import polynomial_schedule as polynomial_schedule
from torchopt.nn.snapshot import ModuleState as ModuleState
from torchopt.nn.snapshot import extract_state_dict as extract_state_dict
from torchopt.nn.snapshot import module_clone as module_clone
from torchopt.nn.snapshot import recover_state_dict as recover_state_dict
from torchopt.nn.snapshot import stop_gradient as module_detach_
from torchopt.nn.snapshot import stop_gradient as stop_gradient
from torchopt.core.chaining import chain as chain
from torchopt.core.rules import ElementwiseTransformation as ElementwiseTransformation
from torchopt.core.transform import GradientTransformation as GradientTransformation
from torchopt.core.rules import TensorTransformation as TensorTransformation
from torchopt.core.transform import transformation as transformation
from torchopt.transforms.basic import add_decayed_weights as add_decayed_weights
from torchopt.transforms.basic import flip_sign as flip_sign
from torchopt.transforms.basic import freeze as freeze
from torchopt.transforms.basic import identity as identity
from torchopt.transforms.basic import nan_to_num as nan_to_num
from torchopt.transforms.basic import register_hook as register_hook
from torchopt.transforms.basic import scale as scale
from torchopt.transforms.basic import scale_by_learning_rate as scale_by_learning_rate
from torchopt.transforms.basic import scale_by_schedule as scale_by_schedule
from torchopt.transforms.basic import set_to_zero as set_to_zero
from torchopt.transforms.clip import clip_grad_norm as clip_by_global_norm
from torchopt.transforms.clip import clip_grad_norm as clip_grad_norm
from torchopt.transforms.clip import clip_grad_value as clip_grad_value
from torchopt.transforms.momentum import trace as trace
from torchopt.transforms.partition import partition as partition
from torchopt.transforms.wrap import masked as masked
from torchopt.version import __version__ as __version__

import importlib as _importlib
import sys as _sys
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from torchopt import compat as _compat

if _TYPE_CHECKING:
    from torchopt import solvers as solvers
    from torchopt import visual as visual
    from torchopt.optimizers.lbfgs import LBFGS as LBFGS

#: What is imported when it is first asked for: a third of the time that all would take.
_LATER = {
    "LBFGS": "torchopt.optimizers.lbfgs",
    "solvers": "torchopt.solvers",
    "visual": "torchopt.visual",
}
#: Modules of the public interface; the others are rooms of the house (docs/architecture.md).
_MODULES = {"kernels", "schedule", "schedules", "typing"}


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        return _compat.look_up(_sys.modules[__name__], name)
    module = _importlib.import_module(_LATER[name])
    value = globals()[name] = getattr(module, name, module)
    return value


_compat.install()
__all__ = [  # noqa: PLE0604 # pyright: ignore[reportUnsupportedDunderAll]
    *_LATER,
    *(
        name
        for name, value in globals().items()
        if name == "__version__"
        or name in _MODULES
        or not (name.startswith("_") or isinstance(value, _ModuleType))
    ),
]


def __dir__() -> list[str]:
    return sorted(__all__)
