"""The sides that can be measured."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.install_peers import python_of
from benchmarks.pairing import Side


HERE = Path(sys.executable)
#: The side whose results are those that all others are compared with.
OURS = "torchopt"
#: Side -> the environment that it needs.
ENVIRONMENT_OF = {"higher": "higher", "torchopt-0.7.3": "torchopt073", "optax": "jax"}
SIDES = {
    side.name: side
    for side in (
        Side(OURS, "torchopt_now", HERE),
        Side("torchopt unfused", "torchopt_unfused", HERE),
        Side("torchopt, a number", "torchopt_number", HERE, same_work=False),
        Side("floor", "floor", HERE, same_work=False),
        Side("empty node", "empty_node", HERE, same_work=False),
        Side("torch fused", "torch_fused", HERE),
        Side("torch foreach", "torch_foreach", HERE),
        Side("copy", "plain_copy", HERE, same_work=False),
        Side("higher", "higher_peer", python_of("higher")),
        Side("torchopt-0.7.3", "torchopt_073", python_of("torchopt073")),
        Side("optax", "optax_peer", python_of("jax")),
    )
}


def how_to_install(name: str) -> str:
    """Return the command that makes a side's environment."""
    return f"python -m benchmarks.install_peers {ENVIRONMENT_OF.get(name, '')}".rstrip()


def variant(name: str, folder: str) -> Side:
    """Return a side that uses the copy of this library in another folder."""
    return Side(name, SIDES[OURS].module, HERE, folder)
