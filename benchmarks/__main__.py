"""Measure everything that can be measured here and print one table: ``python -m benchmarks``.

All sides of a row take turns in one run, each in a process of its own. Before anything is timed,
their results are compared, in double and single precision. Peers are installed by
``python -m benchmarks.install_peers``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, picture
from benchmarks.claims import KEYS, ROWS
from benchmarks.install_peers import ROOT
from benchmarks.pairing import CLOCKS, Side
from benchmarks.registry import OURS, SIDES, variant
from benchmarks.report import differing, result_of, table
from benchmarks.rows import Row
from benchmarks.runner import Effort, measure


JSON = ROOT / "benchmarks/results/benchmarks.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks, print their table and write what was measured."""
    options = _parser().parse_args(arguments)
    effort = Effort(options.rounds, options.restarts, options.warmup, options.threads)
    variants = [variant(name, folder) for name, folder in options.variant]
    rows = chosen_rows(options, variants)
    facts = machine.facts()
    cases = measure_all(rows, {**SIDES, **{side.name: side for side in variants}}, effort)
    facts["load_average_after"] = machine.facts()["load_average"]
    results = [result_of(row, cases[row.case.name]) for row in rows]
    print(table(results, options.clock))
    print("\n".join(["", *filter(None, [machine.busy(facts)]), *differing(cases)]))
    whole = not (options.only or options.against or variants)
    write({"machine": facts, **vars(effort), "rows": results, "cases": cases}, options, whole)
    return 0


def chosen_rows(options: argparse.Namespace, variants: Sequence[Side]) -> list[Row]:
    """Return the rows to measure, each followed by the same row about every variant."""
    rows = []
    for row in ROWS:
        if options.only and row.key not in options.only:
            continue
        if options.against and not set(row.sides) & {*options.against}:
            continue
        rows.append(row)
        if OURS in row.sides:
            rows += [row.renamed(OURS, side.name) for side in variants]
    return rows


def measure_all(
    rows: Sequence[Row], sides: Mapping[str, Side], effort: Effort
) -> dict[str, dict[str, Any]]:
    """Return the figures of every case that the rows are about, by its name."""
    measured: dict[str, dict[str, Any]] = {}
    for row in rows:
        case = row.case
        if case.name not in measured:
            print(f"measuring: {case.name}", file=sys.stderr, flush=True)
            names = dict.fromkeys(n for other in rows if other.case is case for n in other.sides)
            measured[case.name] = measure(case, [sides[name] for name in names], effort)
    return measured


def write(content: dict[str, Any], options: argparse.Namespace, whole: bool) -> None:
    """Write the figures and the picture; a part of the table only where it was asked for."""
    path = options.json or (JSON if whole else None)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"Figures: {path}")
    path = options.picture
    if path is not None:
        clock = "by the clock" if options.clock == "wall" else "processor time"
        about = f"{content['machine']['cpu']}, {content['threads']} thread(s), {clock}"
        try:
            picture.draw(content["rows"], options.clock, about, path)
        except ImportError:
            print("No picture: matplotlib is not installed (pip install matplotlib).")
        else:
            print(f"Picture: {path}")


def _variant(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder or not (Path(folder) / "torchopt").is_dir():
        raise argparse.ArgumentTypeError("NAME=FOLDER, where FOLDER contains torchopt/")
    if name in SIDES:
        raise argparse.ArgumentTypeError(f"{name!r} is the name of another side")
    return name, str(Path(folder).resolve())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, usual = parser.add_argument, Effort()
    add("--only", nargs="+", metavar="ROW", choices=KEYS, help=f"of {', '.join(KEYS)}")
    add("--against", nargs="+", metavar="SIDE", choices=list(SIDES), help="only rows with these")
    add("--rounds", type=int, default=usual.rounds, help="timings of each side (%(default)s)")
    add("--restarts", type=int, default=usual.restarts, help="processes that they are spread over")
    add("--warmup", type=int, default=usual.warmup, help="rounds of a process that do not count")
    add("--threads", type=int, default=usual.threads, help="cores of each side (%(default)s)")
    add("--clock", choices=CLOCKS, default="wall", help="what the table shows; JSON has both")
    add(
        "--variant",
        type=_variant,
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="also measure the copy of torchopt in FOLDER, to try a change",
    )
    add("--json", type=Path, metavar="PATH", help="figures; without --only they have a usual place")
    add("--picture", type=Path, metavar="PATH", help="likewise")
    return parser


if __name__ == "__main__":
    sys.exit(main())
