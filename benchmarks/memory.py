"""What a differentiable update keeps in memory beyond its inputs and outputs."""

from __future__ import annotations

import numpy as np

from benchmarks import update_alone
from benchmarks.networks import NETWORKS, initial_weights
from benchmarks.rows import Case, Row


def problem(network: str = "mlp") -> update_alone.Problem:
    """Return one update of as many numbers as the network has."""
    weights = initial_weights(NETWORKS[network], np.random.default_rng(0))
    return update_alone.problem(len(weights), sum(w.size for w in weights) // len(weights))


KEPT = Case("kept per inner step, mlp", "memory", {}, timed=False)
ROWS = [Row("memory", KEPT, "torchopt", None, 0.0, at_most=True, number="saved", unit=" bytes")]
