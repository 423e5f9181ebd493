"""Let the links of the pages lead somewhere in a clone too, where nothing has been generated.

A page links to ``../tutorials/8_long_unrolls.md``, which is a file of the project. The site has a
copy of it in its own folder, so the link is changed when Sphinx reads the page.
"""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from extensions.files import change_links
from extensions.project_pages import PROJECT


#: Files of the project -> the pages of the site that stand for them.
PAGES = {
    "tutorials/README.md": "tutorials/index.md",
    "examples/README.md": "gallery/index.md",
    **{source: f"project/{name}" for source, name in PROJECT.items()},
}


def for_the_site(text: str, docname: str) -> str:
    """Return a page with links that lead to pages of the site.

    Args:
        text: The page, in Markdown.
        docname: Its place in the docs folder, without the ending.
    """
    folder = posixpath.dirname(docname)

    def change(target: str) -> str:
        path, mark, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join("docs", folder, path))
        if place.startswith("docs/"):
            return target
        page = PAGES.get(place, place)  # a tutorial has the same place in both
        return posixpath.relpath(page, folder or ".") + mark + anchor

    return change_links(text, change)


def change_page(app: Sphinx, docname: str, content: list[str]) -> None:
    """Change the links of a page that is written by hand; generated ones are for the site."""
    generated = ("api/", "gallery/", "project/", "tutorials/")
    if not docname.startswith(generated) and Path(app.env.doc2path(docname)).suffix == ".md":
        content[0] = for_the_site(content[0], docname)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register."""
    app.connect("source-read", change_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
