"""``torch.optim`` with ``foreach=True``: every class has it."""

from __future__ import annotations

from functools import partial

from benchmarks.sides import torch_fused


version = torch_fused.version
each_optimizer = partial(torch_fused.each_optimizer, foreach=True)
