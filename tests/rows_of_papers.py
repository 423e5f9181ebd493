"""Rows of the table of algorithms (``cases.py``): those that ``torch.optim`` has not."""

from __future__ import annotations

import references.adabelief
import references.adan
import references.ademamix
import references.adopt
import references.dadapt
import references.lamb
import references.lars
import references.lion
import references.novograd
import references.optimistic_gradient_descent
import references.prodigy
import references.sign_sgd
import references.sm3
import references.sparse_adam
import references.yogi
import torch
from algorithms import Algorithm

import torchopt


ROWS_OF_PAPERS = (
    Algorithm(
        torchopt.lion,
        torchopt.Lion,
        torchopt.MetaLion,
        None,
        {
            "": {"lr": 0.03, "betas": (0.8, 0.95)},
            "decay": {"lr": 0.03, "betas": (0.7, 0.9), "weight_decay": 0.2},
        },
        slots=("exp_avg",),
        decoupled_decay=True,
        flat=("gradients", "slots", "betas"),
        reference=references.lion.lion,
    ),
    Algorithm(
        torchopt.lamb,
        torchopt.LAMB,
        torchopt.MetaLAMB,
        None,
        {
            "": {"lr": 0.08, "betas": (0.7, 0.9), "eps": 1e-8},
            "amsgrad-decay-eps-root": {
                "lr": 0.08,
                "betas": (0.7, 0.6),
                "eps": 1e-3,
                "weight_decay": 0.2,
                "amsgrad": True,
                "eps_root": 1e-2,
            },
        },
        slots=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        size="tensor",
        fused=False,
        needs_params=True,
        reference=references.lamb.lamb,
    ),
    Algorithm(
        torchopt.lars,
        torchopt.LARS,
        torchopt.MetaLARS,
        None,
        {
            "": {"lr": 0.05, "momentum": 0.8, "trust_coefficient": 0.2},
            "dampening-decay": {
                "lr": 0.05,
                "momentum": 0.7,
                "dampening": 0.3,
                "weight_decay": 0.2,
                "trust_coefficient": 0.3,
                "eps": 0.2,
            },
            "nesterov": {"lr": 0.05, "momentum": 0.6, "nesterov": True, "trust_coefficient": 0.2},
        },
        slots=("momentum_buffer",),
        size="tensor",
        fused=False,
        needs_params=True,
        reference=references.lars.lars,
        bounds={"trust_coefficient": ">= 0"},
    ),
    Algorithm(
        torchopt.adabelief,
        torchopt.AdaBelief,
        torchopt.MetaAdaBelief,
        None,
        {
            "": {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-8},
            "decay": {
                "lr": 0.03,
                "betas": (0.7, 0.9),
                "eps": 1e-3,
                "weight_decay": 0.2,
                "eps_root": 1e-2,
            },
        },
        slots=("exp_avg", "exp_avg_var"),
        decoupled_decay=True,
        reference=references.adabelief.adabelief,
    ),
    Algorithm(
        torchopt.adan,
        torchopt.Adan,
        torchopt.MetaAdan,
        None,
        {
            "": {"lr": 0.03, "betas": (0.8, 0.7, 0.95), "eps": 1e-8, "weight_decay": 0.2},
            "no-prox": {
                "lr": 0.03,
                "betas": (0.7, 0.8, 0.9),
                "eps": 1e-3,
                "weight_decay": 0.3,
                "no_prox": True,
            },
        },
        slots=("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"),
        decoupled_decay=True,
        shrinks=lambda k: (
            1 - k["lr"] * k["weight_decay"]
            if k.get("no_prox")
            else 1 / (1 + k["lr"] * k["weight_decay"])
        ),
        forgets_start=True,
        reference=references.adan.adan,
    ),
    Algorithm(
        torchopt.yogi,
        torchopt.Yogi,
        torchopt.MetaYogi,
        None,
        {
            # numbers for which no gradient comes near the root of its second moment
            "": {"lr": 0.05, "betas": (0.6, 0.8), "eps": 2e-3},
            "decay": {"lr": 0.04, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.2},
        },
        slots=("exp_avg", "exp_avg_sq"),
        starts_moving=True,
        reference=references.yogi.yogi,
        bounds={"initial_accumulator_value": ">= 0"},
        fixed=("initial_accumulator_value",),
    ),
    Algorithm(
        torchopt.novograd,
        torchopt.NovoGrad,
        torchopt.MetaNovoGrad,
        None,
        {
            "": {"lr": 0.05, "betas": (0.8, 0.6), "eps": 1e-8},
            "decay": {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.2},
        },
        slots=("exp_avg", "exp_avg_sq"),
        shapes={"exp_avg_sq": lambda shape: ()},
        size="tensor",
        fused=False,
        forgets_start=True,
        reference=references.novograd.novograd,
    ),
    Algorithm(
        torchopt.sign_sgd,
        torchopt.SignSGD,
        torchopt.MetaSignSGD,
        None,
        {"": {"lr": 0.03}, "decay": {"lr": 0.02, "weight_decay": 0.3}},
        decoupled_decay=True,
        flat=("gradients", "slots"),
        reference=references.sign_sgd.sign_sgd,
    ),
    Algorithm(
        torchopt.signum,
        torchopt.Signum,
        torchopt.MetaSignum,
        None,
        {
            "": {"lr": 0.03, "momentum": 0.8},
            "decay": {"lr": 0.03, "momentum": 0.6, "weight_decay": 0.2},
        },
        slots=("momentum_buffer",),
        decoupled_decay=True,
        flat=("gradients", "slots", "momentum"),
        reference=references.sign_sgd.signum,
        bounds={"momentum": ">= 0 and < 1"},
    ),
    Algorithm(
        torchopt.adopt,
        torchopt.ADOPT,
        torchopt.MetaADOPT,
        None,
        {
            # a step in which eps or a bound rules does not depend on the other numbers: see
            # test_adopt.py
            "": {"lr": 0.03, "betas": (0.8, 0.7)},
            "decoupled": {
                "lr": 0.03,
                "betas": (0.7, 0.9),
                "weight_decay": 0.2,
                "decoupled_weight_decay": True,
                "use_clipping": False,
            },
        },
        slots=("exp_avg", "exp_avg_sq"),
        rests=1,
        bounds={"clip_exponent": ">= 0"},
        reference=references.adopt.adopt,
    ),
    Algorithm(
        torchopt.ademamix,
        torchopt.AdEMAMix,
        torchopt.MetaAdEMAMix,
        None,
        {
            "": {"lr": 0.03, "betas": (0.8, 0.95, 0.97), "alpha": 3.0, "eps": 1e-8},
            "warm-up-decay": {
                "lr": 0.03,
                "betas": (0.6, 0.9, 0.9),
                "alpha": 2.0,
                "eps": 1e-3,
                "weight_decay": 0.2,
                "alpha_warmup": 3,
                "beta3_warmup": 4,
            },
        },
        slots=("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"),
        decoupled_decay=True,
        bounds={"alpha": ">= 0", "alpha_warmup": ">= 0", "beta3_warmup": ">= 0"},
        reference=references.ademamix.ademamix,
    ),
    Algorithm(
        torchopt.optimistic_gradient_descent,
        torchopt.OptimisticGradientDescent,
        torchopt.MetaOptimisticGradientDescent,
        None,
        {"": {"lr": 0.05, "alpha": 0.8, "beta": 0.6}},
        slots=("previous_grad",),
        linear=True,
        forgets_start=True,
        bounds={"alpha": "any number", "beta": "any number"},
        reference=references.optimistic_gradient_descent.optimistic_gradient_descent,
    ),
    Algorithm(
        torchopt.schedule_free_sgd,
        torchopt.SGDScheduleFree,
        torchopt.MetaSGDScheduleFree,
        None,
        {
            "": {"lr": 0.1, "momentum": 0.8},
            "warm-up-decay": {
                "lr": 0.1,
                "momentum": 0.7,
                "weight_decay": 0.1,
                "warmup_steps": 3,
                "r": 0.5,
                "weight_lr_power": 1.5,
            },
        },
        slots=("z",),
        linear=True,
        needs_params=True,
        oracle="test_schedule_free.py",
        bounds={
            "momentum": "> 0 and < 1",
            "warmup_steps": ">= 0",
            "r": ">= 0",
            "weight_lr_power": ">= 0",
        },
    ),
    Algorithm(
        torchopt.schedule_free_adamw,
        torchopt.AdamWScheduleFree,
        torchopt.MetaAdamWScheduleFree,
        None,
        {
            "": {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-8},
            "warm-up-decay": {
                "lr": 0.05,
                "betas": (0.7, 0.9),
                "eps": 1e-4,
                "weight_decay": 0.1,
                "warmup_steps": 3,
                "r": 0.5,
                "weight_lr_power": 1.5,
            },
        },
        slots=("z", "exp_avg_sq"),
        needs_params=True,
        oracle="test_schedule_free.py",
        bounds={
            "betas": "> 0 and < 1",
            "warmup_steps": ">= 0",
            "r": ">= 0",
            "weight_lr_power": ">= 0",
        },
    ),
    Algorithm(
        torchopt.sm3,
        torchopt.SM3,
        torchopt.MetaSM3,
        None,
        {
            "": {"lr": 0.05, "momentum": 0.8},
            "decay": {"lr": 0.03, "momentum": 0.6, "weight_decay": 0.2, "eps": 1e-2},
        },
        slots=("accumulator", "momentum_buffer"),
        shapes={"accumulator": lambda shape: (sum(shape) if shape else 1,)},
        size="tensor",
        fused=False,
        reference=references.sm3.sm3,
        bounds={"momentum": ">= 0 and < 1", "eps": "> 0"},
    ),
    Algorithm(
        torchopt.sparse_adam,
        torchopt.SparseAdam,
        torchopt.MetaSparseAdam,
        None,
        {
            "": {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-8},
            "large-eps": {"lr": 0.05, "betas": (0.7, 0.9), "eps": 0.3},
        },
        slots=("exp_avg", "exp_avg_sq"),
        sparse=True,
        reference=references.sparse_adam.sparse_adam,
        twin_of_sparse=torch.optim.SparseAdam,
    ),
    Algorithm(
        torchopt.prodigy,
        torchopt.Prodigy,
        torchopt.MetaProdigy,
        None,
        {
            # the first estimate matters, and the others grow, in few steps of any gradients
            "": {
                "lr": 0.8,
                "betas": (0.8, 0.7),
                "eps": 1e-2,
                "estim_lr0": 0.1,
                "estim_lr_coef": 8.0,
            },
            "options": {
                "lr": 0.8,
                "betas": (0.7, 0.8),
                "beta3": 0.3,
                "eps": 5e-3,
                "estim_lr0": 0.15,
                "estim_lr_coef": 4.0,
                "weight_decay": 0.2,
                "safeguard_warmup": True,
                "use_bias_correction": False,
            },
        },
        slots=("exp_avg", "exp_avg_sq", "grad_sum", "params0", "numerator_weighted", "estim_lr"),
        shapes={"numerator_weighted": lambda shape: (), "estim_lr": lambda shape: ()},
        size="all",
        fused=False,
        needs_params=True,
        decoupled_decay=True,
        constant=("params0",),
        reference=references.prodigy.prodigy,
        bounds={"estim_lr0": "> 0", "estim_lr_coef": ">= 0"},
    ),
    Algorithm(
        torchopt.dadapt_sgd,
        torchopt.DAdaptSGD,
        torchopt.MetaDAdaptSGD,
        None,
        {
            "": {"lr": 1.2, "momentum": 0.4, "estim_lr0": 0.3},
            "options": {"lr": 0.5, "momentum": 0.3, "weight_decay": 0.2, "estim_lr0": 0.3},
        },
        slots=("grad_sum", "params0", "numerator_weighted", "grad_norm0", "estim_lr"),
        shapes=dict.fromkeys(("numerator_weighted", "grad_norm0", "estim_lr"), lambda shape: ()),
        size="all",
        fused=False,
        needs_params=True,
        constant=("params0",),
        reference=references.dadapt.dadapt_sgd,
        bounds={"estim_lr0": "> 0", "momentum": ">= 0 and < 1"},
    ),
    Algorithm(
        torchopt.dadapt_adamw,
        torchopt.DAdaptAdamW,
        torchopt.MetaDAdaptAdamW,
        None,
        {
            "": {"lr": 1.2, "betas": (0.8, 0.7), "eps": 1e-2, "estim_lr0": 0.3},
            "options": {
                "lr": 1.2,
                "betas": (0.8, 0.7),
                "eps": 5e-3,
                "estim_lr0": 0.3,
                "weight_decay": 0.2,
                "use_bias_correction": False,
            },
        },
        slots=("exp_avg", "exp_avg_sq", "grad_sum", "numerator_weighted", "estim_lr"),
        shapes={"numerator_weighted": lambda shape: (), "estim_lr": lambda shape: ()},
        size="all",
        fused=False,
        decoupled_decay=True,
        reference=references.dadapt.dadapt_adamw,
        bounds={"estim_lr0": "> 0", "eps": "> 0"},
    ),
    Algorithm(
        torchopt.dadapt_adagrad,
        torchopt.DAdaptAdagrad,
        torchopt.MetaDAdaptAdagrad,
        None,
        {
            "": {"lr": 1.2, "eps": 1e-2, "estim_lr0": 0.3, "initial_accumulator_value": 0.1},
            "options": {
                "lr": 1.2,
                "momentum": 0.5,
                "weight_decay": 0.5,
                "eps": 5e-3,
                "estim_lr0": 0.3,
                "initial_accumulator_value": 0.1,
            },
        },
        slots=("sum", "grad_sum", "params0", "grad_sq_weighted", "estim_lr"),
        shapes={"grad_sq_weighted": lambda shape: (), "estim_lr": lambda shape: ()},
        size="all",
        fused=False,
        needs_params=True,
        constant=("params0",),
        reference=references.dadapt.dadapt_adagrad,
        bounds={
            "estim_lr0": "> 0",
            "momentum": ">= 0 and < 1",
            "initial_accumulator_value": ">= 0",
        },
    ),
)
