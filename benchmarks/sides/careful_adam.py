"""The rule of the workload ``own_rule``, as a user writes one: the library knows nothing of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import torchopt
from torchopt import ElementwiseTransformation, transformation


#: A function here; in versions before it was public, in a module of that name.
hyper: Any = getattr(torchopt.hyper, "hyper", torchopt.hyper)


@transformation
class CarefulAdam(ElementwiseTransformation):
    """Adam with half a step where the gradient has turned."""

    slots = ("exp_avg", "exp_avg_sq")
    uses_step = True

    lr: float = hyper(1e-3)
    beta1: float = hyper(0.9)
    beta2: float = hyper(0.999)
    eps: float = hyper(1e-8)

    def rule(
        self, g: Tensor, p: Any, t: Any, slots: Any, *, lr: Any, beta1: Any, beta2: Any, eps: Any
    ) -> Any:
        """Return the update of one tensor and the new moments."""
        m, v = slots
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        step = m_hat / (torch.sqrt(v_hat) + eps)
        step = torch.where(step * g > 0, step, 0.5 * step)
        return -lr * (step + 0.1 * torch.sign(m)), (m, v)
