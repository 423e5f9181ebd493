"""Link inline code that is the name of a public symbol to its page."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from extensions.symbols import symbols


NAMES = {name: s.name for s in symbols() for name in (s.name, *s.aliases)}


class LinkSymbols(SphinxTransform):
    """Make a link of ``torchopt.adam``, ``torchopt.adam()`` and ``torchopt.adam(lr=0.1)``."""

    default_priority = 300

    def apply(self, **_: Any) -> None:
        """Wrap the literals of this document."""
        for literal in list(self.document.findall(nodes.literal)):
            # before a call or at the end
            match = re.fullmatch(r"(torchopt(?:\.\w+)+)(?:\(.*\))?", literal.astext())
            target = NAMES.get(match[1]) if match else None
            inside = isinstance(literal.parent, (nodes.reference, pending_xref, nodes.title))
            if target is None or inside:
                continue
            link = pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=target,
                refdoc=self.env.docname,
                refwarn=True,
            )
            literal.replace_self(link)
            link += literal


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the transform."""
    app.add_transform(LinkSymbols)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
