"""Rows of the table of algorithms (``cases.py``): rates that are made of all parameters."""

from __future__ import annotations

import references.dadapt
import references.prodigy
from algorithms import Algorithm

import torchopt


ROWS_OF_ESTIMATES = (
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
