"""Execute the pages with cells side by side, before Sphinx reads them one after another.

Each page has a kernel of its own, so that a thread that waits for it is all there is to do here.
What a page printed is handed to myst-nb by a cache that is emptied first: every build runs all.
A page that fails is left out of the cache, and myst-nb runs it once more and reports its error.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution
from myst_nb.core.read import create_nb_reader
from sphinx.application import Sphinx


def execute(app: Sphinx) -> None:
    """Run all pages with cells and put what they print into the cache."""
    config: Any = app.env
    folder = Path(app.doctreedir).parent / "executed"
    shutil.rmtree(folder, ignore_errors=True)
    config.mystnb_config = config.mystnb_config.copy(
        execution_mode="cache", execution_cache_path=str(folder)
    )
    pages = []
    for path in sorted(Path(app.srcdir).rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        reader = create_nb_reader(str(path), config.myst_config, config.mystnb_config, text)
        if reader is not None and "{code-cell}" in text:
            pages.append((path, reader.read(text)))
    pages.sort(key=lambda page: -sum(len(cell.source) for cell in page[1].cells))  # long ones first
    cache = get_cache(folder)
    timeout = config.mystnb_config.execution_timeout

    def run(page: tuple[Path, Any]) -> tuple[Path, Any]:
        path, notebook = page
        return path, single_nb_execution(notebook, str(path.parent), timeout, False)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, result in pool.map(run, pages):
            if result.err is None:
                data = {"execution_seconds": result.time}
                bundle = CacheBundleIn(result.nb, str(path), data=data)
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register."""
    app.connect("builder-inited", execute, priority=900)  # when all pages are written
    return {"parallel_read_safe": True, "parallel_write_safe": True}
