"""Let torch.utils.checkpoint run a function again with the weights of its first run.

The only file that knows the private parts of :mod:`torch.utils.checkpoint`. Its functions are
imported by name everywhere, so that not they but the two classes they are made of are replaced, by
subclasses that remember the moment (:mod:`torchopt.nn.moments`). All contexts and options of the
user stay as they are, and nothing changes where no optimizer of this library puts weights into a
module.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from typing import Any

import torch
from torch import nn

from torchopt.base.torch_internals import CHECKPOINT_FRAME, current_graph_task_id
from torchopt.nn import moments


_NAME = "torch.utils.checkpoint"
_installed: list[bool] = []


def remember_weights(required: bool = True) -> None:
    """See to it that checkpointed functions remember their weights, from now on.

    Args:
        required: Import ``torch.utils.checkpoint`` if nobody has: on old versions of PyTorch that
            takes a second.
    """
    if _installed or not (required or _NAME in sys.modules):
        return
    known = install(importlib.import_module(_NAME))
    _installed.append(known)
    if not known:
        moments.noting.append(True)
        nn.modules.module.register_module_forward_pre_hook(refuse_in_backward)


def refuse_in_backward(module: nn.Module, _: Any) -> None:
    """Refuse a checkpointed module that got other weights, where PyTorch's classes are unknown.

    Raises:
        RuntimeError: If the module is called in a backward pass and has been put weights into.
    """
    if current_graph_task_id() != -1 and module in moments.written:
        raise RuntimeError(
            f"{type(module).__name__} is computed again in a backward pass "
            "(torch.utils.checkpoint), but its weights have been replaced since it ran first. This "
            f"version of PyTorch ({torch.__version__}) checkpoints in a way that torchopt does "
            "not know. Do not checkpoint inside an inner loop."
        )


def install(namespace: Any) -> bool:
    """Put the subclasses in place of the classes; return whether these are the known ones."""
    try:
        frame, function = getattr(namespace, CHECKPOINT_FRAME), namespace.CheckpointFunction
        functions = map(inspect.unwrap, filter(inspect.isfunction, vars(namespace).values()))
        known = (
            any(CHECKPOINT_FRAME in f.__code__.co_names for f in functions)
            and frame.__init__.__code__.co_varnames[1] == "recompute_fn"
            and function.forward.__code__.co_varnames[:2] == ("ctx", "run_function")
            and "run_function" in function.backward.__code__.co_names
        )
    except (AttributeError, IndexError):
        return False
    if known and not issubclass(frame, _Remembers):
        setattr(namespace, CHECKPOINT_FRAME, _frame_class(frame))
        namespace.CheckpointFunction = _function_class(function)
    return known


class _Remembers:
    """Marks the subclasses."""


def _frame_class(base: Any) -> Any:
    """Return the class of ``use_reentrant=False``."""

    class _CheckpointFrame(base, _Remembers):
        def __init__(self, recompute_fn: Any, *args: Any, **kwargs: Any) -> None:
            again = functools.partial(moments.rerun, moments.now(), recompute_fn)
            super().__init__(again, *args, **kwargs)

    return _CheckpointFrame


def _function_class(base: Any) -> Any:
    """Return the class of ``use_reentrant=True``."""

    class CheckpointFunction(base, _Remembers):
        @staticmethod
        def forward(ctx: Any, run_function: Any, *args: Any) -> Any:
            moment = moments.now()
            outputs = base.forward(ctx, run_function, *args)
            ctx.run_function = functools.partial(moments.rerun, moment, run_function)
            return outputs

    return CheckpointFunction
