"""The one table of algorithms: a row per configuration, multiplied by the laws of the test files.

To put a new optimizer under every law, add one row to ``CASES``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import torchopt


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One algorithm in one configuration, under all the names it has.

    Attributes:
        name: The id of the row in test names.
        recipe: The functional face, ``torchopt.adam``.
        cls: The object-oriented face, ``torchopt.Adam``.
        meta: The differentiable face, ``torchopt.MetaAdam``.
        torch_cls: The class of ``torch.optim`` that does the same, or ``None``.
        kwargs: Every argument, as numbers. Values are not the defaults, so that each one matters.
        tunable: The hyperparameters that are differentiable numbers; ``"betas.0"`` is the first
            of the pair ``betas``.
    """

    name: str
    recipe: Callable[..., torchopt.GradientTransformation]
    cls: type[torchopt.Optimizer]
    meta: type[torchopt.MetaOptimizer]
    torch_cls: type[torch.optim.Optimizer] | None
    kwargs: dict[str, Any]
    tunable: tuple[str, ...]

    def value(self, name: str) -> float:
        """Return the number that the row gives to one of ``tunable``."""
        field, _, index = name.partition(".")
        value = self.kwargs[field]
        return value[int(index)] if index else value

    def arguments(self, changed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the arguments with some of ``tunable`` replaced: ``{"betas.0": tensor}``."""
        arguments = dict(self.kwargs)
        for name, value in (changed or {}).items():
            field, _, index = name.partition(".")
            if index:
                pair = list(arguments[field])
                pair[int(index)] = value
                value = tuple(pair)
            arguments[field] = value
        return arguments

    def tx(self, changed: Mapping[str, Any] | None = None) -> torchopt.GradientTransformation:
        """Return the transformation, with some of ``tunable`` replaced."""
        return self.recipe(**self.arguments(changed))

    def tensors(self, **options: Any) -> dict[str, torch.Tensor]:
        """Return every one of ``tunable`` as a float64 tensor of its own."""
        return {name: torch.tensor(self.value(name), **F64, **options) for name in self.tunable}


F64 = {"dtype": torch.float64}
_SGD = (torchopt.sgd, torchopt.SGD, torchopt.MetaSGD, torch.optim.SGD)
_ADAM = (torchopt.adam, torchopt.Adam, torchopt.MetaAdam, torch.optim.Adam)
_ADAMW = (torchopt.adamw, torchopt.AdamW, torchopt.MetaAdamW, torch.optim.AdamW)
_RMSPROP = (torchopt.rmsprop, torchopt.RMSprop, torchopt.MetaRMSProp, torch.optim.RMSprop)
_BETAS = ("betas.0", "betas.1")

CASES = (
    Case("sgd", *_SGD, {"lr": 0.05}, ("lr",)),
    Case(
        "sgd-momentum-dampening-decay",
        *_SGD,
        {"lr": 0.05, "momentum": 0.7, "dampening": 0.3, "weight_decay": 0.1},
        ("lr", "momentum", "dampening", "weight_decay"),
    ),
    Case(
        "sgd-nesterov",
        *_SGD,
        {"lr": 0.04, "momentum": 0.8, "nesterov": True},
        ("lr", "momentum"),
    ),
    Case(
        "adam",
        *_ADAM,
        {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-8},
        ("lr", *_BETAS, "eps"),
    ),
    Case(
        "adam-amsgrad-decay",
        *_ADAM,
        {"lr": 0.03, "betas": (0.8, 0.7), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True},
        ("lr", *_BETAS, "eps", "weight_decay"),
    ),
    Case(
        "adam-eps-root",
        *_ADAM[:3],
        None,  # torch.optim.Adam has no eps_root
        {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "eps_root": 1e-2},
        ("lr", *_BETAS, "eps", "eps_root"),
    ),
    Case(
        "adamw",
        *_ADAMW,
        {"lr": 0.03, "betas": (0.75, 0.9), "eps": 1e-8, "weight_decay": 0.2},
        ("lr", *_BETAS, "eps", "weight_decay"),
    ),
    Case(
        "rmsprop",
        *_RMSPROP,
        {"lr": 0.02, "alpha": 0.9, "eps": 1e-8},
        ("lr", "alpha", "eps"),
    ),
    Case(
        "rmsprop-centered-momentum-decay",
        *_RMSPROP,
        {
            "lr": 0.02,
            "alpha": 0.8,
            "eps": 1e-2,
            "weight_decay": 0.1,
            "momentum": 0.6,
            "centered": True,
        },
        ("lr", "alpha", "eps", "weight_decay", "momentum"),
    ),
)

TORCH_CASES = tuple(case for case in CASES if case.torch_cls is not None)

#: Decorators: run a test for every row (that torch.optim has); it receives ``case``.
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_torch_case = pytest.mark.parametrize("case", TORCH_CASES, ids=lambda case: case.name)
