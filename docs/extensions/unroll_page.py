"""Tables of the pages on long loops, from the figures of their benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from extensions.files import Folder, table


FOLDER = Path("benchmarks") / "results"
PLAIN = "Unrolled()"

#: Way -> what its derivative is, and when to take it.
ADVICE = {
    PLAIN: ("exact", "it fits: none of the exact ways here is faster"),
    "Checkpointed()": (
        "exact",
        "a step saves much more than a carry: deep networks, large batches, gradients of networks",
    ),
    'Checkpointed("sqrt")': ("exact", "the carries of all steps do not fit: most long loops"),
    'Checkpointed("log")': ("exact", "the carries or graphs of `sqrt` do not fit"),
    'Checkpointed("revolve")': (
        "exact",
        "the same, faster, with twice the carries, or you know how many fit: `slots=`",
    ),
    "Mixed()": ("exact", "gradients dominate a step, and the step cannot be taken again"),
    "Forward()": (
        "exact, by few numbers",
        "there is a handful of hyperparameters, and any number of steps",
    ),
    "Truncated(16)": ("of the last 16 steps", "the loop soon forgets where it came from"),
    "FirstOrder()": (
        "without second derivatives",
        "the start or a learning rate is learned, and nothing in the inner loss",
    ),
}
#: Problem -> what it is.
PROBLEMS = {
    "deep": "16 steps of gradient descent; tanh network, 16 layers of width 256, batch 2,048",
    "long": "256 steps of gradient descent; network of 32-256-1, batch 256",
    "few-shot, 1,000 steps": "1,000 steps of Adam on the few-shot example's network, 5 images",
    "few-shot, 10,000 steps": "10,000 steps of the same",
}


def write(root: Path, pages: Folder) -> None:
    """Write the tables."""
    memory, compiled, study = (
        json.loads((root / FOLDER / f"unroll_{name}.json").read_text(encoding="utf-8"))
        for name in ("memory", "compiled", "study")
    )
    pages.write("unroll_machine.md", machine(study))
    pages.write("unroll_ways.md", ways(study))
    pages.write("unroll_problems.md", problems(memory))
    pages.write("unroll_compiled.md", compiled_steps(compiled))


def machine(study: dict[str, Any]) -> str:
    """Return a sentence on the machine and the run."""
    about = study["machine"]
    rounds = f"median of {study['rounds']} rounds" if study["rounds"] > 1 else "one round"
    return (
        f"Measured on {about['date'].partition('T')[0]}: {about['cpu']}, one thread, torch "
        f"{study['torch']}, {rounds}, each measurement in a process of its own.\n"
    )


def ways(study: dict[str, Any]) -> str:
    """Return the table of all ways at the largest number of steps, and when to take which."""
    lengths = {int(length): rows for length, rows in study["lengths"].items()}
    most = max(lengths)
    few = max(length for length in lengths if length <= most // 4)
    head = ["adjoint", "derivative", f"MB, {few:,} steps", f"MB, {most:,} steps"]
    lines = [[*head, "of the plain unroll's time", "take it where"]]
    plain = lengths[most][PLAIN]
    for way, (derivative, when) in ADVICE.items():
        row = lengths[most][way]
        megabytes = [number(rows[way]["mb"]) for rows in (lengths[few], lengths[most])]
        times = f"{row['seconds'] / plain['seconds']:.1f}"
        lines.append([f"`{way}`", derivative, *megabytes, times, when])
    return table(lines)


def problems(memory: dict[str, Any]) -> str:
    """Return a table for each of the benchmark's problems, against the plain unroll."""
    from benchmarks.unroll_memory import LIMITS, MEGABYTES  # needs the root on the path

    parts = []
    for name, what in PROBLEMS.items():
        lines = [["way", "MB", "seconds", "of the memory", "of the time", "target"]]
        for way, row in memory.get(name, {}).items():
            ratios = ["", ""]
            if "memory" in row:
                ratios = [f"{row['memory']:.3f}", f"{row['time']:.2f}"]
            target = ""
            if (name, way) in LIMITS:
                target = "≤ {}, ≤ {}".format(*LIMITS[name, way])
            elif name in MEGABYTES and way != PLAIN:
                target = f"≤ {MEGABYTES[name]:,} MB"
            figures = [number(row["mb"]), number(row["seconds"])]
            lines.append([f"`{way}`", *figures, *ratios, target])
        parts.append(f"**{what}**\n\n{table(lines)}")
    return "\n".join(parts)


def compiled_steps(compiled: dict[str, Any]) -> str:
    """Return the table of compiled steps beside eager ones."""
    head = ["adjoint", "eager, s", "compiled, s", "compiling, s", "with a full cache, s"]
    lines = [[*head, "graphs", "graphs for more steps"]]
    for way, row in compiled["ways"].items():
        seconds = (
            *(row["eager loop"], row["compiled loop"]),
            *(row["compiling"], row["compiling, from the cache"]),
        )
        graphs = [str(row["graphs"]), str(row["graphs later"])]
        lines.append([f"`{way}`", *map(number, seconds), *graphs])
    return table(lines)


def number(value: float) -> str:
    """Return a figure with two or three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"
