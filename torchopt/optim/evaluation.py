"""Swap the weights of a network for those to evaluate with, and back."""

from __future__ import annotations

import torch

from torchopt.core.engine import Call
from torchopt.core.evaluation import converted_call, evaluates
from torchopt.optim.protocols import HasGroups, OptimizerLike


#: In a parameter group: whether the parameters are those that are trained.
TRAIN_MODE = "train_mode"
#: In the state of a parameter: its value to train with, while it has the one to evaluate with.
TRAINED = "trained"


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
def swap_in_place(optimizer: OptimizerLike, call: Call, to_eval: bool) -> None:
    """Overwrite parameters with those to evaluate with, or with those to train.

    The latter are kept meanwhile, in the state: so the next step begins at the same bits as without
    an evaluation, and where there is no way back. States that were saved without them go it.
    """
    if is_training(optimizer) != to_eval or not evaluates(optimizer.transformation):
        return
    params, state = list(call.p), optimizer.state
    kept = [None if to_eval else state.get(p, {}).get(TRAINED) for p in params]
    call.p = [p if old is None else None for p, old in zip(params, kept)]
    converted = converted_call(optimizer.transformation, call, to_eval)
    found = [new if old is None else old for new, old in zip(converted, kept)]
    for p, new in zip(params, found):
        if new is not p:
            if to_eval:
                state[p][TRAINED] = p.clone()
            p.copy_(new)
            if not to_eval:
                state[p].pop(TRAINED, None)
    for group in optimizer.param_groups:
        group[TRAIN_MODE] = not to_eval
