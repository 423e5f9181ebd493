"""TorchOpt: functional optimization and gradient-based meta-learning with PyTorch.

One definition of each optimizer has three faces: functional (:func:`adam`), object-oriented
(:class:`Adam`, a real ``torch.optim.Optimizer``) and differentiable (:class:`MetaAdam`).
"""

from torchopt import kernels as kernels
from torchopt import visual as visual
from torchopt import schedules as schedule
from torchopt import schedules as schedules
from torchopt import solvers as solvers
from torchopt.accelerated_op import accelerated_op_available as accelerated_op_available
from torchopt.apply import apply_updates as apply_updates
from torchopt.func_optimizer import FuncOptimizer as FuncOptimizer
from torchopt.inner_loop import inner_loop as inner_loop
from torchopt.meta import MetaOptimizer as MetaOptimizer
from torchopt.opt_state import OptState as OptState
from torchopt.optim import Optimizer as Optimizer
from torchopt.optimizers.adam import Adam as Adam
from torchopt.optimizers.adam import MetaAdam as MetaAdam
from torchopt.optimizers.adam import adam as adam
from torchopt.optimizers.adam import scale_by_adam as scale_by_adam
from torchopt.optimizers.adamw import AdamW as AdamW
from torchopt.optimizers.adamw import MetaAdamW as MetaAdamW
from torchopt.optimizers.adamw import adamw as adamw
from torchopt.optimizers.lbfgs import LBFGS as LBFGS
from torchopt.optimizers.rmsprop import MetaRMSProp as MetaRMSProp
from torchopt.optimizers.rmsprop import MetaRMSProp as MetaRMSprop
from torchopt.optimizers.rmsprop import RMSprop as RMSProp
from torchopt.optimizers.rmsprop import RMSprop as RMSprop
from torchopt.optimizers.rmsprop import rmsprop as rmsprop
from torchopt.optimizers.rmsprop import scale_by_rms as scale_by_rms
from torchopt.optimizers.rmsprop import scale_by_stddev as scale_by_stddev
from torchopt.optimizers.sgd import SGD as SGD
from torchopt.optimizers.sgd import MetaSGD as MetaSGD
from torchopt.optimizers.sgd import sgd as sgd
from torchopt.schedules import exponential_decay as exponential_decay
from torchopt.schedules import linear_schedule as linear_schedule
from torchopt.schedules import polynomial_schedule as polynomial_schedule
from torchopt.state import ModuleState as ModuleState
from torchopt.state import extract_state_dict as extract_state_dict
from torchopt.state import module_clone as module_clone
from torchopt.state import recover_state_dict as recover_state_dict
from torchopt.state import stop_gradient as module_detach_
from torchopt.state import stop_gradient as stop_gradient
from torchopt.chaining import chain as chain
from torchopt.transform import ElementwiseTransformation as ElementwiseTransformation
from torchopt.transform import GradientTransformation as GradientTransformation
from torchopt.transform import transformation as transformation
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

from torchopt import compat as _compat

_compat.install()
del _compat
