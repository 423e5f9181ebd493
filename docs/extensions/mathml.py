"""Render formulas as MathML, which browsers draw themselves: no script, no fonts, no network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging


logger = logging.getLogger(__name__)
# Names of widths that MathML Core has dropped.
WIDTHS = {"negativethinmathspace": "-0.1667em", "thinmathspace": "0.1667em"}


def to_mathml(latex: str, display: str = "inline") -> str:
    """Return a formula as MathML.

    Raises:
        ValueError: If the formula has a command that cannot be converted.
    """
    result = convert(latex, display=display)
    unknown = re.findall(r"\\[a-zA-Z]+", result)
    if unknown:
        raise ValueError(f"No MathML for {unknown} in the formula {latex!r}.")
    for name, width in WIDTHS.items():
        result = result.replace(f'"{name}"', f'"{width}"')
    return result


def lines_of(latex: str) -> list[str]:
    r"""Return the lines of a formula, which end at ``\\``; those of a matrix or of cases stay.

    Browsers ignore a break of lines inside of MathML: a formula would be one line that scrolls.
    """
    lines, depth = [""], 0
    for piece in re.split(r"(\\\\|\\begin(?={)|\\end(?={))", latex):
        depth += {r"\begin": 1, r"\end": -1}.get(piece, 0)
        if piece == r"\\" and depth == 0:
            lines.append("")
        else:
            lines[-1] += piece
    return [line.strip() for line in lines if line.strip()]


def _render(node: nodes.Element, display: str) -> str:
    try:
        return "".join(to_mathml(line, display) for line in lines_of(node.astext()))
    except Exception as error:  # whatever is wrong with a formula, say which one it is
        logger.warning("Formula %r: %s", node.astext(), error, location=node)
        return ""


def visit_math(translator: Any, node: nodes.math) -> None:
    """Write a formula that stands in a line."""
    translator.body.append(_render(node, "inline"))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    """Write a formula on a line of its own; wide ones scroll."""
    translator.body.append(f'<div class="formula">{_render(node, "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
