"""Execute the pages with cells while Sphinx reads and writes the others.

Each page has a kernel of its own, so that a thread that waits for it is all there is to do here.
What a page printed is handed to myst-nb by a cache that is emptied first: every build runs all.
A page that fails is left out of the cache, and myst-nb runs it once more and reports its error.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution
from myst_nb.core.read import create_nb_reader
from sphinx.application import Sphinx


#: Name of a page -> what runs it.
running: dict[str, Future[Any]] = {}


def start(app: Sphinx) -> None:
    """Begin to run all pages with cells, in the order in which they will be read."""
    config: Any = app.env
    folder = Path(app.doctreedir).parent / "executed"
    shutil.rmtree(folder, ignore_errors=True)
    config.mystnb_config = config.mystnb_config.copy(
        execution_mode="cache", execution_cache_path=str(folder)
    )
    timeout = config.mystnb_config.execution_timeout
    pool = ThreadPoolExecutor(os.cpu_count())
    for path in sorted(Path(app.srcdir).rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        reader = create_nb_reader(str(path), config.myst_config, config.mystnb_config, text)
        if reader is not None and "{code-cell}" in text:
            name = path.relative_to(app.srcdir).with_suffix("").as_posix()
            notebook, where = reader.read(text), str(path.parent)
            running[name] = pool.submit(single_nb_execution, notebook, where, timeout, False)
    pool.shutdown(wait=False)


def wait(app: Sphinx, docname: str, content: list[str]) -> None:
    """Put what a page printed into the cache, before it is read."""
    if docname not in running:
        return
    result = running.pop(docname).result()
    if result.err is None:
        config: Any = app.env
        bundle = CacheBundleIn(
            result.nb, app.env.doc2path(docname), data={"execution_seconds": result.time}
        )
        cache = get_cache(config.mystnb_config.execution_cache_path)
        cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register."""
    app.connect("builder-inited", start, priority=900)  # when all pages are written
    app.connect("source-read", wait)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
