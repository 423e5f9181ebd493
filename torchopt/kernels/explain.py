"""Say why an update is not fused."""

from __future__ import annotations

from typing import Any

from torchopt.core.opt_state import OptState
from torchopt.core.transform import GradientTransformation, check_transformation
from torchopt.kernels import fused
from torchopt.typing import TensorTree


def why(
    tx: GradientTransformation,
    grads: TensorTree,
    state: OptState | None = None,
    params: TensorTree | None = None,
    **extra: Any,
) -> list[str]:
    """Return why parts of an update would not be fused; an empty list if all would be.

    This has no visible effect: the update is computed and discarded. The grad mode says whether
    derivatives with respect to hyperparameters are wanted.

    Args:
        tx: The transformation.
        grads: Gradients, or anything with their structure, dtypes, devices and layouts, such as
            the parameters.
        state: The state; ``None`` for the first update.
        params: The parameters, if ``update`` will be given them.
        **extra: What ``update`` will be given besides: ``value=loss`` for a Polyak step.

    Returns:
        One line for each segment of parts and parameter that the rules would compute.

    Raises:
        TypeError: If ``tx`` is no transformation.

    Example:
        >>> import torch, torchopt
        >>> params = {"w": torch.randn(3, requires_grad=True)}
        >>> tx = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam())
        >>> print(torchopt.kernels.why(tx, params)[0])
        ClipGradNorm of 'w': it is not elementwise
    """
    check_transformation(tx, "why")
    lines: list[str] = []
    with fused.asking(lines):
        tx.update(grads, tx.init(grads) if state is None else state, params, inplace=False, **extra)
    return lines
