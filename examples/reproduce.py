"""Run the examples at their default size and write what was measured into ``examples/README.md``.

    python examples/reproduce.py                 # all of them: `make examples`
    python examples/reproduce.py lola reweight   # these only; the rows of the others stay

What each run claims and measured is kept in ``examples/results/NAME.json``, from which the table
is made, so that a row can be traced to its run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoints import write_atomically
from common.endings import plain_endings
from common.options import Parser


FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
BEGIN, END = "<!-- table: written by reproduce.py -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Example:
    """One command and the paper it reproduces."""

    name: str
    script: str
    paper: str
    options: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command as a user types it."""
        return " ".join(("python", f"examples/{self.script}", *self.options))


EXAMPLES = (
    Example("functional", "functional.py", "no paper: three styles, one result"),
    Example("few_shot", "few_shot.py", "[Finn 2017](https://arxiv.org/abs/1703.03400)"),
    Example(
        "sinusoid",
        "few_shot.py",
        "[Finn 2017](https://arxiv.org/abs/1703.03400)",
        ("--data", "sinusoid"),
    ),
    Example("reweight", "reweight.py", "[Ren 2018](https://arxiv.org/abs/1803.09050)"),
    Example(
        "hyper_cleaning", "hyper_cleaning.py", "[Franceschi 2017](https://arxiv.org/abs/1703.01785)"
    ),
    Example("imaml", "imaml_few_shot.py", "[Rajeswaran 2019](https://arxiv.org/abs/1909.04630)"),
    Example("maml_rl", "maml_rl.py", "[Finn 2017](https://arxiv.org/abs/1703.03400)"),
    Example("mgrl", "mgrl.py", "[Xu 2018](https://arxiv.org/abs/1805.09801)"),
    Example(
        "lola",
        "lola.py",
        "[Foerster 2018](https://arxiv.org/abs/1709.04326), "
        "[DiCE](https://arxiv.org/abs/1802.05098)",
    ),
    Example(
        "data_attribution",
        "data_attribution.py",
        "[Engstrom 2025](https://arxiv.org/abs/2503.13751), "
        "[TracIn](https://arxiv.org/abs/2002.08484)",
    ),
)


def run(example: Example, output: Path) -> dict[str, Any]:
    """Run one example in a process of its own and return its results.

    Raises:
        ValueError: If it has failed; it has said why.
    """
    options = [*example.options, "--output", str(output), "--overwrite"]
    start = time.perf_counter()
    ended = subprocess.run([sys.executable, str(FOLDER / example.script), *options], check=False)
    if ended.returncode:
        raise ValueError(f"{example.command} has failed; the table is as the runs before left it.")
    results = json.loads((output / "results.json").read_text())
    if any(claim["holds"] is None for claim in results["claims"]):  # of a quick run, say
        raise ValueError(f"{output} holds results that are too small to judge; they are not kept.")
    seconds = round(time.perf_counter() - start)
    kept = {"command": example.command, "seconds": seconds, "claims": results["claims"]}
    text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
    write_atomically(RESULTS / f"{example.name}.json", lambda path: path.write_text(text))
    return kept


def table() -> str:
    """Return the Markdown table of everything that has been run."""
    lines = [
        "| example | paper | what is claimed | measured here | time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for example in EXAMPLES:
        path = RESULTS / f"{example.name}.json"
        if not path.exists():
            continue
        try:
            kept = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); run {example.name} again.") from error
        first = (f"`{kept['command']}`", example.paper, f"{kept['seconds']} s")
        for claim in kept["claims"]:
            held = "" if claim["holds"] else " (**not reproduced**)"
            cells = (first[0], first[1], claim["claim"], claim["measured"] + held, first[2])
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
            first = ("", "", "")
    return "\n".join(lines)


def write_table(readme: Path) -> None:
    """Replace the table in a Markdown file.

    Raises:
        ValueError: If the file has no place for it.
    """
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme} must hold the lines {BEGIN!r} and {END!r}.")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"
    write_atomically(readme, lambda path: path.write_text(new))


def main(argv: list[str] | None = None) -> None:
    """Run what is asked for."""
    names = [example.name for example in EXAMPLES]
    description = (__doc__ or "").splitlines()[0]
    parser = Parser("reproduce", description, quick=None, output=Path("runs/examples"))
    add = parser.add_argument
    add("names", nargs="*", help=f"of {', '.join(names)}; all if none is given")
    add("--output", type=Path, default=Path("runs/examples"), help="folder for the runs")
    add("--table-only", action="store_true", help="only write the table again")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.names) - set(names))
    if unknown:
        parser.error(f"there is no example {', '.join(unknown)}; there are {', '.join(names)}")
    chosen = [example for example in EXAMPLES if example.name in (args.names or names)]
    with plain_endings("reproduce"):
        RESULTS.mkdir(exist_ok=True)
        for example in [] if args.table_only else chosen:
            print(f"== {example.command}", flush=True)
            run(example, args.output / example.name)
            write_table(FOLDER / "README.md")
        write_table(FOLDER / "README.md")


if __name__ == "__main__":
    main()
