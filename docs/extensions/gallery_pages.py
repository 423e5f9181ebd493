"""A page for each example: what it shows, its claims as measured, its figures, its source."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extensions.files import Folder, table


#: Programs in the folder that are no examples themselves.
TOOLS = {"reproduce"}


@dataclass
class Example:
    """What the project knows of one example."""

    path: Path
    docstring: str
    figures: list[Path]
    results: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The name of its page."""
        return self.path.stem

    @property
    def title(self) -> str:
        """The first line of its docstring."""
        return self.docstring.partition("\n")[0].rstrip(".")


def examples(root: Path) -> list[Example]:
    """Return the examples of a project, in the order of their names."""
    paths = [p for p in sorted((root / "examples").glob("*.py")) if p.stem not in TOOLS]
    sources = {path: path.read_text(encoding="utf-8") for path in paths}
    figures = _figures(root, sources)
    found = []
    for path, source in sources.items():
        docstring = ast.get_docstring(ast.parse(source))
        if docstring is None:
            raise ValueError(f"{path} has no docstring; the gallery is made of those.")
        found.append(Example(path, docstring, figures[path], _results(root, path.name)))
    return found


def _figures(root: Path, sources: dict[Path, str]) -> dict[Path, list[Path]]:
    """Give each picture to the example whose name it begins with, or that names its data."""
    figures: dict[Path, list[Path]] = {path: [] for path in sources}
    for picture in sorted((root / "docs" / "images").glob("*.png")):
        own = [path for path in sources if picture.stem.startswith(path.stem)]
        data = f'"{picture.stem.partition("_")[0]}"'
        named = own or [path for path, source in sources.items() if data in source]
        if named:
            figures[max(named, key=lambda path: len(path.stem))].append(picture)
    return figures


def _results(root: Path, script: str) -> list[dict[str, Any]]:
    """Return what the runs of a script gave, as ``examples/reproduce.py`` keeps it."""
    paths = sorted((root / "examples" / "results").glob("*.json"))
    runs = [{"name": p.stem, **json.loads(p.read_text(encoding="utf-8"))} for p in paths]
    return [run for run in runs if run["command"].split()[1] == f"examples/{script}"]


# Pages -----------------------------------------------------------------------------------------


def write(root: Path, pages: Folder) -> None:
    """Write the page of each example and the gallery."""
    found = examples(root)
    for example in found:
        pages.write(f"{example.name}.md", _page(example))
    pages.write("index.md", _index(root, found))


def _index(root: Path, found: list[Example]) -> str:
    text = """# Gallery

Programs that reproduce what papers claim, each in one file of the folder `examples`. A card shows
the first claim of the paper and what was measured here; its page has all of them, those included
that were not reproduced. Intervals are 95 % over seeds or tasks, times those of one run on a shared
machine with two cores.

::::{grid} 1 2 2 2
:gutter: 3

"""
    cards = "\n".join(map(_card, found))
    entries = "\n".join(example.name for example in found)
    return f"{text}{cards}\n::::\n\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"


def _card(example: Example) -> str:
    """Return a card: figure, claim, result; of the run that a figure is named after, if one is."""
    figures, runs = {figure.stem: figure for figure in example.figures}, example.results
    run = next((run for run in runs if run["name"] in figures), runs[0] if runs else None)
    figure = figures.get(run["name"]) if run else None
    figure = figure or next(iter(example.figures), None)
    text = f":::{{grid-item-card}} {example.title}\n:link: {example.name}\n:link-type: doc\n"
    if figure is not None:
        text += f":img-top: ../images/{figure.name}\n"
    if run is None:
        return f"{text}\n{_first_sentence(example.docstring)}\n:::\n"
    claim = run["claims"][0]
    doubt = "" if claim["holds"] else " (**not reproduced**)"
    text += (
        f"\n{claim['claim'][0].upper()}{claim['claim'][1:]}.\n\n**{claim['measured']}**{doubt}\n"
    )
    claims = [claim for run in runs for claim in run["claims"]]
    held, seconds = sum(claim["holds"] for claim in claims), sum(run["seconds"] for run in runs)
    return f"{text}\n*{held} of {len(claims)} claims hold, {seconds:.0f} seconds*\n:::\n"


def _first_sentence(docstring: str) -> str:
    paragraphs = docstring.split("\n\n")
    text = paragraphs[1] if len(paragraphs) > 1 and not paragraphs[1].startswith(" ") else ""
    return as_markdown(re.split(r"(?<=\.)\s", text.replace("\n", " "))[0])


def _page(example: Example) -> str:
    body = example.docstring.partition("\n")[2].strip("\n")
    text = f"# {example.title}\n\n{as_markdown(body)}\n"
    if example.results:
        text += "\n## What was measured\n\n" + "\n".join(map(claims_table, example.results))
    for figure in example.figures:
        text += f"\n![Figure of {example.name}](../images/{figure.name})\n"
    source = f"../../examples/{example.path.name}"
    text += f"\n## Source\n\n:::{{dropdown}} `examples/{example.path.name}`\n"
    return f"{text}```{{literalinclude}} {source}\n:language: python\n```\n:::\n"


def claims_table(run: dict[str, Any]) -> str:
    """Return the claims of a paper beside what a run measured."""
    rows = [["claim", "measured", "holds"]]
    for row in run["claims"]:
        rows.append([row["claim"], row["measured"], "yes" if row["holds"] else "**no**"])
    cells = [[cell.replace("|", "/") for cell in row] for row in rows]
    return f"`{run['command']}`, {run['seconds']:.0f} seconds:\n\n{table(cells)}"


def as_markdown(text: str) -> str:
    """Return docstring text as Markdown: indented lines are commands, addresses are links."""
    lines, inside = [], False
    for line in text.splitlines():
        indented = line.startswith("    ") or (inside and not line.strip())
        if indented != inside:
            lines.append("```bash" if indented else "```")
            inside = indented
        lines.append(line.removeprefix("    ") if indented else _prose(line))
    if inside:
        lines.append("```")
    # an empty line before the end of a block belongs after it
    return re.sub(r"\n\n```(\n|\Z)", r"\n```\n\1", "\n".join(lines))


def _prose(line: str) -> str:
    line = re.sub(r"::$", ":", line)  # reStructuredText announces an indented block so
    line = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", line).replace("``", "`")
    return re.sub(r"(https?://[^\s),;]*[^\s),;.])", r"<\1>", line)
