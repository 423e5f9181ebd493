"""How many functions an update runs through: no more than it does today."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fusing import needs_library

from torchopt.base import tree


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import hops  # noqa: E402


#: In a process of its own, for what a path enters at first depends on what came before.
MEASURE = """
import json, hops
found = hops.measure()
print(json.dumps({name: [hops.counted(codes) for codes in both] for name, both in found.items()}))
"""


@needs_library
@pytest.mark.skipif(
    not tree._COMPILER_KNOWS_OPTREE, reason="before torch 2.13 some of it goes another way"
)
def test_no_update_runs_through_more_functions() -> None:
    """A path that has become longer is made short again; the limits are only ever lowered."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "docs")])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == hops.LIMITS.keys()
    for name, limits in hops.LIMITS.items():
        for when, counts, limit in zip(("at first", "later"), found[name], limits):
            for what, count, most in zip(limit._fields, counts, limit):
                assert 0 < count <= most, f"{name} {when}: {count} {what}, at most {most}"


def test_what_is_counted() -> None:
    """Functions once, with what they define inside; no comprehension, nothing of others."""

    def calls() -> None:
        for _ in range(2):
            tree.tree_map(abs, {"a": 1, "b": [2, None]})

    codes = hops.entered(calls)
    names = [hops.name_of(code) for code in codes]
    assert names == ["tree_map", "flatten", "compiler_is_old", "unflatten"]
    counted = hops.counted(codes)
    lines = (ROOT / "torchopt" / "base" / "tree.py").read_text(encoding="utf-8").splitlines()
    first = lines.index("def compiler_is_old() -> bool:")
    alone = hops.counted([code for code in codes if code.co_name == "compiler_is_old"])
    last = next(k for k, line in enumerate(lines) if k > first and line.startswith("    return"))
    assert (counted.functions, counted.files) == (4, 1)
    assert alone == hops.Hops(1, 1, last - first + 1)
    assert alone.lines < counted.lines
