"""Draw the graph that a meta-gradient flows through, and read in words why another one does not.

A tiny network takes two inner steps of MetaAdam with a learned learning rate. Run it with::

    python examples/visualize.py --output gradient_graph.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common.checkpoints import write_atomically
from common.endings import plain_endings
from torch import Tensor, nn

import torchopt.visual


def adapt(steps: int, lr: Any) -> tuple[Tensor, list[Any]]:
    """Return the loss after some inner steps, and names for what lies on the way."""
    torch.manual_seed(0)
    net = nn.Linear(2, 1, bias=False)
    x, y = torch.randn(8, 2), torch.randn(8, 1)
    names: list[Any] = []
    with torchopt.inner_loop(net, torchopt.adam(lr)) as inner:
        for step in range(steps + 1):
            prefix = "initial " if step == 0 else f"step {step} "
            for target in (net, inner) if step < steps else (net,):
                state = torchopt.extract_state_dict(
                    target, enable_visual=True, visual_prefix=prefix
                )
                names.append(state)
            if step < steps:
                inner.step((net(x) - y).square().mean())
        loss = (net(x) - y).square().mean()
    return loss, [*names, {"loss": loss}]


def main() -> None:
    """Draw the picture, and explain two gradients."""
    parser = argparse.ArgumentParser(
        prog="visualize",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("gradient_graph.png"), help="the picture to write"
    )
    parser.add_argument("--steps", type=int, default=2, help="inner steps")
    parser.add_argument("--dpi", type=int, default=110, help="dots per inch of the picture")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")

    with plain_endings("visualize", resumable=False):
        draw(options)


def draw(options: argparse.Namespace) -> None:
    """Draw a picture into a file, and print what explain says."""
    lr = torch.tensor(0.1, requires_grad=True)
    loss, names = adapt(options.steps, lr)
    dot = torchopt.visual.make_dot(loss, [*names, {"learning rate": lr}], clusters=True)
    dot.attr(dpi=str(options.dpi), nodesep="0.2", ranksep="0.18")
    suffix = options.output.suffix.removeprefix(".") or "png"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        picture = dot.pipe(format=suffix)
    except RuntimeError as error:  # the program dot is missing
        raise ValueError(str(error)) from error
    write_atomically(options.output, lambda path: path.write_bytes(picture))
    print(f"The picture is in {options.output}.\n")

    print("The learned learning rate:")
    print(torchopt.visual.explain(loss, "learning rate", [*names, {"learning rate": lr}]))
    loss, names = adapt(options.steps, lr.item())
    print("\nThe same, with lr.item() by mistake:")
    print(torchopt.visual.explain(loss, "learning rate", [*names, {"learning rate": lr}]))


if __name__ == "__main__":
    main()
