"""The one table of algorithms, multiplied by the laws of the test files.

To put a new optimizer under every law, add one row: to ``rows_of_torch.py``, to
``rows_of_papers.py`` or to ``rows_of_dimensions.py``. What is special about it stands in the row
(``Algorithm`` in ``algorithms.py`` says what can); no law knows a name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from algorithms import F64 as F64
from algorithms import Algorithm
from algorithms import Case as Case
from rows_of_dimensions import ROWS_OF_DIMENSIONS
from rows_of_estimates import ROWS_OF_ESTIMATES
from rows_of_papers import ROWS_OF_PAPERS
from rows_of_torch import ROWS_OF_TORCH

import torchopt


ALGORITHMS = ROWS_OF_TORCH + ROWS_OF_PAPERS + ROWS_OF_DIMENSIONS + ROWS_OF_ESTIMATES

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

#: Those that need the value of the loss at each step: the laws of arguments hold for them, too.
VALUE_ALGORITHMS = (
    Algorithm(
        torchopt.polyak_sgd,
        torchopt.PolyakSGD,
        torchopt.MetaPolyakSGD,
        None,
        {"": {"lr": 0.7, "max_learning_rate": 0.8, "f_min": 0.1, "eps": 0.2, "variant": "sps+"}},
        size="all",
        fused=False,
        oracle="test_polyak.py",
        bounds={"max_learning_rate": ">= 0", "f_min": "any number"},
    ),
)

#: Those that move a parameter by its name, too: two parameters that are alike move apart.
NOISY_ALGORITHMS = (
    Algorithm(
        torchopt.noisy_sgd,
        torchopt.NoisySGD,
        torchopt.MetaNoisySGD,
        None,
        {"": {"lr": 0.05, "eta": 0.3, "gamma": 0.8, "seed": 5}},
        fused=False,
        oracle="test_noisy_sgd.py",
        bounds={"eta": ">= 0", "gamma": ">= 0", "seed": ">= 0 and < 4294967296"},
    ),
)

#: Those that are given an estimate of the curvature at some steps; without it they know signs only.
CURVATURE_ALGORITHMS = (
    Algorithm(
        torchopt.sophia,
        torchopt.Sophia,
        torchopt.MetaSophia,
        None,
        {
            "": {
                "lr": 0.05,
                "betas": (0.8, 0.7),
                "eps": 0.05,
                "weight_decay": 0.1,
                "gamma": 0.9,
                "clip_threshold": 1.4,
            }
        },
        slots=("exp_avg", "hessian"),
        decoupled_decay=True,
        oracle="test_sophia.py",
        bounds={"gamma": ">= 0", "clip_threshold": ">= 0"},
    ),
)

#: What the general laws do not hold of.
SPECIAL_ALGORITHMS = MATRIX_ALGORITHMS + VALUE_ALGORITHMS + NOISY_ALGORITHMS + CURVATURE_ALGORITHMS

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


def any_case(case: Case) -> None:
    """Tell none apart: one is enough for ``make test``, where each takes seconds."""


def state_kind(case: Case) -> Any:
    """Tell them apart by what is in a state only: the compiler sees little else."""
    kind = case.kind
    return kind.has_slots, kind.has_counters, kind.uses_step, kind.other_shapes


every_case = every(lambda case: True)
#: For one configuration of each kind; ``make test-all`` runs all.
every_kind = every(lambda case: True, each=kind)
#: For one of each family, where that takes long.
every_family = every(lambda case: True, each=lambda case: case.family)
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
#: Those that treat each parameter by itself.
every_independent_case = every(lambda case: case.algorithm.size != "all")
#: Those that are known in closed form.
every_formula_case = every(lambda case: case.algorithm.formula)
#: Those that take dense gradients only, and the others.
every_dense_case = every(lambda case: not case.sparse)
every_sparse_case = every(lambda case: case.sparse)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
#: Those too that the general laws do not hold of.
every_row = pytest.mark.parametrize(
    "algorithm", ALGORITHMS + SPECIAL_ALGORITHMS, ids=lambda a: a.name
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
