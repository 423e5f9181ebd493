"""The browser that the tests of torchopt.visual.show open pages in; they skip without one."""

import shutil

import pytest
from visual_view import View


NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as library:
        running = library.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def view(browser, tmp_path):
    """Open a :class:`GraphPage`; at the end nothing was requested and the console is empty."""
    views = []

    def make(graph_page, before=None, **settings):
        path = graph_page.save(tmp_path / f"{len(views)}.html")
        views.append(View(browser, path, **settings))
        if before:
            views[-1].page.add_init_script(before)
        views[-1].load()
        return views[-1]

    yield make
    for one in views:
        one.page.close()
        assert one.complaints == []
