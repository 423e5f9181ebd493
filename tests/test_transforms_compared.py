"""Printing, comparing, hashing and copying transformations."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from cases import CASES, Case, every_case
from conftest import nonzero, nonzero_like
from running import double, not_bias, run
from tolerances import assert_close

import torchopt


def half_of_both(u: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A rule that pickles."""
    return (u + p) / 2


LINEAR = torchopt.schedules.linear(0.1, 0.0, 5)


TRANSFORMS = {
    "identity": (torchopt.identity, "chain()"),
    "scale": (lambda: torchopt.scale(-0.5), "Scale(step_size=-0.5)"),
    "scale-tensor": (
        lambda: torchopt.scale(torch.ones(3)),
        "Scale(step_size=float32[3])",
    ),
    "scale-tree": (
        lambda: torchopt.scale({"w": 1.0, "b": torch.ones(3)}),
        "Scale(step_size={'w': 1.0, 'b': float32[3]})",
    ),
    "scale_by_schedule": (
        lambda: torchopt.scale_by_schedule(LINEAR),
        f"ScaleBySchedule(step_size={LINEAR!r})",
    ),
    "scale_by_learning_rate": (
        lambda: torchopt.scale_by_learning_rate(0.1),
        "ScaleByLearningRate(lr=0.1)",
    ),
    "flip_sign": (torchopt.flip_sign, "FlipSign(maximize=True)"),
    "trace": (
        lambda: torchopt.trace(0.5, nesterov=True),
        "Trace(momentum=0.5, dampening=0.0, nesterov=True)",
    ),
    "add_decayed_weights": (
        lambda: torchopt.add_decayed_weights(0.1),
        "AddDecayedWeights(weight_decay=0.1)",
    ),
    "add_decayed_weights-mask": (
        lambda: torchopt.add_decayed_weights(0.1, {"w": True, "b": False}),
        "Masked(inner=AddDecayedWeights(weight_decay=0.1), mask={'w': True, 'b': False})",
    ),
    "clip_grad_norm": (
        lambda: torchopt.clip_grad_norm(1.0, math.inf),
        "ClipGradNorm(max_norm=1.0, norm_type=inf, error_if_nonfinite=False)",
    ),
    "clip_grad_value": (lambda: torchopt.clip_grad_value(1.0), "ClipGradValue(clip_value=1.0)"),
    "nan_to_num": (lambda: torchopt.nan_to_num(1.0), "NanToNum(nan=1.0, posinf=None, neginf=None)"),
    "masked": (
        lambda: torchopt.masked(torchopt.scale(0.0), not_bias),
        f"Masked(inner=Scale(step_size=0.0), mask={not_bias!r})",
    ),
    "partition": (
        lambda: torchopt.partition(
            {"a": torchopt.scale(0.5), "b": torchopt.set_to_zero()}, {"w": "a", "b": "b"}
        ),
        "Partition(transforms={'a': Scale(step_size=0.5), 'b': SetToZero()}, "
        "labels={'w': 'a', 'b': 'b'})",
    ),
    "set_to_zero": (torchopt.set_to_zero, "SetToZero()"),
    "freeze": (
        lambda: torchopt.freeze({"w": True, "b": False}),
        "Masked(inner=SetToZero(), mask={'w': True, 'b': False})",
    ),
    "register_hook": (lambda: torchopt.register_hook(double), f"RegisterHook(hook={double!r})"),
    "scale_by_adam": (
        lambda: torchopt.scale_by_adam((0.5, 0.75), amsgrad=True),
        "ScaleByAdam(betas=(0.5, 0.75), eps=1e-08, eps_root=0.0, amsgrad=True)",
    ),
    "scale_by_rms": (
        lambda: torchopt.scale_by_rms(0.5),
        "ScaleByRms(alpha=0.5, eps=1e-08, centered=False, initial_scale=0.0)",
    ),
    "scale_by_stddev": (
        lambda: torchopt.scale_by_stddev(0.5),
        "ScaleByRms(alpha=0.5, eps=1e-08, centered=True, initial_scale=0.0)",
    ),
    "ema": (lambda: torchopt.ema(0.5), "Ema(decay=0.5, debias=True)"),
    "centralize": (torchopt.centralize, "Centralize()"),
    "scale_by_trust_ratio": (
        lambda: torchopt.scale_by_trust_ratio(0.0, 0.5),
        "ScaleByTrustRatio(min_norm=0.0, trust_coefficient=0.5, eps=0.0)",
    ),
    "clip_by_global_norm": (
        lambda: torchopt.clip_by_global_norm(0.5),
        "ClipByGlobalNorm(max_norm=0.5)",
    ),
    "clip_by_block_rms": (
        lambda: torchopt.clip_by_block_rms(0.5),
        "ClipByBlockRms(threshold=0.5)",
    ),
    "adaptive_grad_clip": (
        lambda: torchopt.adaptive_grad_clip(0.5, dim=0),
        "AdaptiveGradClip(clipping=0.5, eps=0.001, dim=0)",
    ),
    "zero_nans": (torchopt.zero_nans, "ZeroNans()"),
    "keep_params_nonnegative": (torchopt.keep_params_nonnegative, "KeepParamsNonnegative()"),
    "project": (
        lambda: torchopt.project(torchopt.projections.projection_l1_ball),
        f"Project(projection={torchopt.projections.projection_l1_ball!r}, each=False)",
    ),
    "stateless_with_tree_map": (
        lambda: torchopt.stateless_with_tree_map(half_of_both),
        f"StatelessWithTreeMap(function={half_of_both!r})",
    ),
    "MultiSteps": (
        lambda: torchopt.MultiSteps(torchopt.scale(2.0), 3, False, torchopt.skip_not_finite),
        "Accumulate(inner=Scale(step_size=2.0), every=Every(k=3), use_grad_mean=False, "
        f"should_skip_update_fn={torchopt.skip_not_finite!r})",
    ),
    "conditionally_transform": (
        lambda: torchopt.conditionally_transform(torchopt.scale(2.0), bool),
        f"Conditionally(inner=Scale(step_size=2.0), calls=Calls(steps_at={bool!r}), passes=True)",
    ),
    "conditionally_mask": (
        lambda: torchopt.conditionally_mask(torchopt.scale(2.0), bool, True),
        f"ConditionallyOnValues(inner=Scale(step_size=2.0), function={bool!r}, passes=False)",
    ),
    "apply_if_finite": (
        lambda: torchopt.apply_if_finite(torchopt.scale(2.0), 3),
        "ApplyIfFinite(inner=Scale(step_size=2.0), max_consecutive_errors=3)",
    ),
    "lookahead": (
        lambda: torchopt.lookahead(torchopt.scale(2.0), 3),
        "Lookahead(inner=Scale(step_size=2.0), sync_period=3, slow_step_size=0.5, "
        "reset_state=False)",
    ),
    "named_chain": (
        lambda: torchopt.named_chain(("a", torchopt.scale(2.0))),
        "Named(name='a', inner=Scale(step_size=2.0))",
    ),
    "inject_hyperparams": (
        lambda: torchopt.inject_hyperparams(torchopt.scale(2.0)),
        "InjectHyperparams(inner=Scale(step_size=2.0))",
    ),
    "selective_transform": (
        lambda: torchopt.selective_transform(torchopt.scale(2.0), freeze_mask=not_bias),
        f"chain(Masked(inner=Scale(step_size=2.0), mask=_Not(mask={not_bias!r})), "
        f"Masked(inner=SetToZero(), mask={not_bias!r}))",
    ),
    "chain": (
        lambda: torchopt.chain(torchopt.scale(2.0), torchopt.flip_sign()),
        "chain(Scale(step_size=2.0), FlipSign(maximize=True))",
    ),
}


#: All of them, and every configuration of every algorithm.
MAKERS = {
    **{name: make for name, (make, _) in TRANSFORMS.items()},
    **{case.name: case.tx for case in CASES},
}
every_transform = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def test_every_exported_transform_is_in_the_table() -> None:
    recipes = {
        name
        for name in dir(torchopt)
        if callable(getattr(torchopt, name))
        and getattr(getattr(torchopt, name), "__module__", "").startswith("torchopt.transforms")
    } | {"scale_by_adam", "scale_by_rms", "scale_by_stddev", "chain"}
    recipes -= {"skip_not_finite"}  # no transformation, but what MultiSteps is given
    recipes -= {"per_example_global_norm_clip"}  # of batches of gradients: test_per_example.py
    recipes -= {"sam"}  # needs gradients elsewhere: test_sam.py
    recipes -= {"reduce_on_plateau"}  # needs the value of the loss: test_plateau.py
    recipes -= {"stateless"}  # a pair of functions, which keeps a tree: test_transforms_more.py
    assert recipes <= set(TRANSFORMS)


@pytest.mark.parametrize(("make", "shown"), TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_repr(make: Any, shown: str) -> None:
    assert repr(make()) == shown


@every_case
def test_repr_shows_every_number(case: Case) -> None:
    text = repr(case.tx())
    for name, value in case.kwargs.items():
        assert f"{name}={value!r}" in text


def test_repr_shows_schedules_and_tensors() -> None:
    tx = torchopt.adam(LINEAR, betas=(torch.tensor(0.5), 0.75))
    assert repr(tx) == (
        "chain(FlipSign(maximize=False), AddDecayedWeights(weight_decay=0.0), "
        "ScaleByAdam(betas=(tensor(0.5), 0.75), eps=1e-08, eps_root=0.0, amsgrad=False), "
        f"ScaleByLearningRate(lr={LINEAR!r}))"
    )


@every_transform
def test_equality_and_hash(make: Any) -> None:
    one, two = make(), make()
    assert one == two
    assert hash(one) == hash(two)
    assert len({one, two}) == 1
    assert one != torchopt.scale(123.0)
    assert (one == 3) is False


@every_transform
def test_equality_tells_every_transform_from_the_others(make: Any) -> None:
    equal = [name for name, other in MAKERS.items() if other() == make()]
    assert len(equal) == 1


@every_transform
@pytest.mark.parametrize("clone", ["pickle", "deepcopy", "copy"])
def test_copies_are_equal_and_work(make: Any, clone: str) -> None:
    tx = make()
    _ = tx.plan  # a plan made before must not get in the way
    if clone == "pickle":
        new = pickle.loads(pickle.dumps(tx))
    else:
        new = getattr(copy, clone)(tx)
    assert new == tx
    assert repr(new) == repr(tx)
    p = {"w": nonzero(2, 3), "b": nonzero(3)}
    grads = [nonzero_like(p) for _ in range(2)]
    expected, state = run(tx, p, grads)
    found, new_state = run(new, p, grads)
    assert_close(found, expected)
    assert_close(new_state.slots, state.slots)


@every_transform
def test_transformations_are_frozen(make: Any) -> None:
    tx = make()
    shown = repr(tx)
    for name in tx.__dataclass_fields__:
        with pytest.raises(AttributeError, match="cannot assign"):
            setattr(tx, name, 3)
    assert repr(tx) == shown


def test_tensors_compare_by_value_and_dtype() -> None:
    assert torchopt.scale(torch.ones(2)) == torchopt.scale(torch.ones(2))
    assert torchopt.scale(torch.ones(2)) != torchopt.scale(torch.zeros(2))
    assert torchopt.scale(torch.ones(2)) != torchopt.scale(torch.ones(2).double())
    assert torchopt.scale(torch.tensor(1.0)) != torchopt.scale(1.0)


def test_schedules_with_tensors_compare() -> None:
    def make(value: float) -> torchopt.GradientTransformation:
        return torchopt.sgd(torchopt.schedules.linear(torch.full((2,), value), 0.0, 5))

    assert make(1.0) == make(1.0)
    assert make(1.0) != make(2.0)
