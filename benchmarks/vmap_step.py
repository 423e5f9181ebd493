"""The meta-step of 32 tasks at once, batched by ``vmap`` over the functional API.

``higher`` has no functional API and goes through the tasks one after the other.
"""

from __future__ import annotations

from benchmarks.meta_step import CHECKS, problem
from benchmarks.rows import Case, Row


__all__ = ["ROWS", "problem"]

MLP = Case("mlp, 32 tasks by vmap", "vmap_step", {"network": "mlp", "tasks": 32}, CHECKS)
ROWS = [
    Row("vmap", MLP, "higher", "torchopt", 5.0),
    Row("vmap", MLP, "higher", "floor", None),
    Row("vmap", MLP, "optax", "torchopt", 1.1),
    Row("vmap", MLP, "optax", "floor", None),
]
