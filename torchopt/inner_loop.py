"""Adapt a network inside a ``with`` block and have it back unchanged."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from torchopt import misuse
from torchopt.meta import MetaOptimizer
from torchopt.module_state import named_places
from torchopt.state import extract_state_dict, recover_state_dict
from torchopt.transform import GradientTransformation


@misuse.block
def inner_loop(
    module: nn.Module,
    tx: GradientTransformation | MetaOptimizer,
    *,
    create_graph: bool | None = None,
    restore_buffers: bool = True,
) -> Iterator[MetaOptimizer]:
    """Adapt a network inside a ``with`` block; at its end it is what it was before.

    The adapted tensors live on in the graph of any loss computed in the block, so an outer loss may
    be differentiated inside or after it. Parameters, buffers and the optimizer are restored also
    if the block raises.

    Args:
        module: The network.
        tx: A transformation, for a fresh optimizer; or a :class:`MetaOptimizer` of ``module``.
        create_graph: ``False`` gives the first-order approximation.
        restore_buffers: Let the block work on copies of the buffers (BatchNorm statistics), and
            put the originals back. ``False`` keeps what the block made of them.

    Yields:
        The optimizer.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> x = torch.randn(8, 2)
        >>> with torchopt.inner_loop(net, torchopt.sgd(0.1)) as inner:
        ...     for _ in range(3):
        ...         inner.step(net(x).square().mean())
        ...     net(x).square().mean().backward()
        >>> net.weight.grad.shape
        torch.Size([1, 2])
    """
    misuse.check_inner_loop(module, tx)
    optimizer = tx if isinstance(tx, MetaOptimizer) else MetaOptimizer(module, tx)
    modules = {id(m): m for m in (module, *(group["params"] for group in optimizer.param_groups))}
    modules = list(modules.values())
    before = [extract_state_dict(m, with_buffers=restore_buffers) for m in modules]
    optimizer_before = optimizer.extract_state()
    groups_before = [dict(group) for group in optimizer.param_groups]
    create_graph_before = optimizer.create_graph
    if create_graph is not None:
        optimizer.create_graph = create_graph
    if restore_buffers:
        copies: dict[int, Tensor] = {}
        for m in modules:
            for _, owner, attribute, buffer in named_places(m, "_buffers"):
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.clone()
                    copies[id(copies[id(buffer)])] = copies[id(buffer)]
                owner._buffers[attribute] = copies[id(buffer)]
    try:
        yield optimizer
    finally:
        optimizer.create_graph = create_graph_before
        optimizer.param_groups[:] = groups_before
        for m, state in zip(modules, before):
            recover_state_dict(m, state)
        optimizer._states = optimizer._states[: len(groups_before)]
        optimizer.recover_state(optimizer_before)
        if optimizer is not tx:  # a step would change the network for good
            vars(optimizer)["step"] = misuse.step_after_block
