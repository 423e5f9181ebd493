"""This library without fused kernels: its rules on torch operators, as automatic derivatives go."""

from __future__ import annotations

from functools import partial

from benchmarks.sides import torchopt_now


version = torchopt_now.version
meta_step = partial(torchopt_now.meta_step, accelerated=False)
vmap_step = partial(torchopt_now.vmap_step, accelerated=False)
update_alone = partial(torchopt_now.update_alone, accelerated=False)
memory = partial(torchopt_now.memory, accelerated=False)
adam_step = partial(torchopt_now.adam_step, accelerated=False)
own_rule = partial(torchopt_now.own_rule, accelerated=False)
each_optimizer = partial(torchopt_now.each_optimizer, accelerated=False)
