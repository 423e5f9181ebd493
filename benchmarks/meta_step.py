"""The meta-step of MAML with inner Adam, against peers: ``python -m benchmarks.meta_step``.

All sides run in one interleaved run, each in its own process and environment. Before anything is
timed, their meta-gradients are compared with the reference's, in float64 and float32, where all
definitions of Adam agree; and, as a remark, in float64 with the numbers that are timed
(see problems.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import import_time, machine
from benchmarks.install_peers import ROOT, python_of
from benchmarks.pairing import CLOCKS, Side, WorkerError, WorkerProcess, interleave, paired_ratio
from benchmarks.problems import NETWORKS


HERE = Path(sys.executable)
SIDES = (
    Side("torchopt", "torchopt_now", HERE),
    Side("higher", "higher_peer", python_of("higher")),
    Side("torchopt-0.7.3", "torchopt_073", python_of("torchopt073")),
    Side("floor", "floor", HERE),
)
#: Not compared: the floor does another update.
OTHER_UPDATE = ("floor",)
#: Name of a comparison -> precision, and which numbers of Adam (in problems.py).
CHECKS = {
    "same f64": ("float64", "COMPARED"),
    "same f32": ("float32", "COMPARED"),
    "as timed": ("float64", "TIMED"),
}
INSTALL = "python -m benchmarks.install_peers"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its table and write its results."""
    options = _parser().parse_args(arguments)
    results: dict[str, Any] = {
        "benchmark": "meta_step",
        "machine": machine.facts(),
        "torch": torch.__version__,
        "threads": options.threads,
        "rounds": options.rounds,
        "restarts": options.restarts,
        "reference": options.reference,
    }
    sides = [side for side in SIDES if not options.sides or side.name in options.sides]
    sides += [Side(name, "torchopt_now", HERE, path) for name, path in options.variant]
    if options.import_time:
        results["import_time"] = measure_imports()
    if options.rounds:
        results["problems"] = measure_all(sides, options)
    results["machine"]["load_average_after"] = machine.facts()["load_average"]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nWritten to {options.json}")
    return 0


def measure_all(sides: Sequence[Side], options: argparse.Namespace) -> dict[str, Any]:
    """Return the results of every problem and print each as it is ready."""
    measured = {}
    for problem in options.problems:
        measured[problem] = measure(problem, sides, options)
        print(table(problem, measured[problem], options), flush=True)
    return measured


def measure(
    problem: str, sides: Sequence[Side], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Return the figures of every side of one problem.

    The rounds are spread over fresh processes: how a process has laid out its memory alone makes
    one and the same side up to 20 % faster or slower for as long as that process lives.
    """
    seconds: dict[str, dict[str, list[float]]] = {clock: {} for clock in CLOCKS}
    rows: dict[str, dict[str, Any]] = {}
    for restart in range(options.restarts):
        workers, absent = start(sides, options.threads)
        try:
            if restart == 0:
                differences = compare(workers, problem, options.reference)
                rows = {
                    name: {**worker.facts, "relative_difference": differences[name]}
                    for name, worker in workers.items()
                }
                rows.update({name: {"absent": why} for name, why in absent.items()})
            for worker in workers.values():
                worker.ask("build", problem=problem, dtype="float32", adam="TIMED")
            rounds = -(-options.rounds // options.restarts)
            timed = interleave(workers, rounds, options.warmup, seed=restart)
        finally:
            for worker in workers.values():
                worker.close()
        for clock, columns in timed.items():
            for name, column in columns.items():
                seconds[clock].setdefault(name, []).extend(column)
    for name, figures in summarise(seconds, options.reference).items():
        rows[name].update(figures)
    return rows


def start(sides: Sequence[Side], threads: int) -> tuple[dict[str, WorkerProcess], dict[str, str]]:
    """Return a fresh process for every side, and why the others have none."""
    workers: dict[str, WorkerProcess] = {}
    absent: dict[str, str] = {}
    for side in sides:
        if not side.installed:
            absent[side.name] = f"not installed; run {INSTALL}"
            continue
        try:
            workers[side.name] = WorkerProcess(side, threads)
        except WorkerError as error:
            print(error, file=sys.stderr)
            absent[side.name] = "does not start here; its traceback is above"
    return workers, absent


def compare(
    workers: Mapping[str, WorkerProcess], problem: str, reference: str
) -> dict[str, dict[str, float]]:
    """Return how far each side's first meta-gradient is from the reference, for each check."""
    differences: dict[str, dict[str, float]] = {name: {} for name in workers}
    with tempfile.TemporaryDirectory() as folder:
        for check, (dtype, adam) in CHECKS.items():
            for name, worker in workers.items():
                worker.ask("build", problem=problem, dtype=dtype, adam=adam)
                worker.ask("gradient", path=str(Path(folder) / name))
            grads = {name: torch.load(Path(folder) / name) for name in workers}
            for name in workers:
                if reference in grads and name not in OTHER_UPDATE:
                    difference = relative_difference(grads[name], grads[reference])
                    differences[name][check] = difference
    return differences


def relative_difference(own: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Return the norm of the difference of two gradients over the norm of the second."""
    flat, wanted = (torch.cat([g.double().flatten() for g in grads]) for grads in (own, other))
    return float((flat - wanted).norm() / wanted.norm())


def summarise(
    seconds: Mapping[str, Mapping[str, list[float]]], reference: str
) -> dict[str, dict[str, Any]]:
    """Return medians and paired ratios, by side and clock."""
    summary: dict[str, dict[str, Any]] = {}
    for clock, columns in seconds.items():
        for name, own in columns.items():
            row: dict[str, Any] = {"median_ms": statistics.median(own) * 1000}
            for other in (reference, "floor"):
                if other in columns:
                    row[f"vs_{other}"] = dataclasses.asdict(paired_ratio(own, columns[other]))
            row["seconds"] = [round(s, 6) for s in own]
            summary.setdefault(name, {})[clock] = row
    return summary


def table(problem: str, rows: Mapping[str, Mapping[str, Any]], options: Any) -> str:
    """Return the results of one problem as aligned text."""
    others = list(dict.fromkeys([options.reference, "floor"]))
    head = ["side", "version", f"{options.clock} ms", *(f"vs {o} (95 %)" for o in others), *CHECKS]
    lines = [head]
    for name, row in rows.items():
        if "absent" in row:
            lines.append([name, row["absent"]])
            continue
        timed = row[options.clock]
        ratios = [timed.get(f"vs_{other}") for other in others]
        diffs = [row["relative_difference"].get(check) for check in CHECKS]
        lines.append(
            [name, row["version"], f"{timed['median_ms']:.1f}"]
            + [f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" if r else "-" for r in ratios]
            + ["-" if d is None else f"{d:.1e}" for d in diffs]
        )
    full = [line for line in lines if len(line) == len(head)]
    widths = [max(len(line[k]) for line in full) for k in range(len(head))]
    widths[0] = max(len(line[0]) for line in lines)
    # zip ends with the shorter: the line of an absent side has two cells only
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in lines]
    title = f"\n{problem}: {options.rounds} rounds, {options.threads} thread(s)"
    return "\n".join([title, *(line.rstrip() for line in text)])


def measure_imports() -> dict[str, Any]:
    """Return and print what importing the library costs beyond torch."""
    measured: dict[str, Any] = {}
    for side in SIDES:
        if side.module not in ("torchopt_now", "torchopt_073"):
            continue
        if not side.installed:
            print(f"import of {side.name}: not installed; run {INSTALL}")
            measured[side.name] = {"absent": "not installed"}
            continue
        measured[side.name] = row = import_time.summary(
            import_time.import_milliseconds(side.python)
        )
        print(
            f"import of {side.name} beyond torch: median {row['median_ms']:.1f} ms "
            f"({row['min_ms']:.1f} to {row['max_ms']:.1f}), limit {row['limit_ms']:.0f} ms: "
            f"{'kept' if row['ok'] else 'EXCEEDED'}"
        )
    return measured


def _variant(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not (Path(path) / "torchopt").is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER with a torchopt in FOLDER")
    return name, str(Path(path).resolve())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.meta_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [side.name for side in SIDES]
    add = parser.add_argument
    add("--problems", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    add("--sides", nargs="+", choices=names, help="only these")
    add("--reference", default="higher", help="side that the first ratio and the check refer to")
    add("--rounds", type=int, default=30, help="0 leaves the meta-step out")
    add("--restarts", type=int, default=3, help="fresh processes that the rounds are spread over")
    add("--warmup", type=int, default=2, help="rounds that do not count")
    add("--clock", choices=CLOCKS, default="wall", help="what the table shows; JSON has both")
    add("--threads", type=int, default=1)
    add(
        "--variant",
        type=_variant,
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="also measure the copy of torchopt in FOLDER, to try a change",
    )
    add("--import-time", action="store_true", help="also measure import torchopt")
    add("--json", type=Path, default=ROOT / "benchmarks/results/meta_step.json", metavar="PATH")
    return parser


if __name__ == "__main__":
    sys.exit(main())
