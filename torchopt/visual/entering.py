"""The weights that enter an optimizer step."""

from __future__ import annotations

from torchopt.kernels.generate.program import PARAMETER
from torchopt.visual.walk import Step, Walk, fused_inputs


def entering_weights(found: Walk, step: Step) -> list[tuple[int, int]]:
    """Return what the weights that a step was given are in the graph: nodes and output numbers.

    What the rules compute does not tell weights from hyperparameters. There, weights are what an
    update is added to, in the step or after it.
    """
    if not step.recorded:
        columns = [fused_inputs(found, p).get(PARAMETER, []) for p in step.fused]
        if any(columns):
            return [source for column in columns for source in column if source[0] is not None]
    own = found.steps.index(step)
    used_inside = {s for member in step.members for s, _ in found.inputs[member]}
    weights = []
    for position, sources in enumerate(found.inputs):
        if len(sources) != 2 or not found.nodes[position].name().startswith("AddBackward"):
            continue
        if found.step_of[position] == own and position in used_inside:
            continue
        if found.step_of[position] not in (own, -1):
            continue
        inside = found.step_of[position] == own  # where a constant update is one too
        made = [inside if s is None else found.step_of[s] == own for s, _ in sources]
        weights += [
            source
            for source, other in zip(sources, reversed(made))
            if other and source[0] is not None and found.step_of[source[0]] != own
        ]
    return weights


def entering_leaves(found: Walk, step: Step) -> list[int]:
    """Return the leaves that are weights of a step."""
    sources = {source for source, _ in entering_weights(found, step)}
    return sorted(source for source in sources if not found.inputs[source])
