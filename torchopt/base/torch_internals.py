"""The private names of torch that this package uses, each under a name of its own.

No other file reaches for one (``tests/test_torch_internals.py``), but for what brings the compiler
along: :mod:`torchopt.base.torch_compiler`. Where torch changes, here is what to look at. Attributes
of public objects (``tensor._version``, ``module._parameters``) are read where they are needed.

All of this is there from torch 2.6, the oldest that is supported, to 2.14, but for what is looked
up with ``getattr``: that is ``None`` where a torch lacks it. What is called at every step is the
object of torch itself.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _AutoDispatchBelowAutograd, _autograd  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch import pyfunctorch
from torch._functorch import utils as functorch_utils
from torch._utils import _flatten_dense_tensors
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _pytree as torch_pytree


# The levels of torch.func ------------------------------------------------------------------------

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
#: The innermost level, or ``None``; and all of them, the outermost first, or ``None``.
peek_interpreter_stack = _functorch.peek_interpreter_stack
get_interpreter_stack = _functorch.get_interpreter_stack
#: What a level is: ``Grad``, ``Vmap``, ``Jvp``, ``Functionalize``.
TransformType = _functorch.TransformType

#: Whether a level of torch.func has wrapped a tensor; whether it was ``grad``; and what is inside.
is_functorch_wrapped_tensor = _functorch.is_functorch_wrapped_tensor
is_gradtrackingtensor = _functorch.is_gradtrackingtensor
get_unwrapped = _functorch.get_unwrapped
#: The tensor itself, without the wraps of levels that have ended.
unwrap_if_dead = _functorch.unwrap_if_dead
#: Whether it is a batch of ``autograd.grad(..., is_grads_batched=True)``, which is no level.
is_legacy_batchedtensor = _functorch.is_legacy_batchedtensor
#: ``(tensor, dim, level) -> batch`` of it, and ``(batch, level, size, dim) -> tensor``.
add_legacy_batch_dim: Any = torch._add_batch_dim  # pyright: ignore[reportPrivateImportUsage]
remove_legacy_batch_dim: Any = torch._remove_batch_dim  # pyright: ignore[reportPrivateImportUsage]

#: ``(tensor, level) -> (inside, dim or None)`` and ``(tensor, dim, level) -> batch`` of a ``vmap``.
unwrap_batched = _functorch._unwrap_batched
add_batch_dim = _functorch._add_batch_dim
#: ``(tensor, level) -> tensor`` of a ``grad``.
unwrap_for_grad = _functorch._unwrap_for_grad
wrap_for_grad = _functorch._wrap_for_grad

#: The Python object of the innermost level, with ``key``, ``level``, ``lower`` and, of a ``vmap``,
#: ``batch_size``; and, of one of ``grad``, the function that brings a tensor to its level, which
#: must not outlive that object.
current_interpreter = pyfunctorch.retrieve_current_functorch_interpreter
lift_of: Any = operator.attrgetter("_cptr.lift")
#: Context managers: no level at all, for Python and for torch's own code.
temporarily_clear_interpreter_stack = pyfunctorch.temporarily_clear_interpreter_stack
DisableFuncTorch: Any = torch._C._DisableFuncTorch


def levels_of_batched_grads() -> int:
    """Return how many calls of ``torch.autograd.grad(..., is_grads_batched=True)`` are at work."""
    torch._C._vmapmode_increment_nesting()
    return torch._C._vmapmode_decrement_nesting()


@contextlib.contextmanager
def outside_of_batched_grads() -> Iterator[None]:
    """Leave their levels, in which nothing may be drawn."""
    levels = levels_of_batched_grads()
    for _ in range(levels):
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        for _ in range(levels):
            torch._C._vmapmode_increment_nesting()


# Autograd ----------------------------------------------------------------------------------------

#: ``torch.autograd.Function`` for one level, and the context manager without which it refuses.
SingleLevelFunction = _SingleLevelFunction
enable_single_level_autograd_function = functorch_utils.enable_single_level_autograd_function
#: A context manager: operators called in it record nothing; and the dispatch keys that are left.
AutoDispatchBelowAutograd: Any = _AutoDispatchBelowAutograd
after_autograd_keyset: Any = torch._C._after_autograd_keyset

#: ``(outputs, derivatives, retain_graph, create_graph, inputs, allow_unused, accumulate_grad=)``:
#: ``torch.autograd.grad`` without what it asks of its arguments first; ``None`` where it is not.
engine_run_backward: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)
#: The class of the nodes that leaves have.
AccumulateGrad: Any = torch._C._functions.AccumulateGrad  # pyright: ignore[reportAttributeAccessIssue]
#: The number that the next node of this thread's graph gets.
get_sequence_nr = _autograd._get_sequence_nr
#: The number of the backward pass that is at work in this thread, or -1.
current_graph_task_id = torch._C._current_graph_task_id
#: Whether that backward pass leaves the graph for another one.
graph_task_keeps_graph = _autograd._get_current_graph_task_keep_graph
#: ``(ignore_is_tracing) -> hooks or None`` of ``saved_tensors_hooks``; ``None`` on torch 2.6.
top_saved_tensors_hooks: Any = getattr(_autograd, "_top_saved_tensors_default_hooks", None)

#: The context manager ``(mode)`` in which forward mode is on or off.
set_forward_grad_enabled = forward_ad._set_fwd_grad_enabled


def in_forward_mode() -> bool:
    """Whether a level of forward mode is open (``forward_ad.dual_level``, ``torch.func.jvp``)."""
    return forward_ad._current_level >= 0


# Tracers -----------------------------------------------------------------------------------------

#: How many dispatch modes are at work (``FakeTensorMode``, that of ``make_fx``, a user's own).
len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
#: What ``torch.jit.trace`` is recording, or ``None``.
get_tracing_state: Any = torch._C._get_tracing_state  # pyright: ignore[reportAttributeAccessIssue]
_dynamo: Any = getattr(torch._C, "_dynamo", None)
#: Compares tensors with others seen before, all in one call; ``None`` where torch has none.
TensorGuards: Any = getattr(getattr(_dynamo, "guards", None), "TensorGuards", None)

# ``torch_pytree``: the trees that torch and its compiler know.
#: The class under which a node is registered there; one for all named tuples.
node_type = torch_pytree._get_node_type
#: Make the objects of a class constants to the compiler; ``None`` where torch cannot (2.6).
register_constant: Any = getattr(torch_pytree, "register_constant", None)


def nothing_is_compiled() -> bool:
    """Whether ``torch.compile`` has not been called in this process, or not since its reset.

    What it returned compiles when it is called for the first time. That the compiler has been
    imported says nothing: ``torch.func.grad`` does it.
    """
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is None:
        return True
    backends = getattr(sys.modules.get("torch._dynamo.eval_frame"), "cached_backends", {0: 0})
    asked = any(backend is not None for backend in backends.values())
    return not asked and getattr(frames, "FRAME_COUNTER", None) == 0


# Tensors and modules -----------------------------------------------------------------------------

#: 1 if several entries of a tensor are the same memory, 0 if not, 2 if it is too hard to tell.
debug_has_internal_overlap: Any = torch._debug_has_internal_overlap  # pyright: ignore[reportPrivateImportUsage]
#: Copy a list of tensors into a flat one, in one call.
flatten_dense_tensors = _flatten_dense_tensors
#: ``(cls, tensor, requires_grad) -> tensor``: the same as an object of a subclass.
make_subclass: Any = Tensor._make_subclass
#: As ``__torch_function__``: operations on a subclass return plain tensors.
disabled_torch_function: Any = torch._C._disabled_torch_function_impl
#: What fills one module by ``load_state_dict``.
load_from_state_dict = nn.Module._load_from_state_dict
#: The name in ``torch.utils.checkpoint`` of the class that ``use_reentrant=False`` is made of.
CHECKPOINT_FRAME = "_CheckpointFrame"
