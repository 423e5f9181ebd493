"""Adapt a network inside a ``with`` block and have it back unchanged."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import nn

from torchopt.base import misuse
from torchopt.base.commit import all_or_nothing
from torchopt.core.transform import GradientTransformation
from torchopt.diff.adjoints.base import Adjoint
from torchopt.diff.adjoints.block import in_block as _in_block
from torchopt.nn import put_back
from torchopt.nn.parameters import refuse_scripted
from torchopt.nn.rollback import Rollback
from torchopt.nn.statistics import shielded
from torchopt.optim.meta_optimizer import MetaOptimizer
from torchopt.optim.replayed import ReplayedSteps


@misuse.block
def inner_loop(
    module: nn.Module,
    tx: GradientTransformation | MetaOptimizer,
    *,
    create_graph: bool | None = None,
    restore_buffers: bool = True,
    adjoint: Adjoint | None = None,
) -> Iterator[MetaOptimizer]:
    """Adapt a network inside a ``with`` block, and restore it at the end.

    The adapted tensors live on in the graph of any loss computed in the block, so an outer loss can
    be differentiated inside the block or after it. Everything that the network held is restored,
    even if the block raises: parameters, buffers and sub-modules (additions are removed), values
    that were changed in place (``reset_parameters``, ``load_state_dict``, an embedding's
    ``max_norm``), flags (``requires_grad``), the mode of ``train`` and ``eval``, and the optimizer.
    Other attributes stay as the block left them, including ``grad``. A lazy module that got its
    shapes in the block keeps them.

    A loss computed from values of the network's own parameters that were changed in place has to be
    differentiated inside the block: after it PyTorch raises, because they have been restored.

    Args:
        module: The network.
        tx: A transformation, for a fresh optimizer; or a :class:`MetaOptimizer` of ``module``.
        create_graph: ``False`` gives the first-order approximation.
        restore_buffers: Let the block work on copies of the buffers (BatchNorm statistics), and
            put the originals back. ``False`` keeps what the block made of them.
        adjoint: How the steps are differentiated, an object of ``torchopt.diff``; by default they
            are recorded. With :class:`torchopt.diff.Checkpointed` each is computed again in the
            backward pass, so that the memory is that of one step and of the carries that are kept
            (weights, buffers, state of the optimizer); the meta-gradient is the same, at every
            order. ``inner.step`` then takes a function that computes the loss. It is called again
            with the weights, buffers, modes, random states and autocast of the step, and the
            variables that it reads have the values that they had; if the loss is another one all
            the same, an error says so.

    Yields:
        The optimizer.

    Raises:
        TypeError: If ``module`` is not a module, ``tx`` not a transformation, or ``adjoint``
            not an adjoint.
        ValueError: If the adjoint needs to know all steps beforehand.

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
        >>> from torchopt.diff import Checkpointed
        >>> with torchopt.inner_loop(net, torchopt.sgd(0.1), adjoint=Checkpointed("sqrt")) as inner:
        ...     for _ in range(30):
        ...         inner.step(lambda: net(x).square().mean())
        ...     net(x).square().mean().backward()
    """
    misuse.check_inner_loop(module, tx)
    in_block = None if adjoint is None else _in_block(adjoint)
    optimizer = tx if isinstance(tx, MetaOptimizer) else MetaOptimizer(module, tx)
    if optimizer is tx:  # else it has been refused there
        refuse_scripted("inner_loop", module)
    groups = list(optimizer.param_groups)
    networks = {id(m): m for m in (module, *(group["params"] for group in groups))}
    modules = optimizer._trainable.modules(list(networks.values()))
    rollback = Rollback(modules, restore_buffers)
    groups_before = [dict(group) for group in groups]
    # states are replaced at each step and never changed, so that they need no copy
    states_before, pairs_before = list(optimizer._states), optimizer._pairs
    create_graph_before = optimizer.create_graph
    if create_graph is not None:
        optimizer.create_graph = create_graph
    if in_block is not None and in_block.first_order:
        optimizer.create_graph = False
    if in_block is not None and in_block.tape is not None:
        replayed = ReplayedSteps(optimizer, modules, in_block.tape)
        vars(optimizer)["step"] = replayed.step

    def undo() -> None:
        end_shields()
        rollback.undo()
        optimizer.create_graph = create_graph_before
        for group, before in zip(groups, groups_before):
            group.clear()
            group.update(before)
        optimizer.param_groups[:] = groups
        optimizer._states, optimizer._pairs = list(states_before), pairs_before
        vars(optimizer).pop("step", None)

    end_shields = shielded(modules)
    try:
        yield optimizer
    finally:
        if any(map(operator.is_not, optimizer._states, states_before)):  # a step was taken
            put_back.networks.update(networks.values())
        all_or_nothing(undo)
        if optimizer is not tx:  # a step would change the network for good
            vars(optimizer)["step"] = misuse.step_after_block
