"""What a step is called in a picture; those of every optimizer are in ``test_visual_graph.py``."""

from __future__ import annotations

from typing import Any

import pytest

import torchopt
from torchopt.visual.titles import optimizer_name


CHAINS: dict[str, Any] = {
    "ClipGradNorm + Adam": torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam()),
    "Adam + SGD": torchopt.chain(torchopt.adam(), torchopt.sgd()),
    "RMSprop + Scale": torchopt.chain(torchopt.scale_by_stddev(), torchopt.scale(-0.1)),
    "Adam": torchopt.chain(torchopt.scale_by_adam(), torchopt.scale_by_learning_rate(0.1)),
    "AdamW": torchopt.chain(torchopt.scale_by_adam(), torchopt.add_decayed_weights(0.1)),
    "Adam + ClipGradValue": torchopt.chain(
        torchopt.scale_by_adam(),
        torchopt.clip_grad_value(1.0),
        torchopt.add_decayed_weights(0.1),
    ),
    "SGD": torchopt.scale_by_learning_rate(0.1),
    "ClipGradNorm + SGD": torchopt.chain(
        torchopt.clip_grad_norm(1.0), torchopt.trace(0.9), torchopt.scale_by_learning_rate(0.1)
    ),
    # a learning rate inside of an optimizer; what stands behind it is another's without it
    "LARS": torchopt.lars(),
    "LARS + Adam": torchopt.chain(torchopt.lars(), torchopt.adam()),
    "LayerRate + SGD": torchopt.chain(torchopt.lars().parts[2], torchopt.trace(0.9)),
    "Schedule": torchopt.scale_by_schedule(lambda count: 0.1),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_named_after_the_optimizers_in_them(name: str) -> None:
    assert optimizer_name([type(part).__name__ for part in CHAINS[name].parts]) == name
