"""What a run shows: progress bar, table, curves, TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from common.checkpoints import write_atomically
from common.endings import missing
from common.progress import LineProgress, said_in_lines


try:
    import matplotlib as mpl
    from rich.console import Console, ConsoleDimensions
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table as Table
except ImportError as error:
    missing("The examples need rich and matplotlib", error)

UNBROKEN = 1000  # columns; rich takes a pipe for a terminal of 80


class ExampleConsole(Console):
    """A console whose output can be piped: lines stay whole, and what takes long says so."""

    @property
    def size(self) -> ConsoleDimensions:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Width and height of the terminal, if it is one."""
        size = super().size
        return size if self.is_terminal else ConsoleDimensions(UNBROKEN, size.height)

    @property
    def animated(self) -> bool:
        """Whether what was printed can be changed."""
        return self.is_terminal and not self.is_dumb_terminal

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.print(text, highlight=False, markup=False, soft_wrap=not self.is_terminal)

    def status(self, status: Any, **more: Any) -> Any:
        """Show what is being done as long as a block is not left."""
        if self.animated:
            return super().status(status, **more)
        return said_in_lines(str(status), self.say)


console = ExampleConsole()


def progress_bar() -> AbstractContextManager[Any]:
    """Return a progress bar with room for loss and accuracy; lines if it is no terminal."""
    if not console.animated:
        return LineProgress(console.say)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def results_table(title: str, rows: Sequence[tuple[str, str, str]]) -> Table:
    """Return a table of (learner, accuracy, how it was adapted)."""
    table = Table(title=title, title_justify="left")
    table.add_column("learner")
    table.add_column("test accuracy", justify="right")
    table.add_column("adapted by")
    for row in rows:
        table.add_row(*row)
    return table


VERDICTS = {True: "holds", False: "does not hold", None: "too small to judge"}


def print_claims(claims: Sequence[dict[str, Any]], quick: bool = False) -> list[dict[str, Any]]:
    """Print what papers claim and what was measured, and return what is kept of it.

    Args:
        claims: Each with ``claim``, ``measured`` and ``holds``, which is ``None`` where too little
            was measured.
        quick: Whether it was a quick run, which judges nothing.
    """
    judged = [{**claim, "holds": None} if quick else claim for claim in claims]
    for claim in judged:
        console.say(f"{VERDICTS[claim['holds']]}: {claim['claim']}\n  {claim['measured']}")
    if quick:
        console.say("This was a quick run, to see that everything works: its figures mean nothing.")
    return judged


def draw_curves(
    path: Path,
    title: str,
    metrics: Sequence[dict[str, Any]],
    results: Sequence[tuple[str, float, float]],
) -> None:
    """Draw loss and accuracy over meta-training, and the test accuracies with their intervals.

    Args:
        path: The PNG file.
        title: Title of the figure.
        metrics: Rows with ``iteration``, ``loss``, ``accuracy`` and, some of them,
            ``held_out_accuracy``.
        results: (learner, accuracy in percent, half the width of its 95 % interval).
    """
    mpl.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    figure.suptitle(title)
    iterations = [row["iteration"] for row in metrics]
    for axes, name in ((left, "loss"), (middle, "accuracy")):
        values = [row[name] for row in metrics]
        axes.plot(iterations, values, color="tab:blue", alpha=0.2, linewidth=0.5)
        axes.plot(iterations, _running_mean(values), color="tab:blue", label="training classes")
    left.set(xlabel="meta-iteration", ylabel="query loss", yscale="log")
    tested = [row for row in metrics if "test_accuracy" in row]
    if tested:
        middle.plot(
            [row["iteration"] for row in tested],
            [row["test_accuracy"] for row in tested],
            color="tab:orange",
            marker="o",
            markersize=3,
            label="unseen classes",
        )
    middle.set(xlabel="meta-iteration", ylabel="accuracy after adaptation (%)", ylim=(0, 101))
    middle.legend(loc="lower right")
    names = [name for name, _, _ in results][::-1]
    right.barh(
        names,
        [mean for _, mean, _ in results][::-1],
        xerr=[half for _, _, half in results][::-1],
        color=["tab:blue"] + ["tab:gray"] * (len(results) - 1),  # bottom to top
        capsize=4,
    )
    for index, (_, mean, _) in enumerate(results[::-1]):
        right.text(2, index, f"{mean:.1f} %", va="center", color="white", weight="bold")
    right.set(xlabel="accuracy on unseen classes (%), 95 % interval", xlim=(0, 100))
    for axes in (left, middle):
        axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure into a file, at once or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix(".") or "png", dpi=dpi)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def _running_mean(values: Sequence[float]) -> list[float]:
    """Smooth a noisy curve: the mean of the last fiftieth of its points."""
    window = max(1, len(values) // 50)
    means = []
    for index in range(len(values)):
        recent = values[max(0, index + 1 - window) : index + 1]
        means.append(sum(recent) / len(recent))
    return means


def tensorboard_writer(folder: Path) -> Any:
    """Return a TensorBoard writer.

    Raises:
        ImportError: If TensorBoard is not installed, naming the extra.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            '--tensorboard needs TensorBoard: pip install "torchopt[tensorboard]"'
        ) from error
    return SummaryWriter(str(folder))
