"""Swap the weights of a network for those to evaluate with, and back."""

from __future__ import annotations

import torch

from torchopt.core.engine import Call
from torchopt.core.evaluation import converted_call, evaluates
from torchopt.optim.protocols import HasGroups


#: In a parameter group: whether the parameters are those that are trained.
TRAIN_MODE = "train_mode"


def is_training(optimizer: HasGroups) -> bool:
    """Whether the parameters are those that are trained."""
    return all(group.get(TRAIN_MODE, True) for group in optimizer.param_groups)


def refuse_step(optimizer: HasGroups) -> None:
    """Refuse a step at weights that are for evaluation.

    Raises:
        RuntimeError: Saying what to call first.
    """
    if not is_training(optimizer):
        raise RuntimeError(
            f"The weights are those to evaluate with, since {type(optimizer).__name__}.eval() was "
            "called; call optimizer.train() before the forward pass of a step."
        )


@torch.no_grad()
def swap_in_place(optimizer: HasGroups, call: Call, to_eval: bool) -> None:
    """Overwrite parameters with those to evaluate with, or with those to train."""
    if is_training(optimizer) != to_eval or not evaluates(optimizer.transformation):
        return
    found = converted_call(optimizer.transformation, call, to_eval)
    for p, new in zip(call.p, found):
        if new is not p:
            p.copy_(new)
    for group in optimizer.param_groups:
        group[TRAIN_MODE] = not to_eval
