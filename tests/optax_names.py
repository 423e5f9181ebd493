"""What the optimizers and transformations of Optax and their arguments are called here.

``TABLE`` says it, and where the definitions differ; :func:`translated` reads a call in the names of
Optax by it. ``LEFT_OUT`` has what is held elsewhere, or cannot be.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

import torchopt


F64 = torch.float64


# What is called what ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """What a function of Optax is here.

    Attributes:
        ours: Its name here, if that is another one.
        names: What its arguments are called here where ``COMMON`` does not say; ``betas.0`` is the
            first entry of a tuple.
        changed: Arguments whose values mean something else, with what makes ours of them.
        only: Arguments that there are none of here, with the value for which it is the same.
        always: Arguments that Optax has not, with the value for which it is the same.
        differs: How the definitions differ: ``only`` and ``always`` are the cure, and the docstring
            says it, too.
        dtype: How exactly Optax computes it, or how well it can be the same.
        listed: Whether its parts are given without names.
    """

    ours: str = ""
    _: dataclasses.KW_ONLY
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    changed: dict[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    only: dict[str, Any] = dataclasses.field(default_factory=dict)
    always: dict[str, Any] = dataclasses.field(default_factory=dict)
    differs: str = ""
    dtype: torch.dtype = torch.float64
    listed: bool = False


COMMON = {"learning_rate": "lr", "b1": "betas.0", "b2": "betas.1", "b3": "betas.2"}
COMMON |= {"weight_decay_mask": "mask", "decay": "momentum"}
EPS_INSIDE = "eps is inside the root there and outside here: at 0 they are the same"
NO_PROX = "the authors divide by 1 + lr weight_decay, which is no_prox=False"
ADAN_BETAS = "1 - b2 multiplies differences there and b2 here: at 0.5 they are the same"
MUON = {
    "names": {
        "beta": "momentum",
        "ns_coeffs": "ns_coefficients",
        "consistent_rms": "adjust_lr_fn",
    },
    "only": {
        "eps": 0.0,
        "weight_dimension_numbers": {"w": (1, 0)},
        "muon_weight_dimension_numbers": {"w": (1, 0)},
    },
    "changed": {"consistent_rms": {0.2: "match_rms_adamw"}.__getitem__},
    "always": {"eps": 1e-300, "ns_dtype": F64},
    "differs": "eps is added to the norm there and its floor here; matrices lie the other way "
    "round; the momentum is corrected there, which shows with nesterov=True only",
}
ROOT_OF_MOMENT = {
    "only": {"eps_in_sqrt": False},
    "names": {"decay": "alpha"},
    "differs": "its eps_in_sqrt=True is what is not here",
}

TABLE = {
    # optimizers
    "sgd": Row(),
    "adam": Row(),
    "adamw": Row(),
    "nadam": Row(
        always={"momentum_decay": 1e9},
        differs="the momentum of torch grows with the steps, there it is constant: it is once "
        "momentum_decay is great",
    ),
    "nadamw": Row(
        "nadam",
        always={"momentum_decay": 1e9, "decoupled_weight_decay": True},
        differs="as nadam",
    ),
    "adamax": Row(),
    "radam": Row(
        only={"eps": 0.0},
        always={"eps": 0.0},
        differs="eps is added to the root of the corrected moment there: at 0 they are the same",
    ),
    "rmsprop": Row(
        names={"decay": "alpha"},
        only={"eps_in_sqrt": False},
        differs="its eps_in_sqrt=True is what is not here",
    ),
    "adagrad": Row(only={"eps": 0.0}, always={"eps": 0.0}, differs=EPS_INSIDE),
    "adadelta": Row(),
    "adafactor": Row(
        names={"decay_rate": "beta2_decay", "clipping_threshold": "d"},
        changed={"decay_rate": lambda rate: -rate},
        only={"min_dim_size_to_factor": 1, "eps": 0.0},
        always={"eps": (1e-300, 1e-3)},
        differs="lr is bounded by 1 / sqrt(t) here, eps is added to squares there; few dimensions "
        "are factored by default. The power of the step count is in float32 there",
        dtype=torch.float32,
    ),
    "adabelief": Row(),
    "adan": Row(
        only={"b2": 0.5, "eps_root": 0.0},
        always={"betas.1": 0.5, "no_prox": True},
        differs=f"{ADAN_BETAS}; {NO_PROX}; eps_root is 1e-8 there",
    ),
    "ademamix": Row(only={"eps_root": 0.0}),
    "adopt": Row(),
    "lion": Row(),
    "lamb": Row(),
    "lars": Row(),
    "yogi": Row(),
    "novograd": Row(),
    "sm3": Row(),
    "sign_sgd": Row(),
    "signum": Row(names={"beta": "momentum"}),
    "optimistic_gradient_descent": Row(),
    "polyak_sgd": Row(
        only={"scaling": 1.0},
        always={"lr": 1.0},
        differs="the norm there is that of the gradient times scaling, here of the gradient",
    ),
    "prodigy": Row(),
    "dadapt_adamw": Row(),
    "schedule_free_sgd": Row(names={"b1": "momentum"}),
    "schedule_free_adamw": Row(),
    "muon": Row(**MUON),
    # transformations
    "scale_by_adam": Row(),
    "scale_by_adamax": Row(),
    "scale_by_radam": Row(
        only={"eps": 0.0}, always={"eps": 0.0}, differs="as radam: where eps is added"
    ),
    "scale_by_rms": Row(**ROOT_OF_MOMENT),
    "scale_by_stddev": Row(**ROOT_OF_MOMENT),
    "scale_by_rss": Row(only={"eps": 0.0}, always={"eps": 0.0}, differs=EPS_INSIDE),
    "scale_by_adadelta": Row(),
    "scale_by_belief": Row(),
    "scale_by_yogi": Row(),
    "scale_by_adan": Row(only={"b2": 0.5}, always={"betas.1": 0.5}, differs=ADAN_BETAS),
    "scale_by_ademamix": Row(),
    "scale_by_adopt": Row(),
    "scale_by_lion": Row(),
    "scale_by_novograd": Row(),
    "scale_by_sm3": Row(names={"b1": "momentum"}),
    "scale_by_sign": Row(),
    "scale_by_optimistic_gradient": Row(),
    "scale_by_polyak": Row(),
    "scale_by_trust_ratio": Row(),
    "scale_by_muon": Row(**MUON),
    "scale_by_learning_rate": Row(),
    "scale_by_schedule": Row(),
    "scale": Row(listed=True),
    "trace": Row(),
    "ema": Row(names={"decay": "decay"}),
    "add_decayed_weights": Row(),
    "centralize": Row(),
    "clip_by_block_rms": Row(),
    "clip_by_global_norm": Row(),
    "clip": Row("clip_grad_value", names={"max_delta": "clip_value"}),
    "adaptive_grad_clip": Row(
        names={"axis": "dim"},
        always={"dim": 0},
        differs="matrices lie the other way round: there the units are in the last dimension",
    ),
    "keep_params_nonnegative": Row(),
    "zero_nans": Row(),
    "identity": Row(),
    "reduce_on_plateau": Row(),
    # wrappers
    "chain": Row(listed=True),
    "named_chain": Row(listed=True),
    "masked": Row(),
    "freeze": Row(),
    "selective_transform": Row(),
    "partition": Row(names={"param_labels": "labels"}),
    "set_to_zero": Row(),
    "MultiSteps": Row(),
    "apply_if_finite": Row(),
    "lookahead": Row(differs="parameters are a pair of fast and slow ones there"),
    # numbers
    "linear_schedule": Row(),
    "polynomial_schedule": Row(),
}

#: What Optax has, too, and why nothing of it is in the file.
LEFT_OUT = {
    "rprop": "Optax 0.2.8 moves by the update of the step before; tests/test_rprop.py, torch.optim",
    "noisy_sgd": "the noise is another one; tests/test_noisy_sgd.py",
    "add_noise": "the noise is another one; tests/test_noisy_sgd.py",
    "sophia": "Optax estimates the curvature itself; tests/test_sophia.py gives it to both",
    "sam": "what perturbs is an optimizer there; tests/test_sam.py",
    "inject_hyperparams": "changes no value; tests/test_named_values.py",
    "conditionally_mask": "takes a function of the user's; tests/test_occasional.py",
    "conditionally_transform": "takes a function of the user's; tests/test_occasional.py",
    "stateless": "takes a function of the user's; tests/test_transforms.py",
    "stateless_with_tree_map": "takes a function of the user's; tests/test_transforms.py",
    "skip_not_finite": "is given to MultiSteps; tests/test_occasional.py",
    "per_example_global_norm_clip": "is no transformation; tests/test_per_example.py",
    "apply_updates": "is what takes every step here",
}


# Its calls in our names ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of ours: what is called, and with what, calls among it."""

    recipe: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def built(self) -> Any:
        """Return what the calls inside give, and then this one."""
        kwargs = {name: built(value) for name, value in self.kwargs.items()}
        return self.recipe(*built(self.args), **kwargs)


def built(value: Any) -> Any:
    """Return a value with its calls made."""
    if isinstance(value, Call):
        return value.built()
    if isinstance(value, dict):
        return {name: built(part) for name, part in value.items()}
    return tuple(map(built, value)) if isinstance(value, tuple) else value


def put(kwargs: dict[str, Any], name: str, value: Any, recipe: Any) -> None:
    """Set an argument, or an entry of one that is a tuple."""
    name, _, place = name.partition(".")
    if place:
        entries = list(kwargs.get(name, inspect.signature(recipe).parameters[name].default))
        entries[int(place)] = value
        value = tuple(entries)
    kwargs[name] = value


def ours(name: str) -> Callable[..., Call]:
    """Return a function with Optax's arguments that returns our call."""
    row = TABLE[name]
    recipe = getattr(torchopt, row.ours or name, None) or getattr(torchopt.schedules, name)

    def call(*args: Any, **theirs: Any) -> Call:
        assert row.listed or not args, f"{name}: arguments by name, please"
        kwargs: dict[str, Any] = {}
        for argument, value in row.always.items():
            put(kwargs, argument, value, recipe)
        for argument, value in theirs.items():
            if argument in row.only:
                assert value == row.only[argument], f"{name}: {argument} is another one here"
                continue
            value = row.changed[argument](value) if argument in row.changed else value
            put(kwargs, row.names.get(argument, COMMON.get(argument, argument)), value, recipe)
        return Call(recipe, args, kwargs)

    return call


NAMES: dict[str, Any] = {name: ours(name) for name in TABLE}
NAMES["MuonDimensionNumbers"] = lambda *axes: axes


def translated(call: str) -> Call:
    return eval(call, {"__builtins__": {}, **NAMES})
