"""The one table of algorithms, multiplied by the laws of the test files.

To put a new optimizer under every law, add one row to ``ALGORITHMS``. What is special about it
stands in the row (``Algorithm`` in ``algorithms.py`` says what can); no law knows a name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import closed_forms
import pytest
import references.adabelief
import references.lamb
import references.lars
import references.lion
import references.novograd
import references.sign_sgd
import references.sm3
import references.yogi
import torch
from algorithms import F64 as F64
from algorithms import Algorithm
from algorithms import Case as Case

import torchopt


ALGORITHMS = (
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
        torchopt.MetaRMSProp,
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
        flat=("gradients", "betas"),
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
        torchopt.sign_sgd,
        torchopt.SignSGD,
        torchopt.MetaSignSGD,
        None,
        {"": {"lr": 0.03}, "decay": {"lr": 0.02, "weight_decay": 0.3}},
        decoupled_decay=True,
        flat=("gradients",),
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
        flat=("gradients", "momentum"),
        reference=references.sign_sgd.signum,
        bounds={"momentum": ">= 0 and < 1"},
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
)

#: Those that take matrices only. The laws of arguments hold for them, and what else does is in the
#: file that the row names: trees of parameters have vectors, too.
MATRIX_ALGORITHMS = (
    Algorithm(
        torchopt.muon,
        torchopt.Muon,
        torchopt.MetaMuon,
        getattr(torch.optim, "Muon", None),
        {
            "": {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.8},
            "plain": {
                "lr": 0.1,
                "weight_decay": 0.05,
                "momentum": 0.6,
                "nesterov": False,
                "ns_coefficients": (3.0, -3.2, 1.2),
                "eps": 1e-5,
                "ns_steps": 3,
                "adjust_lr_fn": "match_rms_adamw",
            },
        },
        slots=("momentum_buffer",),
        size="tensor",
        fused=False,
        decoupled_decay=True,
        oracle="test_muon.py",
        bounds={"ns_coefficients": "any number", "eps": "> 0", "ns_steps": ">= 0 and < 100"},
    ),
)

CASES = tuple(case for algorithm in ALGORITHMS for case in algorithm.cases())


def named(name: str) -> Case:
    """Return a configuration by its name."""
    (found,) = (case for case in CASES if case.name == name)
    return found


# Decorators: a test runs for every row of a sort, and receives ``case`` or ``algorithm`` ----------


def rows(
    where: Callable[[Case], Any],
    each: Callable[[Case], Any] | None = None,
    beside_torch: bool = False,
) -> list[Any]:
    """Return the configurations that ``where`` holds of, as parameters of a test.

    With ``each`` ``make test`` runs only the first one for each of its values: for laws of the
    library's mechanisms, where a run takes long. ``beside_torch`` says that the test compares with
    the twin in torch.
    """
    found: list[Any] = []
    seen = set()
    for row in filter(where, CASES):
        marks = []
        if each is not None and each(row) in seen:
            marks.append(pytest.mark.thorough)
        seen.add(each and each(row))
        if beside_torch and row.algorithm.float64_scalars:
            marks.append(pytest.mark.float64_scalars)
        found.append(pytest.param(row, id=row.name, marks=marks))
    return found


def every(
    where: Callable[[Case], Any],
    each: Callable[[Case], Any] | None = None,
    beside_torch: bool = False,
) -> pytest.MarkDecorator:
    """Run a test for every configuration that ``where`` holds of; see :func:`rows`."""
    return pytest.mark.parametrize("case", rows(where, each, beside_torch))


def kind(case: Case) -> Any:
    """Tell configurations apart by what the library's mechanisms may tell them apart by."""
    return case.kind


def state_kind(case: Case) -> Any:
    """Tell them apart by what is in a state only: the compiler sees little else."""
    kind = case.kind
    return kind.has_slots, kind.has_counters, kind.uses_step, kind.other_shapes


every_case = every(lambda case: True)
#: For one configuration of each kind; ``make test-all`` runs all.
every_kind = every(lambda case: True, each=kind)
every_state = every(lambda case: True, each=state_kind)
#: Those that torch.optim has.
every_torch_case = every(lambda case: case.torch_cls, beside_torch=True)
#: Those with a differentiable face.
every_meta_case = every(lambda case: case.meta)
every_torch_meta_case = every(lambda case: case.meta and case.torch_cls, beside_torch=True)
every_meta_kind = every(lambda case: case.meta, each=kind)
#: Those that kernels compute.
every_fused_case = every(lambda case: case.algorithm.fused)
every_fused_kind = every(lambda case: case.algorithm.fused, each=kind)
every_fused_state = every(lambda case: case.algorithm.fused, each=state_kind)
#: Those whose rule treats each entry by itself.
every_entrywise_case = every(lambda case: case.algorithm.size == "entry")
#: Those that are known in closed form.
every_formula_case = every(lambda case: case.algorithm.formula)
#: Those that take dense gradients only, and the others.
every_dense_case = every(lambda case: not case.sparse)
every_sparse_case = every(lambda case: case.sparse)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
#: Those too that take matrices only.
every_row = pytest.mark.parametrize(
    "algorithm", ALGORITHMS + MATRIX_ALGORITHMS, ids=lambda a: a.name
)
#: Each algorithm with every other one; ``make test`` runs each with the next one of the table.
every_pair = pytest.mark.parametrize(
    ("algorithm", "other"),
    [
        pytest.param(
            a, b, id=f"{a.name}-{b.name}", marks=[] if b is following else [pytest.mark.thorough]
        )
        for a, following in zip(ALGORITHMS, [*ALGORITHMS[1:], ALGORITHMS[0]])
        for b in ALGORITHMS
        if b is not a
    ],
)
