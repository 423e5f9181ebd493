"""Four steps whose results in Optax are written down in tests, and how they are taken here.

The numbers are those of Optax 0.2.8 with ``JAX_ENABLE_X64=1``; a test names the call that made
them.
"""

from __future__ import annotations

from typing import Any

import torch
from tolerances import assert_close

import torchopt


F64 = {"dtype": torch.float64}
W = [[0.5, -1.0, 2.0], [0.1, 0.7, -0.4]]
B = [0.3, -0.6]
GRADS = (
    ([[0.3, -0.2, 1.0], [-0.5, 0.4, 0.6]], [0.2, -0.9]),
    ([[-0.6, 0.1, -0.2], [0.9, -0.3, 0.2]], [0.4, 0.3]),
    ([[0.02, 0.3, -0.05], [-0.1, 0.8, -0.7]], [-0.7, 0.1]),
    ([[-0.1, -0.02, -0.3], [-0.2, 0.5, 0.1]], [0.05, -0.3]),
)


def assert_ends_at(
    tx: torchopt.GradientTransformation, w: Any, b: Any, slots: dict[str, tuple[Any, Any]]
) -> None:
    """Take the steps and compare the parameters, and slots by name, each as ``(of w, of b)``."""
    params = {"w": torch.tensor(W, **F64), "b": torch.tensor(B, **F64)}
    state = tx.init(params)
    for of_w, of_b in GRADS:
        grads = {"w": torch.tensor(of_w, **F64), "b": torch.tensor(of_b, **F64)}
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
    assert_close(params["w"], torch.tensor(w, **F64))
    assert_close(params["b"], torch.tensor(b, **F64))
    for name, (of_w, of_b) in slots.items():
        column = getattr(state, name)
        assert_close(column["w"], torch.tensor(of_w, **F64), what=name)
        assert_close(column["b"], torch.tensor(of_b, **F64), what=name)
