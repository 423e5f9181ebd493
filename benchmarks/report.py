"""From figures to rows: ratios, whether they reach their targets, and the table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pairing import CLOCKS, Estimate, median_of, ratio_of_medians
from benchmarks.rows import Row
from benchmarks.runner import NO_GPU


#: Results of one definition in double precision agree this far; anything else is printed.
TOLERANCE = 1e-9
#: Whether a target is met, in words; a limit has none.
VERDICTS = {True: "yes", False: "no", None: ""}


def result_of(row: Row, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a row with its estimates by clock, or with the reason why there are none."""
    result: dict[str, Any] = {
        "key": row.key,
        "row": row.case.name,
        "against": row.against,
        "target": row.target,
        "at_most": row.at_most,
        "unit": row.unit,
    }
    for name in row.sides:
        if "absent" in figures[name]:
            why = figures[name]["absent"]
            result["absent"] = why if why == NO_GPU else f"{name} {why}"
            return result
    for clock in CLOCKS:
        estimate = _estimate(row, figures, clock)
        result[clock] = {**dataclasses.asdict(estimate), "met": row.met_by(estimate.value)}
    return result


def _estimate(row: Row, figures: Mapping[str, Mapping[str, Any]], clock: str) -> Estimate:
    if row.under is None:
        return median_of(figures[row.over]["numbers"][row.number])
    over, under = (figures[name][clock]["seconds"] for name in row.sides)
    return ratio_of_medians(over, under, row.factor)


def table(results: Sequence[Mapping[str, Any]], clock: str) -> str:
    """Return the rows as aligned text."""
    lines = [["row", "against", "ratio [95 % interval]", "target", "met"]]
    for result in results:
        target = "limit"
        if result["target"] is not None:
            target = f"{'<=' if result['at_most'] else '>='} {result['target']:g}{result['unit']}"
        if "absent" in result:
            cells = [result["absent"], target, "-"]
        else:
            found = result[clock]
            estimate = Estimate(found["value"], found["low"], found["high"])
            cells = [f"{estimate}{result['unit']}", target, VERDICTS[found["met"]]]
        lines.append([result["row"], result["against"], *cells])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def differences(
    cases: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[tuple[str, str, str, float]]:
    """Return case, side, comparison and difference of all results that are not those of ours."""
    return [
        (case, name, check, difference)
        for case, figures in cases.items()
        for name, of_side in figures.items()
        for check, difference in of_side.get("relative_difference", {}).items()
        if "float64" in check and not difference <= TOLERANCE  # nan is none either
    ]


def differing(cases: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Return a sentence on every side whose results are not those of this library."""
    return [
        f"{case}: results of {name} "
        f"{'are nan' if math.isnan(difference) else f'differ by {difference:.1e}'} ({check})."
        for case, name, check, difference in differences(cases)
    ]
