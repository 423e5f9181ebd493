"""The rooms of the package and the imports between them: ``python docs/rooms.py`` draws them.

What may import what is :data:`TIERS`; ``tests/test_house.py`` holds the package to it, and the
picture to the package.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.svg"

#: Rooms (folders, or files of the package's own) from the lowest to the highest. A room imports
#: from lower tiers only, and none of its neighbours.
TIERS = [
    ["typing", "version"],
    ["base"],
    ["core", "linear_solve"],
    ["schedules", "projections"],
    ["transforms", "diff"],
    ["solvers"],
    ["nn", "distributed"],
    ["kernels", "optim"],
    ["optimizers"],
    ["visual"],
    ["compat"],
    ["__init__"],
]

#: What each room is for, in the picture.
PURPOSE = {
    "base": "trees, numerics,\nwords of errors",
    "core": "transformation, hyperparameters,\nslots, state, engine",
    "schedules": "numbers over steps",
    "projections": "nearest points\nof sets",
    "transforms": "clip, momentum,\nmask, partition",
    "solvers": "minimum, root,\nfixed point",
    "linear_solve": "operators,\nsolvers",
    "diff": "how to\ndifferentiate",
    "nn": "weights of networks,\nsnapshots",
    "distributed": "training on\nseveral machines",
    "kernels": "trace, derive, fuse",
    "optim": "Optimizer, MetaOptimizer,\ninner_loop",
    "optimizers": "one file per algorithm",
    "visual": "pictures of the graph",
    "compat": "names of TorchOpt 0.7.3",
}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the files of the package by module name."""
    found = {}
    for path in sorted((root / "torchopt").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(root: Path = ROOT) -> Iterator[tuple[str, str, bool]]:
    """Yield every import inside the package: who, whom, and whether it is made late."""
    known = modules(root)
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node, late in _statements(tree, False):
            for target in _targets(node, known):
                if target != name:
                    yield name, target, late


def _statements(node: ast.AST, late: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield child, late
        yield from _statements(child, inside)


def _targets(node: ast.AST, known: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in known]
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torchopt":
        module = node.module or ""
        full = [f"{module}.{alias.name}" for alias in node.names]
        return [name if name in known else module for name in full]
    return []


def room_of(module: str) -> str:
    """Return the room that a module stands in."""
    return [*module.split("."), "__init__"][1]


def tier_of(room: str) -> int:
    """Return how high a room stands.

    Raises:
        KeyError: If :data:`TIERS` does not know it.
    """
    for tier, rooms in enumerate(TIERS):
        if room in rooms:
            return tier
    raise KeyError(f"docs/rooms.py has no place for the room {room!r}")


def arrows(root: Path = ROOT) -> set[tuple[str, str]]:
    """Return which room imports from which other room."""
    pairs = {(room_of(a), room_of(b)) for a, b, _ in imports(root)}
    return {(a, b) for a, b in pairs if a != b}


def drawn(root: Path = ROOT) -> set[tuple[str, str]]:
    """Return the arrows without those that follow from two others, and without the doors."""
    shown = {(a, b) for a, b in arrows(root) if {a, b} <= PURPOSE.keys()}

    def leads(a: str, b: str) -> bool:
        return (a, b) in shown or any(x == a and leads(y, b) for x, y in shown)

    return {
        (a, b)
        for a, b in shown
        if not any((a, c) in shown and c != b and leads(c, b) for c in PURPOSE)
    }


def draw() -> None:
    """Write the picture."""
    import graphviz  # of the extra "visual"

    present = {room for arrow in drawn() for room in arrow}
    picture = graphviz.Digraph(
        "rooms",
        graph_attr={"rankdir": "BT", "ranksep": "0.35", "bgcolor": "white"},
        node_attr={"shape": "box", "style": "rounded,filled", "fillcolor": "#f2f5fa",
                   "fontname": "Helvetica", "fontsize": "11", "color": "#5b6b82"},
        edge_attr={"color": "#5b6b82", "arrowsize": "0.6"},
    )  # fmt: skip
    for tier in TIERS:
        with picture.subgraph() as row:
            row.attr(rank="same")
            for room in tier:
                if room in present:
                    lines = PURPOSE[room].replace("\n", "<br/>")
                    row.node(room, f"<<b>{room}</b><br/><font point-size='9'>{lines}</font>>")
    for a, b in sorted(drawn()):
        picture.edge(b, a, dir="back")
    PICTURE.write_bytes(picture.pipe(format="svg"))


if __name__ == "__main__":
    draw()
    print(f"{len(drawn())} arrows drawn in {PICTURE.relative_to(ROOT)}")
