"""Cut a font for formulas down to what they use, so that they look alike in every browser."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fontTools import subset
from sphinx.application import Sphinx


#: Letters, Greek, mathematical alphabets, operators, arrows; what formulas are made of.
RANGES = (
    (0x20, 0x7E),
    (0xA0, 0xFF),
    (0x300, 0x338),
    (0x370, 0x3FF),
    (0x2010, 0x2044),
    (0x2102, 0x213F),
    (0x2190, 0x21FF),
    (0x2200, 0x22FF),
    (0x2308, 0x230B),
    (0x27E8, 0x27EB),
    (0x1D400, 0x1D7FF),
)


def _font() -> Path:
    spec = importlib.util.find_spec("ziamath")
    if spec is None or spec.origin is None:
        raise ImportError('The site needs ziamath for its font: pip install "torchopt[docs]".')
    return Path(spec.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"


def write_font(app: Sphinx, error: Exception | None) -> None:
    """Write ``_static/math.woff``: STIX Two Math (SIL Open Font License), as ziamath ships it."""
    target = Path(app.outdir) / "_static" / "math.woff"
    if error is not None or app.builder.format != "html" or target.exists():
        return
    options = subset.Options(flavor="woff", layout_features=["*"], notdef_outline=True)
    options.drop_tables += ["DSIG"]
    font = subset.load_font(str(_font()), options)
    cut = subset.Subsetter(options)
    cut.populate(unicodes=[c for low, high in RANGES for c in range(low, high + 1)])
    cut.subset(font)
    subset.save_font(font, str(target), options)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register."""
    app.connect("build-finished", write_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
