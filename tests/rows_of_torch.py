"""Rows of the table of algorithms (``cases.py``): those that ``torch.optim`` has."""

from __future__ import annotations

import closed_forms
import torch
from algorithms import Algorithm

import torchopt


ROWS_OF_TORCH = (
    Algorithm(
        torchopt.sgd,
        torchopt.SGD,
        torchopt.MetaSGD,
        torch.optim.SGD,
        {
            "": {"lr": 0.05},
            "momentum-dampening-decay": {
                "lr": 0.05,
                "momentum": 0.7,
                "dampening": 0.3,
                "weight_decay": 0.1,
            },
            "nesterov": {"lr": 0.04, "momentum": 0.8, "nesterov": True},
        },
        slots=("momentum_buffer",),
        linear=True,
        sparse=True,
        formula=closed_forms.SGD,
    ),
    Algorithm(
        torchopt.adam,
        torchopt.Adam,
        torchopt.MetaAdam,
        torch.optim.Adam,
        {
            "": {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-8},
            "amsgrad-decay": {
                "lr": 0.03,
                "betas": (0.8, 0.7),
                "eps": 1e-3,
                "weight_decay": 0.1,
                "amsgrad": True,
            },
            "eps-root": {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "eps_root": 1e-2},
        },
        slots=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        formula=closed_forms.ADAM,
    ),
    Algorithm(
        torchopt.adamw,
        torchopt.AdamW,
        torchopt.MetaAdamW,
        torch.optim.AdamW,
        {"": {"lr": 0.03, "betas": (0.75, 0.9), "eps": 1e-8, "weight_decay": 0.2}},
        slots=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        decoupled_decay=True,
        formula=closed_forms.ADAM,
    ),
    Algorithm(
        torchopt.rmsprop,
        torchopt.RMSprop,
        torchopt.MetaRMSprop,
        torch.optim.RMSprop,
        {
            "": {"lr": 0.02, "alpha": 0.9, "eps": 1e-8},
            "centered-momentum-decay": {
                "lr": 0.02,
                "alpha": 0.8,
                "eps": 1e-2,
                "weight_decay": 0.1,
                "momentum": 0.6,
                "centered": True,
            },
        },
        slots=("square_avg", "grad_avg", "momentum_buffer"),
        formula=closed_forms.RMSPROP,
        fixed=("initial_scale",),
    ),
    Algorithm(
        torchopt.nadam,
        torchopt.NAdam,
        torchopt.MetaNAdam,
        torch.optim.NAdam,
        {
            "": {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-8, "momentum_decay": 0.02},
            "decoupled": {
                "lr": 0.03,
                "betas": (0.75, 0.9),
                "eps": 1e-4,
                "weight_decay": 0.1,
                "momentum_decay": 0.01,
                "decoupled_weight_decay": True,
            },
        },
        slots=("exp_avg", "exp_avg_sq"),
        bounds={"momentum_decay": ">= 0"},
        float64_scalars=True,
    ),
    Algorithm(
        torchopt.adagrad,
        torchopt.Adagrad,
        torchopt.MetaAdagrad,
        torch.optim.Adagrad,
        {
            "": {"lr": 0.1, "eps": 1e-8},
            "rate-decay-start": {
                "lr": 0.1,
                "lr_decay": 0.3,
                "weight_decay": 0.1,
                "initial_accumulator_value": 0.2,
                "eps": 1e-2,
            },
        },
        slots=("sum",),
        sparse=True,
        formula=closed_forms.ADAGRAD,
        bounds={"lr_decay": ">= 0", "initial_accumulator_value": ">= 0"},
        of_all_groups=("initial_accumulator_value",),
    ),
    Algorithm(
        torchopt.adamax,
        torchopt.Adamax,
        torchopt.MetaAdamax,
        torch.optim.Adamax,
        {
            "": {"lr": 0.05, "betas": (0.8, 0.8), "eps": 1e-3},
            "decay": {"lr": 0.04, "betas": (0.75, 0.8), "eps": 1e-2, "weight_decay": 0.1},
        },
        slots=("exp_avg", "exp_inf"),
        formula=closed_forms.ADAMAX,
    ),
    Algorithm(
        torchopt.adadelta,
        torchopt.Adadelta,
        torchopt.MetaAdadelta,
        torch.optim.Adadelta,
        {
            "": {"lr": 0.8, "rho": 0.8, "eps": 1e-2},
            "decay": {"lr": 0.9, "rho": 0.7, "eps": 3e-2, "weight_decay": 0.1},
        },
        slots=("square_avg", "acc_delta"),
        formula=closed_forms.ADADELTA,
        bounds={"rho": ">= 0 and <= 1"},
    ),
    Algorithm(
        torchopt.radam,
        torchopt.RAdam,
        torchopt.MetaRAdam,
        torch.optim.RAdam,
        {
            "": {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-8},
            "decoupled": {
                "lr": 0.03,
                "betas": (0.75, 0.94),
                "eps": 1e-2,
                "weight_decay": 0.1,
                "decoupled_weight_decay": True,
            },
        },
        slots=("exp_avg", "exp_avg_sq"),
        settled=8,
    ),
    Algorithm(
        torchopt.adafactor,
        torchopt.Adafactor,
        torchopt.MetaAdafactor,
        torch.optim.Adafactor,
        {
            "": {"lr": 0.05, "beta2_decay": -0.7},
            # the size of parameters is below its floor, and that of updates above its bound
            "floor-clipped-decay": {
                "lr": 0.9,
                "beta2_decay": -0.5,
                "eps": (None, 1.5),
                "d": 1.02,
                "weight_decay": 0.1,
            },
        },
        slots=("row_var", "col_var", "variance"),
        shapes={
            "row_var": lambda shape: (*shape[:-1], 1),
            "col_var": lambda shape: (*shape[:-2], 1, *shape[-1:]),
        },
        size="tensor",
        fused=False,
        needs_params=True,
        forgets_start=True,
        bounds={"beta2_decay": "<= 0", "d": ">= 1"},
    ),
    Algorithm(
        torchopt.rprop,
        torchopt.Rprop,
        torchopt.MetaRprop,
        torch.optim.Rprop,
        {
            "": {"lr": 0.5, "etas": (0.6, 1.3)},
            "bounded": {"lr": 0.3, "step_sizes": (0.21, 0.33)},
        },
        slots=("prev", "step_size"),
        flat=("gradients",),
        in_places=("etas", "step_sizes"),
        read_once=("lr",),
        may_rest=True,
        bounds={"etas": ("> 0 and < 1", "> 1"), "step_sizes": ">= 0"},
    ),
    Algorithm(
        torchopt.asgd,
        torchopt.ASGD,
        torchopt.MetaASGD,
        torch.optim.ASGD,
        {
            "": {"lr": 0.1, "lambd": 0.3, "alpha": 0.6, "t0": 0.6},
            "late-decay": {"lr": 0.1, "lambd": 0.2, "alpha": 0.9, "t0": 1.4, "weight_decay": 0.1},
        },
        slots=("ax",),
        needs_params=True,
        decays=("weight_decay", "lambd"),
        linear=True,
        flat=("t0", "slots"),
        bounds={"lambd": ">= 0", "alpha": ">= 0", "t0": ">= 0"},
        float64_scalars=True,
    ),
)
