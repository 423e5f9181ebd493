"""The graph behind a loss as one HTML file to look at, offline or in a notebook."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
import os
import re
import tempfile
import webbrowser
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from torchopt.visual.contract import with_cut_leaves_grouped
from torchopt.visual.graph import Graph, build
from torchopt.visual.lanes import homes
from torchopt.visual.names import named_tensors


#: In this order they make up the page's script; each may use what stands before it.
_SCRIPTS = (
    *("dom", "model", "lane", "layout", "geometry", "rows", "scene", "selection"),
    *("draw", "draw_frame", "camera", "panel", "search", "strip", "page", "start"),
)


class GraphPage:
    """A picture of a graph: shown by notebooks, saved as one HTML file, or opened in a browser.

    Attributes:
        graph: The :class:`~torchopt.visual.graph.Graph` that it shows.
        html: The page, complete in itself: it loads nothing and sends nothing.
        path: The file it was last saved in, or ``None``.
        height: Its height in a notebook, in pixels; it may be set.
    """

    def __init__(self, graph: Graph, unreached: Sequence[str] = (), title: str = "Graph") -> None:
        self.graph = graph
        self.html = page(graph, unreached, title)
        self.path: Path | None = None
        self.height = 640

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page into a file, at once or not at all, and return where it is.

        Raises:
            FileNotFoundError: If the folder does not exist.
            PermissionError: If nothing can be written there.
            IsADirectoryError: If ``path`` is a folder.
        """
        with _reserved(path) as temporary:
            return self._write(temporary, Path(path))

    def _write(self, temporary: Path, path: Path) -> Path:
        temporary.write_bytes(self.html.encode())
        os.replace(temporary, path)
        self.path = path.resolve()
        return self.path

    def open(self) -> Path:
        """Open the page in the web browser, from a temporary file unless it has been saved.

        Returns:
            The file that was opened.
        """
        if self.path is None or not self.path.exists():
            self.save(Path(tempfile.mkdtemp(prefix="torchopt-")) / "graph.html")
        assert self.path is not None
        webbrowser.open(self.path.as_uri())
        return self.path

    def _repr_html_(self) -> str:
        """Show it in a notebook: in a frame of its own, which may run scripts and nothing else."""
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" '
            f'title="Graph of a loss" style="width: 100%; height: {int(self.height)}px; '
            'border: 1px solid #8884; border-radius: 6px"></iframe>'
        )

    def __repr__(self) -> str:
        where = f"saved in {self.path}" if self.path else "not saved: .save(path) or .open()"
        return f"GraphPage({summary(self.graph)}; {where})"


def show(
    var: Tensor | Sequence[Tensor],
    params: Any = None,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "Graph",
) -> GraphPage:
    """Show the graph behind a loss as an interactive page, made for unrolled inner loops.

    The page opens with one box for each step of the loop, in rows that fill the window, from the
    first step to the loss. A step opens on a click; a parameter is found by its name; selecting it
    lights every path between it and the loss and marks where paths are cut. After each of these
    the picture is fitted again.
    In a notebook, the returned object is the picture. Nothing is written unless ``path`` is given;
    in a script, ``show(loss, params).open()`` opens a browser.

    Args:
        var: What was computed, such as a loss; or several tensors.
        params: Names of tensors; see :func:`torchopt.visual.make_dot`. Tensors that require grad
            and that ``var`` does not depend on are listed as not reached.
        path: A file to write the page into. It is one HTML file that needs no network.
        title: The heading of the page.

    Raises:
        TypeError: If ``var`` or ``params`` is of another kind.
        ValueError: If ``var`` has no graph.
        OSError: If ``path`` cannot be written; this is found before the graph is read.

    Example:
        >>> import torch, torchopt.visual
        >>> net = torch.nn.Linear(2, 1)
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> x = torch.ones(3, 2)
        >>> with torchopt.inner_loop(net, torchopt.sgd(lr)) as inner:
        ...     for _ in range(2):
        ...         inner.step(net(x).square().mean())
        ...     loss = net(x).square().mean()
        >>> page = torchopt.visual.show(loss, {"lr": lr, "net": net})
        >>> len(page.html) > 10_000, page.path
        (True, None)
    """
    names = list(params) if isinstance(params, Iterator) else params  # it is read twice
    if path is None:
        return _made(var, names, title)
    with _reserved(path) as temporary:
        made = _made(var, names, title)
        made._write(temporary, Path(path))
    return made


def _made(var: Any, params: Any, title: str) -> GraphPage:
    graph = with_cut_leaves_grouped(build(var, params)).graph
    known = {name for node in graph.nodes if node.name for name in node.name.split("\n")}
    named = named_tensors(params)
    unreached = dict.fromkeys(n for n, x in named if x.requires_grad and n not in known)
    return GraphPage(graph, list(unreached), title)


@contextlib.contextmanager
def _reserved(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty file beside ``path``, to be moved there once it is complete."""
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise IsADirectoryError(f"path must name a file, and {target} is a folder.")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The folder {folder} of path={str(path)!r} is none; create it first."
        )
    try:
        handle, name = tempfile.mkstemp(".html", f".{target.name}-", folder)
    except OSError as error:
        raise PermissionError(
            f"No file can be written in {folder} ({error.strerror}); choose another path."
        ) from error
    os.close(handle)
    os.chmod(name, 0o644)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def summary(graph: Graph) -> str:
    """Return the size of a graph in words."""
    steps = sum(node.kind == "step" for node in graph.nodes)
    autograd = sum(node.members for node in graph.nodes if node.kind not in ("value", "result"))
    words = [(steps, "optimizer step"), (autograd, "autograd node"), (len(graph.nodes), "box")]
    plural = {"box": "boxes"}
    return ", ".join(
        f"{count:,} {word if count == 1 else plural.get(word, word + 's')}" for count, word in words
    )


def page(graph: Graph, unreached: Sequence[str] = (), title: str = "Graph") -> str:
    """Return the page of a graph as HTML.

    Everything is inside it, and its content security policy, which names the two scripts and the
    style by their hashes, forbids to load, send or run anything else. Names are text, never markup.
    """
    folder = resources.files("torchopt.visual") / "page"
    read = lambda name: (folder / name).read_text("utf-8")  # noqa: E731
    licence = read("dagre/LICENSE")
    library = f"/* dagre 3.1.3 and graphlib 4.0.6\n\n{licence}*/\n{read('dagre/dagre.min.js')}"
    parts = "\n".join(read(f"script/{name}.js") for name in _SCRIPTS)
    script = f'(() => {{\n"use strict";\n{parts}}})();\n'
    style = read("page.css")
    data = {**graph.to_json(), "homes": homes(graph), "unreached": list(unreached)}
    policy = (
        f"default-src 'none'; script-src {_digest(library)} {_digest(script)}; "
        f"style-src {_digest(style)}; worker-src blob:; base-uri 'none'; form-action 'none'"
    )
    texts = {
        "policy": policy,
        "title": html.escape(title),
        "summary": html.escape(summary(graph)),
        "style": style,
        "graph": _embedded(data),
        "library": library,
        "script": script,
    }
    # In one pass, so that a name that looks like a placeholder stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: texts[match[1]], read("template.html"))


def _embedded(data: Any) -> str:
    """Return JSON that may stand inside a script element, whatever the names are."""
    text = json.dumps(data, separators=(",", ":"))  # non-ASCII letters are escaped by default
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
