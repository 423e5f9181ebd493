"""Draw the graph that a meta-gradient flows through, and read in words why another one does not.

A tiny network takes two inner steps of MetaAdam with a learned learning rate. Run it with::

    python examples/visualize.py --output gradient_graph.png
    python examples/visualize.py --quick                # a page of one step; needs no other program

The ending of the file says what it is: a picture (png, svg or pdf, drawn by the program dot), its
text for Graphviz (dot), or an interactive page (html). The last two need no other program.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from common.checkpoints import write_atomically
from common.endings import plain_endings
from common.options import Parser, positive_int
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


#: What the program dot draws; a page and the text of a picture need no program.
PICTURES = ("png", "svg", "pdf")
WITHOUT_DOT = ("html", "dot")
#: What ``--quick`` changes, apart from the file: a page, which needs no program.
QUICK = {"steps": 1}


def main() -> None:
    """Draw the picture, and explain two gradients."""
    description = (__doc__ or "").splitlines()[0]
    parser = Parser("visualize", description, QUICK, Path("gradient_graph.html"))
    endings = ", ".join(PICTURES + WITHOUT_DOT)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("gradient_graph.png"),
        help=f"the file to write; its ending is one of {endings}. A quick run writes "
        "gradient_graph-quick.html unless a file is given",
    )
    parser.add_argument("--steps", type=positive_int, default=2, help="inner steps")
    parser.add_argument(
        "--dpi", type=positive_int, default=110, help="dots per inch of a picture, from 10 to 1000"
    )
    options = parser.parse_args()
    with plain_endings("visualize", resumable=False):
        check(options)
        draw(options)


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be done, before anything is computed or written."""
    output: Path = options.output
    if not 10 <= options.dpi <= 1000:
        raise ValueError(f"--dpi must be from 10 to 1000, got {options.dpi}.")
    ending = output.suffix.removeprefix(".").lower()
    if ending not in PICTURES + WITHOUT_DOT:
        known = ", ".join(PICTURES + WITHOUT_DOT)
        raise ValueError(f"--output must end in one of {known}, got {str(output)!r}.")
    if output.is_dir():
        raise ValueError(f"--output must name a file, and {output} is a folder.")
    parents = [parent for parent in output.parents if parent.exists()]
    if not parents[0].is_dir():
        raise ValueError(f"--output {output}: {parents[0]} is a file, not a folder.")
    if not os.access(parents[0], os.W_OK):
        raise ValueError(f"--output {output}: the folder {parents[0]} may not be written in.")
    if ending in PICTURES and shutil.which("dot") is None:
        raise ValueError(
            "the program dot, which draws the picture, is missing; install Graphviz (apt install "
            "graphviz, brew install graphviz), or write a page instead: --output graph.html"
        )


def picture(options: argparse.Namespace, loss: Tensor, names: list[Any]) -> bytes:
    """Return the contents of the file."""
    ending = options.output.suffix.removeprefix(".").lower()
    if ending == "html":
        title = f"{options.steps} step{'s' * (options.steps > 1)} of MetaAdam"
        return torchopt.visual.show(loss, names, title=title).html.encode()
    dot = torchopt.visual.make_dot(loss, names, clusters=True)
    dot.attr(dpi=str(options.dpi), nodesep="0.2", ranksep="0.18")
    if ending == "dot":
        return dot.source.encode()
    try:
        return dot.pipe(format=ending, quiet=True)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        raise ValueError(f"dot could not draw it: {said[0] if said else error}") from error


def draw(options: argparse.Namespace) -> None:
    """Draw a picture into a file, and print what explain says."""
    lr = torch.tensor(0.1, requires_grad=True)
    loss, names = adapt(options.steps, lr)
    contents = picture(options, loss, [*names, {"learning rate": lr}])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, lambda path: path.write_bytes(contents))
    print(f"The picture is in {options.output}.\n")

    print("The learned learning rate:")
    print(torchopt.visual.explain(loss, "learning rate", [*names, {"learning rate": lr}]))
    loss, names = adapt(options.steps, lr.item())
    print("\nThe same, with lr.item() by mistake:")
    print(torchopt.visual.explain(loss, "learning rate", [*names, {"learning rate": lr}]))


if __name__ == "__main__":
    main()
