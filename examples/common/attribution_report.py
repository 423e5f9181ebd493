"""Table, claims and figure of ``examples/data_attribution.py``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.attribution import Run, correlation, rank_correlation, subsets
from common.command import Jobs
from common.reporting import Table, console, mpl, print_claims, save_figure


PROBLEMS = ("digits", "text")
METHODS = ("exact", "TracIn")


class Compared:
    """Predicted and true changes of the loss on one problem.

    Attributes:
        true: The change for each subset that was left out.
        predicted: By method, the same to first order.
    """

    def __init__(self, args: argparse.Namespace, rows: dict[str, Any], problem: str) -> None:
        losses = torch.tensor(rows[f"{problem} retrained"]["losses"], dtype=torch.float64)
        self.true = losses[1:] - losses[0]
        chosen = subsets(args.subsets, args.examples, args.share, args.seed).double()
        self.derivatives = {
            method: torch.tensor(rows[f"{problem} {method}"]["derivatives"], dtype=torch.float64)
            for method in METHODS
        }
        self.predicted = {m: -(chosen @ d) for m, d in self.derivatives.items()}

    def scores(self, method: str) -> dict[str, float]:
        """Return correlations of predicted and true changes, and the relative error.

        The error is that of how subsets differ: that there are fewer examples, which they have in
        common, is no effect of first order under an optimizer that divides by the gradient's size.
        """
        predicted, true = self.predicted[method], self.true
        difference = (predicted - predicted.mean()) - (true - true.mean())
        return {
            "pearson": correlation(predicted, true),
            "spearman": rank_correlation(predicted, true),
            "error": (difference.norm() / (true - true.mean()).norm()).item(),
        }


def report(
    args: argparse.Namespace,
    jobs: Jobs,
    runs: dict[str, Run],
    rows: dict[str, Any],
    killed: dict[str, Any] | None,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Print table and claims, draw the figure, and return what is in ``results.json``.

    Args:
        args: The command line.
        jobs: Where results go.
        runs: The training run of each problem.
        rows: What each part gave, by problem and part.
        killed: What became of the run that was killed; ``None`` if there was none.
        about: Settings and seconds of the run.
    """
    compared = {problem: Compared(args, rows, problem) for problem in PROBLEMS}
    console.print(_table(args, runs, rows, compared))
    marked = _marked(runs["digits"], compared["digits"].derivatives["exact"])
    claims = print_claims(_claims(args, runs, compared, killed, marked), args.quick)
    scores = {p: {m: compared[p].scores(m) for m in METHODS} for p in PROBLEMS}
    results = {**about, "claims": claims, "scores": scores, "killed": killed, "marked": marked}
    _draw(args.output / "figure.png", compared)
    jobs.save_results(results)
    console.print(f"Figure, metrics and results are in {args.output}.")
    return results


def _table(
    args: argparse.Namespace, runs: dict[str, Run], rows: dict[str, Any], compared: dict[str, Any]
) -> Table:
    title = f"Changes of the held-out loss without {args.share:.0%} of the examples"
    result = Table(title=f"{title}, {args.subsets} subsets", title_justify="left")
    result.add_column("training run")
    result.add_column("predicted by")
    for name in ("correlation", "of ranks", "relative error", "seconds"):
        result.add_column(name, justify="right")
    for problem in PROBLEMS:
        for method in METHODS:
            scores = compared[problem].scores(method)
            result.add_row(
                f"{problem}, {runs[problem].steps} steps" if method == "exact" else "",
                "the metagradient" if method == "exact" else method,
                f"{scores['pearson']:.3f}",
                f"{scores['spearman']:.3f}",
                f"{scores['error']:.2f}",
                f"{rows[f'{problem} {method}']['seconds']:.0f}",
            )
        seconds = rows[f"{problem} retrained"]["seconds"]
        result.add_row("", "retraining, all at once", "", "", "", f"{seconds:.0f}")
    return result


def _marked(run: Run, derivatives: Tensor) -> dict[str, float]:
    """Return how many of the wrong labels are among the examples that did the most harm."""
    marked = run.made()[0].marked
    count = int(marked.sum())
    worst = derivatives.argsort(descending=True)[:count]
    return {"wrong": count, "found": int(marked[worst].sum()), "examples": len(marked)}


def _claims(
    args: argparse.Namespace,
    runs: dict[str, Run],
    compared: dict[str, Compared],
    killed: dict[str, Any] | None,
    marked: dict[str, float],
) -> list[dict[str, Any]]:
    claims = []
    for problem in PROBLEMS:
        exact, tracin = (compared[problem].scores(m) for m in METHODS)
        claims.append(
            {
                "claim": f"{problem}: the exact metagradient predicts what leaving examples out "
                "does better than TracIn",
                "measured": f"correlation {exact['pearson']:.3f} against {tracin['pearson']:.3f} "
                f"over {args.subsets} subsets, {runs[problem].steps} steps",
                "holds": exact["pearson"] > tracin["pearson"],
            }
        )
    share = marked["wrong"] / marked["examples"]
    claims.append(
        {
            "claim": "digits: wrong labels are among the examples that do the most harm",
            "measured": f"{marked['found']} of {marked['wrong']} among the {marked['wrong']} worst "
            f"of {marked['examples']}; by chance {share * marked['wrong']:.1f}",
            "holds": marked["found"] > 2 * share * marked["wrong"],
        }
    )
    return claims if killed is None else [*claims, _claim_of_killed(killed)]


def _claim_of_killed(killed: dict[str, Any]) -> dict[str, Any]:
    same = "every bit is the same" if killed["same"] else "the results differ"
    return {
        "claim": "killed in the forward and in the backward pass, a run continues bit for bit",
        "measured": f"{killed['steps']} steps, killed by SIGKILL in the middle of both "
        f"passes: {same}, {killed['left_files']} files left over",
        "holds": killed["killed"] and killed["same"] and not killed["left_files"],
    }


def _draw(path: Path, compared: dict[str, Compared]) -> None:
    """Draw predicted over true changes: problems side by side, methods below each other."""
    mpl.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(PROBLEMS), figsize=(9, 8), layout="constrained")
    for column, problem in enumerate(PROBLEMS):
        for row, method in enumerate(METHODS):
            panel, one = axes[row, column], compared[problem]
            scores, true = one.scores(method), one.true
            panel.plot(true, one.predicted[method], "o", color=("tab:blue", "tab:orange")[row])
            ends = [true.min().item(), true.max().item()]
            panel.plot(ends, ends, color="0.4", linewidth=1, label="predicted = true")
            name = "exact metagradient" if method == "exact" else "TracIn"
            panel.set(
                title=f"{problem}: {name}, correlation {scores['pearson']:.3f}",
                xlabel="true change of the held-out loss",
                ylabel="predicted change",
            )
            panel.locator_params(axis="x", nbins=4)  # room for the numbers
            panel.grid(alpha=0.3)
            panel.legend(fontsize="small")
    save_figure(figure, path, dpi=110)
    plt.close(figure)
