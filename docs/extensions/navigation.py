"""Draw the navigation of the API pages once, and mark on each where it is.

Furo draws the tree of the whole site for each page, in a tenth of a second: with hundreds of API
pages that is much of the time that the site takes. In one folder the trees differ in two entries.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx


INDEX = "api/index"
TREE = "furo_navigation_tree"
drawn: dict[str, str] = {}


def leave_out(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Let furo draw an empty tree for pages that get a copy."""
    if is_symbol(pagename):
        context["toctree"] = lambda **options: ""


def copy(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Keep the tree of the index; give it to the page of a symbol."""
    if pagename == INDEX:
        drawn[INDEX] = context[TREE]
    elif is_symbol(pagename):
        context[TREE] = marked(drawn[INDEX], pagename.partition("/")[2])


def is_symbol(pagename: str) -> bool:
    """Whether the tree of a page is that of the index, which is written before."""
    return pagename.startswith("api/torchopt.") and INDEX in drawn


def marked(tree: str, page: str) -> str:
    """Return the index's tree with another page as the present one.

    Raises:
        ValueError: If the tree is not what it is known to be.
    """
    plain, here = '><a class="reference internal" href=', ' current-page"><a class="current '
    here += 'reference internal" href="#">'
    index = rf'(<li class="[^"]*){re.escape(here)}(.*?)<ul>'
    tree, one = re.subn(index, rf'\1"{plain}"index.html">\2<ul class="current">', tree, flags=re.S)
    entry = re.escape(f'"{plain}"{page}.html">')
    tree, other = re.subn(rf'(<li class="toctree-l\d){entry}', rf"\1 current{here}", tree)
    if (one, other) != (1, 1):
        raise ValueError(f"The navigation has {one} present pages and {other} entries of {page}.")
    return tree


def setup(app: Sphinx) -> dict[str, Any]:
    """Register, before and after furo (500)."""
    app.connect("html-page-context", leave_out, priority=400)
    app.connect("html-page-context", copy, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
