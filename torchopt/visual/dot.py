"""The graph behind a loss as a picture by graphviz."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchopt.visual.contract import (
    Contracted,
    with_cut_leaves_grouped,
    with_late_steps_collapsed,
)
from torchopt.visual.graph import Extraction, Node, extract
from torchopt.visual.operations import attributes, dtype_name, saved_tensors


if TYPE_CHECKING:
    import graphviz


_COLOURS = {
    "leaf": "lightblue",
    "value": "lightcyan",
    "step": "orange",
    "operation": "lightgrey",
    "result": "darkolivegreen1",
}
_SAVED_COLOUR = "khaki"

_NO_DOT = (
    "The program dot, which draws the picture, was not found. Install Graphviz (apt install "
    "graphviz, brew install graphviz, conda install -c conda-forge graphviz, or "
    "https://graphviz.org/download) and see that dot is on the PATH. Without it, the .source of "
    "this graph works (any viewer of the DOT language takes it), and so does "
    "torchopt.visual.show, which makes an interactive page."
)


def make_dot(
    var: Tensor | Sequence[Tensor],
    params: Any = None,
    show_attrs: bool = False,
    show_saved: bool = False,
    max_attr_chars: int = 50,
    *,
    clusters: bool = False,
    expanded_steps: int | None = 2,
) -> graphviz.Digraph:
    """Return a picture of the graph that leads to a tensor; arrows point as the values flow.

    Parameters and other tensors that were not computed are light blue, named tensors that were
    (fast weights, states) light cyan, operations grey, each optimizer step one orange node, the
    result green. Where a graph ends in a step though one might expect more, the node says why.

    Args:
        var: What was computed, such as the outer loss; or several tensors.
        params: Names of tensors: a module; a meta-optimizer; what
            :func:`torchopt.extract_state_dict` returned, best with ``enable_visual=True`` and
            ``visual_prefix="step1."``; a dict of names and tensors; pairs ``(name, tensor)`` such
            as ``net.named_parameters()``; or a list of these. A tensor may have several names;
            names of tensors that ``var`` does not depend on are ignored.
        show_attrs: Write the plain values that operations have saved (``dim``, ``alpha``).
        show_saved: Draw the tensors that operations have saved for their backward pass.
        max_attr_chars: Longest text for one such value.
        clusters: Put a box around what lies between two optimizer steps.
        expanded_steps: How many optimizer steps, from the first, are drawn operation by operation.
            Of later ones the forward pass and the gradient are one node, so that a long loop still
            makes a picture that can be read; ``None`` draws every operation of all steps. What
            leads from the last step to ``var`` is always drawn in full, and so is what has a name.

    Raises:
        ImportError: If the Python package graphviz is missing.
        TypeError: If ``var`` or ``params`` is of another kind.
        ValueError: If ``var`` has no graph, or a number is out of range.

    Example:
        >>> import torch, torchopt
        >>> net = torch.nn.Linear(2, 1)
        >>> start = torchopt.extract_state_dict(net, enable_visual=True, visual_prefix="start.")
        >>> inner = torchopt.MetaAdam(net, lr=0.1)
        >>> inner.step(net(torch.ones(3, 2)).square().mean())
        >>> after = torchopt.extract_state_dict(net, enable_visual=True, visual_prefix="after.")
        >>> loss = net(torch.ones(3, 2)).square().mean()
        >>> dot = torchopt.visual.make_dot(loss, [start, after, {"loss": loss}])
        >>> "Adam step 1" in dot.source and "start.weight" in dot.source
        True
    """
    digraph = _digraph_class()
    if max_attr_chars < 1:
        raise ValueError(f"max_attr_chars must be at least 1, got {max_attr_chars}.")
    if expanded_steps is not None and expanded_steps < 0:
        raise ValueError(f"expanded_steps must be at least 0, or None, got {expanded_steps}.")
    found = extract(var, params)
    drawn = _drawn(found, expanded_steps)
    dot = digraph(
        "gradient_graph",
        graph_attr={"bgcolor": "white", "rankdir": "TB"},
        node_attr={
            "style": "filled",
            "shape": "box",
            "fontname": "monospace",
            "fontsize": "10",
            "height": "0.2",
        },
        edge_attr={"color": "grey30", "arrowsize": "0.7"},
    )
    texts = []
    for node, original in zip(drawn.graph.nodes, drawn.kept):
        values = {}
        if show_attrs and original is not None:
            values = _attributes_of(found, found.graph.nodes[original])
        texts.append(_label(node, values, max_attr_chars))
    _draw_nodes(dot, drawn.graph.nodes, texts, clusters)
    for source, user in drawn.graph.edges:
        dot.edge(str(source), str(user))
    if show_saved:
        _draw_saved(dot, found, drawn, max_attr_chars)
    return resize_graph(dot)


def _drawn(found: Extraction, expanded_steps: int | None) -> Contracted:
    """Return the graph as it is drawn, and where its nodes come from."""
    grouped = with_cut_leaves_grouped(found.graph)
    if expanded_steps is None:
        return grouped
    folded = with_late_steps_collapsed(grouped.graph, expanded_steps)
    node_of = [folded.node_of[key] for key in grouped.node_of]
    kept = [None if key is None else grouped.kept[key] for key in folded.kept]
    return Contracted(folded.graph, node_of, kept)


def resize_graph(
    dot: graphviz.Digraph, size_per_element: float = 0.5, min_size: float = 12.0
) -> graphviz.Digraph:
    """Set how large a graph is drawn at most, in inches, by the number of its nodes and edges.

    Args:
        dot: The graph; it is changed.
        size_per_element: Inches for each line of its source.
        min_size: Inches at least.

    Returns:
        ``dot``.

    Example:
        >>> import torch, torchopt.visual
        >>> dot = torchopt.visual.make_dot(torch.ones(2, requires_grad=True).sum())
        >>> torchopt.visual.resize_graph(dot) is dot
        True
    """
    if not size_per_element > 0 or not min_size > 0:
        raise ValueError(
            f"size_per_element and min_size must be > 0, got {size_per_element} and {min_size}."
        )
    size = max(min_size, len(dot.body) * size_per_element)
    dot.graph_attr.update(size=f"{size:g},{size:g}")
    return dot


@functools.cache
def _digraph_class() -> type[graphviz.Digraph]:
    try:
        import graphviz
    except ImportError as error:
        raise ImportError(
            "make_dot needs the Python package graphviz. Install it with "
            'pip install "torchopt[visual]". torchopt.visual.show and torchopt.visual.explain '
            "work without it."
        ) from error

    class DotNotFoundError(graphviz.ExecutableNotFound):
        """``dot`` is missing; says how to get it and what works without it."""

        _msg = _NO_DOT

    class GradientGraph(graphviz.Digraph):
        """A :class:`graphviz.Digraph` that explains itself when ``dot`` is missing."""

        def render(self, *args: Any, **kwargs: Any) -> str:
            """Write the picture to a file; see :meth:`graphviz.Digraph.render`."""
            try:
                return super().render(*args, **kwargs)
            except graphviz.ExecutableNotFound as error:
                raise DotNotFoundError(error.args) from error

        def pipe(self, *args: Any, **kwargs: Any) -> Any:
            """Return the picture; see :meth:`graphviz.Digraph.pipe`."""
            try:
                return super().pipe(*args, **kwargs)
            except graphviz.ExecutableNotFound as error:
                raise DotNotFoundError(error.args) from error

    return GradientGraph


def _draw_nodes(dot: Any, nodes: Sequence[Node], texts: list[str], clusters: bool) -> None:
    lanes: dict[int, Any] = {}
    for node, text in zip(nodes, texts):
        style = {"fillcolor": _COLOURS[node.kind], "tooltip": _escaped(node.detail)}
        if node.cuts:
            style.update(color="red", penwidth="2")
        # what is not of one lane only stands between the boxes
        boxed = clusters and node.kind not in ("step", "leaf")
        if boxed and node.lane not in lanes:
            lanes[node.lane] = type(dot)(f"cluster_{node.lane}")
            lanes[node.lane].attr(
                label=_lane_title(node.lane),
                labeljust="l",
                labelloc="b",
                color="grey60",
                style="rounded",
                fontname="monospace",
                fontsize="10",
            )
        (lanes[node.lane] if boxed else dot).node(str(node.key), text, **style)
    for lane in lanes.values():
        dot.subgraph(lane)


def _lane_title(lane: int) -> str:
    return "before any step" if lane == 0 else f"after {lane} step{'s' * (lane > 1)}"


def _label(node: Node, values: dict[str, Any], max_chars: int) -> str:
    lines = node.label.split("\n")
    if node.shape is not None and node.kind != "operation" and lines != [str(node.shape)]:
        lines.append(str(node.shape))
    lines += [f"{name}: {_shortened(value, max_chars)}" for name, value in values.items()]
    for cut in node.cuts:
        lines += textwrap.wrap(cut, 32)
    return _escaped("\n".join(lines))


def _attributes_of(found: Extraction, node: Node) -> dict[str, Any]:
    members = found.units[node.key].members
    return attributes(found.walk.nodes[members[0]]) if node.kind == "operation" else {}


def _draw_saved(dot: Any, found: Extraction, drawn: Contracted, max_chars: int) -> None:
    shown: dict[int, str] = {}
    for position, node in enumerate(found.walk.nodes):
        user = drawn.node_of[found.node_of[position]]
        if drawn.kept[user] is None:  # it stands for several
            continue
        for name, saved in saved_tensors(node):
            if isinstance(saved, Tensor):
                key = shown.setdefault(id(saved), f"saved{position}{name}")
                text = f"{name}\n{tuple(saved.shape)} {dtype_name(saved)}"
            else:
                key, text = f"saved{position}{name}", f"{name}\n{_shortened(saved, max_chars)}"
            dot.node(key, _escaped(text), fillcolor=_SAVED_COLOUR, shape="ellipse")
            dot.edge(str(user), key, style="dashed", dir="none")


def _shortened(value: Any, max_chars: int) -> str:
    text = str(value)
    return text if len(text) <= max_chars else text[: max(1, max_chars - 3)] + "..."


def _escaped(text: str) -> str:
    """Return text that graphviz takes as it is, line breaks included."""
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return f" {escaped}" if escaped.startswith("<") else escaped
