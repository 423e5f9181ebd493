"""Write the generated pages before Sphinx looks for sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

from extensions import api_pages, benchmark_page, gallery_pages, project_pages, unroll_page
from extensions.files import Folder
from extensions.symbols import symbols


logger = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]


def generate(docs: Path) -> None:
    """Write all pages; those of symbols and examples that are gone are removed."""
    for folder, write in (
        ("api", api_pages.write),
        ("gallery", gallery_pages.write),
        ("tutorials", project_pages.write_tutorials),
        ("project", project_pages.write_project),
        ("generated", figures),
    ):
        with Folder(docs / folder) as pages:
            write(ROOT, pages)


def figures(root: Path, pages: Folder) -> None:
    """Write tables and pictures of what was measured."""
    benchmark_page.write(root, pages)
    unroll_page.write(root, pages)


def prepare(app: Sphinx) -> None:
    """Write the pages and run the examples in docstrings."""
    generate(Path(app.srcdir))
    for problem in api_pages.failing_examples(symbols()):
        logger.warning("%s", problem)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register."""
    app.connect("builder-inited", prepare)
    # before napoleon (500), which reads the sections
    app.connect("autodoc-process-docstring", api_pages.complete_docstring, priority=400)
    app.connect("autodoc-process-signature", api_pages.name_aliases)
    app.connect("missing-reference", api_pages.resolve_internal_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
