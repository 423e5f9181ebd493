"""Rows of the table of algorithms (``cases.py``): those that keep matrices of each dimension."""

from __future__ import annotations

import functools
from typing import Any

import references.shampoo
import references.soap
import torch
from algorithms import Algorithm

import torchopt
from torchopt.optimizers.dimensions import DIMENSIONS, sizes_of


def of_dimensions(square: bool, *names: str) -> dict[str, Any]:
    """Return the shapes of slots that there are for each dimension."""

    def shape_of(shape: torch.Size, k: int) -> tuple[int, ...]:
        return sizes_of(shape)[k : k + 1] * (2 if square else 1)

    return {
        f"{name}_{k}": functools.partial(shape_of, k=k) for name in names for k in range(DIMENSIONS)
    }


#: What Shampoo keeps for each dimension of a tensor.
OF_SHAMPOO = {
    **of_dimensions(True, "preconditioner", "inverse_root"),
    **of_dimensions(False, "diagonal"),
}
#: What SOAP does, and what both do.
OF_SOAP = of_dimensions(True, "preconditioner", "basis")
PRECONDITIONERS = tuple(of_dimensions(True, "preconditioner"))


ROWS_OF_DIMENSIONS = (
    Algorithm(
        torchopt.shampoo,
        torchopt.Shampoo,
        torchopt.MetaShampoo,
        None,
        {
            "": {"lr": 0.05, "eps": 0.05},
            "delayed-momentum-decay": {
                "lr": 0.03,
                "momentum": 0.7,
                "weight_decay": 0.2,
                "eps": 0.1,
                "precondition_frequency": 2,
            },
            "short-vectors": {
                "lr": 0.05,
                "eps": 0.2,
                "max_preconditioner_dim": 5,
                "precondition_1d": True,
            },
        },
        slots=(*OF_SHAMPOO, "momentum_buffer"),
        shapes=OF_SHAMPOO,
        size="tensor",
        fused=False,
        forgets_start=True,
        definite=PRECONDITIONERS,
        occasional="precondition_frequency",
        reference=references.shampoo.shampoo,
        bounds={"eps": "> 0", "precondition_frequency": ">= 1", "max_preconditioner_dim": ">= 1"},
    ),
    Algorithm(
        torchopt.soap,
        torchopt.SOAP,
        torchopt.MetaSOAP,
        None,
        {
            "": {
                "lr": 0.03,
                "betas": (0.8, 0.9),
                "eps": 1e-4,
                "weight_decay": 0.2,
                "precondition_frequency": 3,
            },
            "vectors": {
                "lr": 0.08,
                "betas": (0.7, 0.8),
                # a gradient that comes twice has no part beside itself, and rounding over eps
                "eps": 0.1,
                "weight_decay": 0.3,
                "shampoo_beta": 0.6,
                "precondition_frequency": 1,
                "max_preconditioner_dim": 6,
                "precondition_1d": True,
            },
        },
        slots=("exp_avg", "exp_avg_sq", *OF_SOAP),
        shapes=OF_SOAP,
        size="tensor",
        fused=False,
        rests=1,
        forgets_start=True,
        definite=PRECONDITIONERS,
        occasional="precondition_frequency",
        bounds={
            "shampoo_beta": ">= 0 and < 1",
            "precondition_frequency": ">= 1",
            "max_preconditioner_dim": ">= 1",
        },
        reference=references.soap.soap,
    ),
)
