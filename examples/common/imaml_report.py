"""What the iMAML example shows: table, claims and the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.maml import Accuracy
from common.reporting import Table, mpl, save_figure


MAML, IMAML = "MAML", "iMAML"
COLORS = {MAML: "tab:gray", IMAML: "tab:blue"}
#: In points of accuracy and in memory: what counts as the same.
SAME_ACCURACY, SAME_MEMORY = 1.0, 1.2
#: Of the first gradient of the inner problem: what may be left where a task counts as solved.
SOLVED = 0.1
Rows = Sequence[dict[str, Any]]


def sizes(memory: Rows, name: str) -> dict[int, float]:
    """Return the memory of a learner in MiB by the number of inner steps."""
    return {row["steps"]: row["memory"] for row in memory if row["measured"] == name}


def table(rows: Rows, accuracies: Mapping[str, Accuracy], memory: Rows) -> Table:
    """Return accuracy, time and memory side by side."""
    counts = sorted({row["steps"] for row in memory})
    title = "Test accuracy, meta-iterations, seconds for one, memory of a meta-gradient (MiB)"
    result = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), min_width=60)
    result.add_column("learner", no_wrap=True)
    for header in ("accuracy", "iterations", "s", *(f"{count} steps" for count in counts)):
        result.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        name = row["learner"]
        measured = sizes(memory, name)
        seconds = row["seconds"] / max(1, row["iterations"])
        cells = (f"{measured[count]:.1f}" if count in measured else "" for count in counts)
        result.add_row(
            name, str(accuracies[name]), str(row["iterations"]), f"{seconds:.2f}", *cells
        )
    return result


def claims(
    accuracies: Mapping[str, Accuracy], memory: Rows, unsolved: float
) -> list[dict[str, Any]]:
    """Say what was shown, with the difference paired by task."""
    gain = accuracies[IMAML] - accuracies[MAML]
    own, other = sizes(memory, IMAML), sizes(memory, MAML)
    text = ", ".join(f"{count} steps {size:.1f}" for count, size in own.items())
    plain = ", ".join(f"{count} steps {size:.1f}" for count, size in other.items())
    least, most = min(own), max(own)
    return [
        {
            "claim": "iMAML learns unseen classes as well as MAML, within a point",
            "measured": f"{accuracies[IMAML]} against {accuracies[MAML]}, difference over the same "
            f"{len(gain.values)} tasks {gain.estimate:.2f} points",
            "holds": gain.mean > -SAME_ACCURACY,
        },
        {
            "claim": "the memory of iMAML does not grow with inner steps",
            "measured": f"iMAML {text} MiB; MAML {plain}",
            "holds": own[most] < SAME_MEMORY * own[least] + 1,
        },
        {
            "claim": "the inner steps come near the solution that is differentiated",
            "measured": f"{100 * unsolved:.1f} % of the inner problem's first gradient is left",
            "holds": unsolved < SOLVED,
        },
    ]


def draw(path: Path, rows: Rows, accuracies: Mapping[str, Accuracy], memory: Rows) -> None:
    """Draw accuracy and memory over the number of inner steps."""
    mpl.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = [row["learner"] for row in rows]
    means = [accuracies[name].mean for name in names]
    errors = [accuracies[name].half_width for name in names]
    left.barh(names, means, xerr=errors, color=[COLORS[name] for name in names], capsize=4)
    for index, mean in enumerate(means):
        left.text(2, index, f"{mean:.1f} %", va="center", color="white", weight="bold")
    left.set(xlabel="accuracy on unseen classes (%), 95 % interval", xlim=(0, 100))
    for name in names:
        measured = sizes(memory, name)
        right.plot(list(measured), list(measured.values()), "o-", color=COLORS[name], label=name)
    right.set(xlabel="inner steps", ylabel="memory of a meta-gradient (MiB)")
    right.set(xscale="log", yscale="log")
    right.grid(alpha=0.3)
    right.legend()
    save_figure(figure, path, dpi=110)
    plt.close(figure)
