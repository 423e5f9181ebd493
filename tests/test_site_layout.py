"""Pages of the site fit the window: of a desktop and of a phone, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from visual_browsers import needs_browser


SITE = Path(__file__).resolve().parents[1] / "build" / "docs"
PAGES = (
    *("index", "catalogue", "getting_started", "how_to_choose", "performance", "long_unrolls"),
    *("gallery/index", "coming_from/optax", "faq", "api/torchopt.adam", "tutorials/index"),
)
built = pytest.mark.skipif(not SITE.is_dir(), reason="the site is not built: make docs")


@needs_browser
@built
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_no_page_is_wider_than_its_window(browser: Any, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wide = {}
    for name in PAGES:
        path = SITE / f"{name}.html"
        if not path.exists():  # an older build
            continue
        page.goto(path.as_uri())
        found = page.evaluate("document.documentElement.scrollWidth")
        if found > width:
            wide[name] = found
        pictures = page.evaluate(
            "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        )
        assert not pictures, f"{name}: pictures that are not there"
    page.close()
    assert not wide, f"wider than {width} px"
    assert (SITE / "index.html").exists()
