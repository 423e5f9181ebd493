# The public interface: one statement for each file of the package. Type checkers read it as it is;
# __init__.py reads it to know where to look when a name is first asked for.

from torchopt import (
    diff as diff,
    kernels as kernels,
    linear_solve as linear_solve,
    nn as nn,
    projections as projections,
    schedules as schedules,
    solvers as solvers,
    typing as typing,
    visual as visual,
)
from torchopt.core.accelerated_op import accelerated_op_available as accelerated_op_available
from torchopt.core.apply import apply_updates as apply_updates
from torchopt.core.chaining import chain as chain
from torchopt.core.hyper import (
    choice as choice,
    flag as flag,
    hyper as hyper,
    HyperSpec as HyperSpec,
)
from torchopt.core.named_values import (
    tree_get as tree_get,
    tree_get_all_with_path as tree_get_all_with_path,
    tree_set as tree_set,
)
from torchopt.core.opt_state import OptState as OptState
from torchopt.core.rules import (
    ElementwiseTransformation as ElementwiseTransformation,
    TensorTransformation as TensorTransformation,
)
from torchopt.core.slots import Counter as Counter, Slot as Slot
from torchopt.core.transform import (
    GradientTransformation as GradientTransformation,
    transformation as transformation,
)
from torchopt.diff.hessian_diagonal import (
    gauss_newton_bartlett as gauss_newton_bartlett,
    hutchinson_diagonal as hutchinson_diagonal,
)
from torchopt.nn.buffers import keep_buffers as keep_buffers
from torchopt.nn.snapshot import (
    extract_state_dict as extract_state_dict,
    module_clone as module_clone,
    ModuleState as ModuleState,
    recover_state_dict as recover_state_dict,
    stop_gradient as stop_gradient,
)
from torchopt.optim.from_torch import from_torch as from_torch
from torchopt.optim.func_optimizer import FuncOptimizer as FuncOptimizer
from torchopt.optim.inner_loop import inner_loop as inner_loop
from torchopt.optim.learned import LearnedHyperparameters as LearnedHyperparameters
from torchopt.optim.meta_optimizer import MetaOptimizer as MetaOptimizer
from torchopt.optim.optimizer import Optimizer as Optimizer
from torchopt.optimizers.adabelief import (
    AdaBelief as AdaBelief,
    adabelief as adabelief,
    MetaAdaBelief as MetaAdaBelief,
    scale_by_belief as scale_by_belief,
)
from torchopt.optimizers.adadelta import (
    Adadelta as Adadelta,
    adadelta as adadelta,
    MetaAdadelta as MetaAdadelta,
    scale_by_adadelta as scale_by_adadelta,
)
from torchopt.optimizers.adafactor import (
    Adafactor as Adafactor,
    adafactor as adafactor,
    MetaAdafactor as MetaAdafactor,
)
from torchopt.optimizers.adagrad import (
    Adagrad as Adagrad,
    adagrad as adagrad,
    MetaAdagrad as MetaAdagrad,
    scale_by_rss as scale_by_rss,
)
from torchopt.optimizers.adam import (
    Adam as Adam,
    adam as adam,
    MetaAdam as MetaAdam,
    scale_by_adam as scale_by_adam,
)
from torchopt.optimizers.adamax import (
    Adamax as Adamax,
    adamax as adamax,
    MetaAdamax as MetaAdamax,
    scale_by_adamax as scale_by_adamax,
)
from torchopt.optimizers.adamw import AdamW as AdamW, adamw as adamw, MetaAdamW as MetaAdamW
from torchopt.optimizers.adan import (
    Adan as Adan,
    adan as adan,
    MetaAdan as MetaAdan,
    scale_by_adan as scale_by_adan,
)
from torchopt.optimizers.ademamix import (
    AdEMAMix as AdEMAMix,
    ademamix as ademamix,
    MetaAdEMAMix as MetaAdEMAMix,
    scale_by_ademamix as scale_by_ademamix,
)
from torchopt.optimizers.adopt import (
    ADOPT as ADOPT,
    adopt as adopt,
    MetaADOPT as MetaADOPT,
    scale_by_adopt as scale_by_adopt,
)
from torchopt.optimizers.asgd import ASGD as ASGD, asgd as asgd, MetaASGD as MetaASGD
from torchopt.optimizers.dadapt import (
    DAdaptAdagrad as DAdaptAdagrad,
    dadapt_adagrad as dadapt_adagrad,
    DAdaptSGD as DAdaptSGD,
    dadapt_sgd as dadapt_sgd,
    MetaDAdaptAdagrad as MetaDAdaptAdagrad,
    MetaDAdaptSGD as MetaDAdaptSGD,
)
from torchopt.optimizers.dadapt_adamw import (
    DAdaptAdamW as DAdaptAdamW,
    dadapt_adamw as dadapt_adamw,
    MetaDAdaptAdamW as MetaDAdaptAdamW,
)
from torchopt.optimizers.lamb import LAMB as LAMB, lamb as lamb, MetaLAMB as MetaLAMB
from torchopt.optimizers.lars import LARS as LARS, lars as lars, MetaLARS as MetaLARS
from torchopt.optimizers.lbfgs import LBFGS as LBFGS
from torchopt.optimizers.lion import (
    Lion as Lion,
    MetaLion as MetaLion,
    lion as lion,
    scale_by_lion as scale_by_lion,
)
from torchopt.optimizers.muon import (
    matrices_and_rest as matrices_and_rest,
    MetaMuon as MetaMuon,
    Muon as Muon,
    muon as muon,
    scale_by_muon as scale_by_muon,
)
from torchopt.optimizers.nadam import (
    MetaNAdam as MetaNAdam,
    NAdam as NAdam,
    nadam as nadam,
    scale_by_nadam as scale_by_nadam,
)
from torchopt.optimizers.noisy_sgd import (
    add_noise as add_noise,
    MetaNoisySGD as MetaNoisySGD,
    noisy_sgd as noisy_sgd,
    NoisySGD as NoisySGD,
)
from torchopt.optimizers.novograd import (
    MetaNovoGrad as MetaNovoGrad,
    NovoGrad as NovoGrad,
    novograd as novograd,
    scale_by_novograd as scale_by_novograd,
)
from torchopt.optimizers.optimistic import (
    MetaOptimisticGradientDescent as MetaOptimisticGradientDescent,
    optimistic_gradient_descent as optimistic_gradient_descent,
    OptimisticGradientDescent as OptimisticGradientDescent,
    scale_by_optimistic_gradient as scale_by_optimistic_gradient,
)
from torchopt.optimizers.polyak import (
    MetaPolyakSGD as MetaPolyakSGD,
    polyak_sgd as polyak_sgd,
    PolyakSGD as PolyakSGD,
    scale_by_polyak as scale_by_polyak,
)
from torchopt.optimizers.prodigy import (
    MetaProdigy as MetaProdigy,
    Prodigy as Prodigy,
    prodigy as prodigy,
)
from torchopt.optimizers.radam import (
    MetaRAdam as MetaRAdam,
    RAdam as RAdam,
    radam as radam,
    scale_by_radam as scale_by_radam,
)
from torchopt.optimizers.rmsprop import (
    MetaRMSprop as MetaRMSprop,
    RMSprop as RMSprop,
    rmsprop as rmsprop,
    scale_by_rms as scale_by_rms,
    scale_by_stddev as scale_by_stddev,
)
from torchopt.optimizers.rprop import MetaRprop as MetaRprop, Rprop as Rprop, rprop as rprop
from torchopt.optimizers.sam import MetaSAM as MetaSAM, SAM as SAM
from torchopt.optimizers.schedule_free import (
    AdamWScheduleFree as AdamWScheduleFree,
    MetaAdamWScheduleFree as MetaAdamWScheduleFree,
    MetaSGDScheduleFree as MetaSGDScheduleFree,
    schedule_free_adamw as schedule_free_adamw,
    schedule_free_sgd as schedule_free_sgd,
    SGDScheduleFree as SGDScheduleFree,
)
from torchopt.optimizers.sgd import MetaSGD as MetaSGD, SGD as SGD, sgd as sgd
from torchopt.optimizers.shampoo import (
    MetaShampoo as MetaShampoo,
    scale_by_shampoo as scale_by_shampoo,
    Shampoo as Shampoo,
    shampoo as shampoo,
)
from torchopt.optimizers.sign_sgd import (
    MetaSignSGD as MetaSignSGD,
    MetaSignum as MetaSignum,
    scale_by_sign as scale_by_sign,
    sign_sgd as sign_sgd,
    SignSGD as SignSGD,
    Signum as Signum,
    signum as signum,
)
from torchopt.optimizers.sm3 import (
    MetaSM3 as MetaSM3,
    scale_by_sm3 as scale_by_sm3,
    SM3 as SM3,
    sm3 as sm3,
)
from torchopt.optimizers.soap import (
    MetaSOAP as MetaSOAP,
    scale_by_soap as scale_by_soap,
    SOAP as SOAP,
    soap as soap,
)
from torchopt.optimizers.sophia import (
    MetaSophia as MetaSophia,
    scale_by_sophia as scale_by_sophia,
    Sophia as Sophia,
    sophia as sophia,
)
from torchopt.optimizers.sparse_adam import (
    MetaSparseAdam as MetaSparseAdam,
    scale_by_sparse_adam as scale_by_sparse_adam,
    sparse_adam as sparse_adam,
    SparseAdam as SparseAdam,
)
from torchopt.optimizers.yogi import (
    MetaYogi as MetaYogi,
    scale_by_yogi as scale_by_yogi,
    Yogi as Yogi,
    yogi as yogi,
)
from torchopt.transforms.accumulate import (
    MultiSteps as MultiSteps,
    skip_not_finite as skip_not_finite,
)
from torchopt.transforms.basic import (
    add_decayed_weights as add_decayed_weights,
    flip_sign as flip_sign,
    freeze as freeze,
    identity as identity,
    nan_to_num as nan_to_num,
    register_hook as register_hook,
    scale as scale,
    scale_by_learning_rate as scale_by_learning_rate,
    scale_by_schedule as scale_by_schedule,
    set_to_zero as set_to_zero,
)
from torchopt.transforms.clip import (
    clip_by_global_norm as clip_by_global_norm,
    clip_grad_norm as clip_grad_norm,
    clip_grad_value as clip_grad_value,
)
from torchopt.transforms.conditional import (
    apply_if_finite as apply_if_finite,
    conditionally_mask as conditionally_mask,
    conditionally_transform as conditionally_transform,
)
from torchopt.transforms.constrain import (
    keep_params_nonnegative as keep_params_nonnegative,
    project as project,
    zero_nans as zero_nans,
)
from torchopt.transforms.inject import inject_hyperparams as inject_hyperparams
from torchopt.transforms.lookahead import lookahead as lookahead
from torchopt.transforms.momentum import ema as ema, trace as trace
from torchopt.transforms.named import named_chain as named_chain
from torchopt.transforms.partition import partition as partition
from torchopt.transforms.per_example import (
    per_example_global_norm_clip as per_example_global_norm_clip,
)
from torchopt.transforms.plateau import reduce_on_plateau as reduce_on_plateau
from torchopt.transforms.sam import sam as sam
from torchopt.transforms.selective import selective_transform as selective_transform
from torchopt.transforms.stateless import (
    stateless as stateless,
    stateless_with_tree_map as stateless_with_tree_map,
)
from torchopt.transforms.trust_ratio import scale_by_trust_ratio as scale_by_trust_ratio
from torchopt.transforms.units import (
    adaptive_grad_clip as adaptive_grad_clip,
    centralize as centralize,
    clip_by_block_rms as clip_by_block_rms,
)
from torchopt.transforms.wrap import masked as masked
from torchopt.version import __version__ as __version__

# Second names, of TorchOpt 0.7.3 and Optax: they are there, and completion does not show them.
# (`import x as y` would not make y known to type checkers.)
AdaDelta = Adadelta
AdaGrad = Adagrad
AdaMax = Adamax
exponential_decay = schedules.exponential_decay
linear_schedule = schedules.linear
MetaAdaDelta = MetaAdadelta
MetaAdaGrad = MetaAdagrad
MetaAdaMax = MetaAdamax
MetaRMSProp = MetaRMSprop
module_detach_ = stop_gradient
polynomial_schedule = schedules.polynomial
RMSProp = RMSprop
schedule = schedules
