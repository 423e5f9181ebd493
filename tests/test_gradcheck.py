"""``gradcheck`` and ``gradgradcheck`` of every update in all its inputs, in float64.

The inputs are gradients, state slots, parameters and hyperparameters; the outputs are the updates
and the new slots. Reverse mode, forward mode and batched gradients are checked, twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import CASES, F64, Case, every_kind
from conftest import nonzero
from tolerances import GRADCHECK
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torchopt


pytestmark = pytest.mark.complete


Values = dict[str, Any]
Build = Callable[[Values], torchopt.GradientTransformation]


class UpdateAsFunction:
    """The update of two parameters as a function of a flat list of tensors, for ``gradcheck``."""

    def __init__(self, build: Build, hyper: Values, steps_before: int) -> None:
        self.build = build
        self.names = list(hyper)
        params = {"w": nonzero(2), "b": nonzero(1, 1)}
        tx = build(hyper)
        state = tx.init(params)
        for _ in range(steps_before):  # a state that the rule has made: v > 0 and v >= a^2
            _, state = tx.update(
                {k: nonzero(*p.shape) for k, p in params.items()}, state, params, inplace=False
            )
        if "max_exp_avg_sq" in state.slots:  # one maximum that rules, one that is overtaken
            maximum = {k: v * 0.5 for k, v in state.exp_avg_sq.items()}
            maximum["w"][1] = 8.0
            state.slots["max_exp_avg_sq"] = maximum
        if "accumulator" in state.slots:  # of which the least is taken: no two alike
            for key, kept in state.accumulator.items():
                state.slots["accumulator"][key] = kept * torch.linspace(0.9, 1.1, len(kept))
        self.step = state.step
        self.slots = [  # those of the initial state are constants
            (name, key)
            for name, slot in state.slots.items()
            for key, value in slot.items()
            if steps_before and value is not None
        ]
        slots = [state.slots[name][key] for name, key in self.slots]
        grads = [nonzero(2), nonzero(1, 1)]
        values = [torch.as_tensor(value, **F64) for value in hyper.values()]
        tensors = [*grads, params["w"], params["b"], *values, *slots]
        self.inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        grads, params, rest = self._pair(inputs), self._pair(inputs[2:]), inputs[4:]
        tx = self.build(dict(zip(self.names, rest)))
        state, slots = tx.init(params), rest[len(self.names) :]
        state.step = self.step
        for (name, key), slot in zip(self.slots, slots):
            state.slots[name][key] = slot
        updates, new = tx.update(grads, state, params, inplace=False)
        outputs = [*updates.values(), *(v for slot in new.slots.values() for v in slot.values())]
        return tuple(output for output in outputs if output is not None)

    @staticmethod
    def _pair(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"w": tensors[0], "b": tensors[1]}

    def check(self) -> None:
        outputs = self(*self.inputs)
        assert all(output.dtype == torch.float64 for output in outputs)
        assert any(output.requires_grad for output in outputs)
        assert gradcheck(
            self, self.inputs, check_forward_ad=True, check_batched_grad=True, **GRADCHECK
        )
        assert gradgradcheck(self, self.inputs, check_fwd_over_rev=True, **GRADCHECK)


@pytest.mark.sampled(4, each=0, by="family")
@pytest.mark.parametrize("steps_before", [0, 2], ids=["first-step", "third-step"])
@every_kind
def test_every_algorithm(case: Case, steps_before: int) -> None:
    values = {name: case.value(name) for name in case.tunable}
    if "eps" in values:
        values["eps"] = max(values["eps"], 1e-2)
    build = case.tx
    if case.algorithm.may_rest:
        steps_before = min(steps_before, 1)  # the second update may put it at a corner
        # kernels say nothing of a derivative that is zero, and gradgradcheck counts what is said
        build = functools.partial(case.tx, use_accelerated_op=False)
    elif case.flat("gradients") and not torchopt.accelerated_op_available("cpu"):
        pytest.skip("gradgradcheck leaves out a derivative that a rule says is zero")
    UpdateAsFunction(build, values, steps_before).check()


def parts_of_pair(values: Values) -> tuple[Any, Any]:
    return values["beta1"], values["beta2"]


def at_even_calls(count: int) -> bool:
    return count % 2 == 0


ADAM = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-2}
TRANSFORMS: dict[str, tuple[Build, Values]] = {
    "trace": (lambda v: torchopt.trace(**v), {"momentum": 0.7, "dampening": 0.2}),
    "trace-nesterov": (lambda v: torchopt.trace(**v, nesterov=True), {"momentum": 0.7}),
    "scale_by_adam": (
        lambda v: torchopt.scale_by_adam(parts_of_pair(v), v["eps"], v["eps_root"]),
        ADAM | {"eps_root": 0.1},
    ),
    "scale_by_adam-amsgrad": (
        lambda v: torchopt.scale_by_adam(parts_of_pair(v), v["eps"], amsgrad=True),
        ADAM,
    ),
    "scale_by_rms": (lambda v: torchopt.scale_by_rms(**v), {"alpha": 0.8, "eps": 1e-2}),
    "scale_by_rms-initial-scale": (
        lambda v: torchopt.scale_by_rms(**v, initial_scale=0.5),
        {"alpha": 0.8, "eps": 1e-2},
    ),
    "scale_by_stddev": (lambda v: torchopt.scale_by_stddev(**v), {"alpha": 0.8, "eps": 1e-2}),
    "add_decayed_weights": (lambda v: torchopt.add_decayed_weights(**v), {"weight_decay": 0.3}),
    "add_decayed_weights-mask": (
        lambda v: torchopt.add_decayed_weights(**v, mask={"w": True, "b": False}),
        {"weight_decay": 0.3},
    ),
    "scale": (lambda v: torchopt.scale(**v), {"step_size": -0.4}),
    # gradcheck counts outputs without the constant ones, which come last therefore
    "set_to_zero": (
        lambda v: torchopt.chain(
            torchopt.scale(**v), torchopt.masked(torchopt.set_to_zero(), {"w": False, "b": True})
        ),
        {"step_size": -0.4},
    ),
    "freeze": (
        lambda v: torchopt.chain(torchopt.scale(**v), torchopt.freeze({"w": False, "b": True})),
        {"step_size": -0.4},
    ),
    "partition": (
        lambda v: torchopt.partition(
            {"fast": torchopt.scale(v["factor"]), "slow": torchopt.trace(v["momentum"])},
            {"w": "fast", "b": "slow"},
        ),
        {"factor": -0.4, "momentum": 0.7},
    ),
    "scale_by_learning_rate": (lambda v: torchopt.scale_by_learning_rate(**v), {"lr": 0.4}),
    "scale_by_learning_rate-by-name": (
        lambda v: torchopt.scale_by_learning_rate({"w": v["lr_w"], "b": v["lr_b"]}),
        {"lr_w": 0.4, "lr_b": 0.3},
    ),
    "scale_by_learning_rate-by-element": (
        lambda v: torchopt.scale_by_learning_rate({"w": v["lr_w"], "b": 0.2}),
        {"lr_w": torch.tensor([0.4, 0.5], **F64)},
    ),
    "scale_by_schedule": (
        lambda v: torchopt.scale_by_schedule(lambda count: v["a"] * v["r"] ** (count + 1)),
        {"a": 0.4, "r": 0.7},
    ),
    "schedule-linear": (
        lambda v: torchopt.scale_by_schedule(
            torchopt.schedules.linear(v["init"], v["end"], transition_steps=5)
        ),
        {"init": 0.4, "end": 0.1},
    ),
    "schedule-exponential-decay": (
        lambda v: torchopt.scale_by_schedule(
            torchopt.schedules.exponential_decay(v["init"], 0.7, transition_steps=2)
        ),
        {"init": 0.4},
    ),
    "flip_sign": (lambda v: torchopt.flip_sign(), {}),
    "identity": (lambda v: torchopt.identity(), {}),
    "nan_to_num": (lambda v: torchopt.nan_to_num(), {}),
    "register_hook": (lambda v: torchopt.register_hook(lambda g: None), {}),
    "clip_grad_value-inside": (lambda v: torchopt.clip_grad_value(**v), {"clip_value": 2.0}),
    "clip_grad_value-outside": (lambda v: torchopt.clip_grad_value(**v), {"clip_value": 0.1}),
    "masked": (
        lambda v: torchopt.masked(torchopt.trace(**v), {"w": True, "b": False}),
        {"momentum": 0.7, "dampening": 0.2},
    ),
    "masked-by-function": (
        lambda v: torchopt.masked(
            torchopt.scale(**v), lambda params: {key: key == "w" for key in params}
        ),
        {"step_size": 0.7},
    ),
    "chain": (
        lambda v: torchopt.chain(
            torchopt.clip_grad_norm(v["max_norm"]),
            torchopt.trace(v["momentum"]),
            torchopt.add_decayed_weights(v["weight_decay"]),
            torchopt.scale_by_learning_rate(v["lr"]),
        ),
        {"max_norm": 0.3, "momentum": 0.7, "weight_decay": 0.2, "lr": 0.5},
    ),
    **{
        f"clip_grad_norm-{order}": (
            lambda v, order=order: torchopt.clip_grad_norm(**v, norm_type=order),
            {"max_norm": 0.2},
        )
        for order in (0.5, 1.0, 1.5, 2.0, 3.0, math.inf)
    },
    "clip_grad_norm-inactive": (
        lambda v: torchopt.clip_grad_norm(v["max_norm"]),
        {"max_norm": 20.0},
    ),
    "clip_by_global_norm": (lambda v: torchopt.clip_by_global_norm(**v), {"max_norm": 0.2}),
    "clip_by_global_norm-inactive": (
        lambda v: torchopt.clip_by_global_norm(v["max_norm"]),
        {"max_norm": 20.0},
    ),
    "ema": (lambda v: torchopt.ema(**v), {"decay": 0.7}),
    "ema-biased": (lambda v: torchopt.ema(**v, debias=False), {"decay": 0.7}),
    "centralize": (lambda v: torchopt.centralize(), {}),
    "scale_by_trust_ratio": (
        lambda v: torchopt.scale_by_trust_ratio(**v),
        {"trust_coefficient": 0.7, "eps": 0.1},
    ),
    **{
        f"clip_by_block_rms-{size}": (lambda v: torchopt.clip_by_block_rms(**v), {"threshold": x})
        for size, x in (("active", 0.1), ("inactive", 20.0))
    },
    **{
        f"adaptive_grad_clip-{name}": (
            lambda v: torchopt.adaptive_grad_clip(**v),
            {"clipping": clipping, "eps": eps},
        )
        for name, clipping, eps in (
            ("active", 0.1, 1e-3),
            ("eps", 0.01, 9.0),
            ("inactive", 99.0, 1e-3),
        )
    },
    "zero_nans": (lambda v: torchopt.zero_nans(), {}),
    "keep_params_nonnegative": (
        lambda v: torchopt.chain(torchopt.scale(**v), torchopt.keep_params_nonnegative()),
        {"step_size": -0.7},
    ),
    "project": (
        lambda v: torchopt.chain(
            torchopt.scale(**v), torchopt.project(torchopt.projections.projection_l2_ball)
        ),
        {"step_size": -0.7},
    ),
    "project-each": (
        lambda v: torchopt.chain(
            torchopt.scale(v["step_size"]),
            torchopt.project(
                lambda x: torchopt.projections.projection_simplex(x, v["sum"]), each=True
            ),
        ),
        {"step_size": -0.7, "sum": 2.0},
    ),
    "stateless_with_tree_map": (
        lambda v: torchopt.stateless_with_tree_map(lambda u, p: u * v["factor"] + p.sin()),
        {"factor": 0.7},
    ),
    "lookahead": (
        lambda v: torchopt.lookahead(
            torchopt.sgd(v["lr"], momentum=v["momentum"]), 3, v["slow_step_size"]
        ),
        {"lr": 0.3, "momentum": 0.7, "slow_step_size": 0.4},
    ),
    "conditionally_transform": (
        lambda v: torchopt.conditionally_transform(torchopt.trace(**v), at_even_calls),
        {"momentum": 0.7},
    ),
    "conditionally_mask": (
        lambda v: torchopt.conditionally_mask(torchopt.trace(**v), at_even_calls),
        {"momentum": 0.7},
    ),
    "named_chain": (
        lambda v: torchopt.named_chain(
            ("first", torchopt.trace(v["one"])), ("second", torchopt.trace(v["two"]))
        ),
        {"one": 0.7, "two": 0.4},
    ),
    "inject_hyperparams": (
        lambda v: torchopt.inject_hyperparams(torchopt.sgd(**v)),
        {"lr": 0.3, "momentum": 0.7},
    ),
    "selective_transform": (
        lambda v: torchopt.selective_transform(
            torchopt.scale(**v), freeze_mask={"w": False, "b": True}
        ),
        {"step_size": -0.7},
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("steps_before", [0, 2], ids=["first-step", "third-step"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform(name: str, steps_before: int) -> None:
    build, values = TRANSFORMS[name]
    UpdateAsFunction(build, values, steps_before).check()


def test_every_public_transform_is_checked() -> None:
    """A transform must be in the table above, or be a part of an algorithm that has a row."""
    functions = {
        name: value.__module__
        for name, value in ((name, getattr(torchopt, name)) for name in dir(torchopt))
        if callable(value)
        and getattr(value, "__annotations__", {}).get("return") == "GradientTransformation"
    }
    files = {case.recipe.__module__ for case in CASES}
    others = {name for name, file in functions.items() if file not in files}
    assert {"trace", "masked", "chain"} <= others
    assert others - {name.split("-")[0] for name in TRANSFORMS} <= {
        *("muon", "scale_by_muon"),  # of matrices: test_muon.py
        *("MultiSteps", "apply_if_finite"),  # constant slots: test_occasional.py
        "stateless",  # a pair of functions, whose state is no slot: test_transforms_more.py
        *("polyak_sgd", "scale_by_polyak"),  # need the value of the loss: test_polyak.py
        *("noisy_sgd", "add_noise"),  # the noise is a constant: test_noisy_sgd.py
        *("sophia", "scale_by_sophia"),  # need an estimate: test_sophia.py
        "sam",  # needs gradients elsewhere: test_sam.py
        "reduce_on_plateau",  # needs the value of the loss: test_plateau.py
        "from_torch",  # has no derivative: test_from_torch.py
    }
