"""The same work on a CUDA device."""

from __future__ import annotations

from benchmarks.meta_step import CHECKS
from benchmarks.rows import Case, Row


MLP = Case(
    "meta-step mlp on GPU",
    "meta_step",
    {"network": "mlp", "device": "cuda"},
    CHECKS,
    needs_gpu=True,
)
LARGE = Case(
    "Adam.step on GPU, 100 million: bandwidth",
    "adam_step",
    {"tensors": 10, "shape": (10_000_000,), "device": "cuda"},
    repeats=20,
    needs_gpu=True,
)
#: A step of Adam reads gradient, parameter and two moments and writes all but the first; a copy
#: reads and writes once.
WORDS_OF_STEP, WORDS_OF_COPY = 7, 2
ROWS = [
    Row("gpu-meta", MLP, "higher", "torchopt", 2.0),
    Row("gpu-update", LARGE, "copy", "torchopt", 0.8, factor=WORDS_OF_STEP / WORDS_OF_COPY),
]
