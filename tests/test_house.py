"""The house: who imports whom, what is public, and how long a file may be."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import torchopt


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import rooms  # noqa: E402


#: Files that are longer than a file may be, for now.
LONG = 400


def test_no_room_imports_from_a_higher_one_or_a_neighbour() -> None:
    wrong = [
        f"{a} imports {b}"
        for a, b, _ in rooms.imports()
        if rooms.room_of(a) != rooms.room_of(b)
        and rooms.tier_of(rooms.room_of(a)) <= rooms.tier_of(rooms.room_of(b))
    ]
    assert not wrong


#: What brings the compiler along, which is large, and is needed only where a tracer is at work.
LATE = {("torchopt.kernels", "torchopt.kernels.library.compiled")}


def test_nothing_of_the_package_is_imported_late() -> None:
    assert {(a, b) for a, b, late in rooms.imports() if late} <= LATE


def test_imports_make_no_circle() -> None:
    following: dict[str, set[str]] = {}
    for a, b, _ in rooms.imports():
        following.setdefault(a, set()).add(b)
    left = dict(following)
    while True:  # what imports nothing that is left is in no circle
        free = [name for name, others in left.items() if not others & left.keys()]
        if not free:
            break
        for name in free:
            del left[name]
    assert not left, sorted(left)


def test_the_picture_shows_the_imports() -> None:
    text = rooms.PICTURE.read_text(encoding="utf-8")
    shown = set(re.findall(r"<title>(\w+)&#45;&gt;(\w+)</title>", text))
    assert {(a, b) for b, a in shown} == rooms.drawn(), "run `python docs/rooms.py`"


def test_dir_shows_public_names_only() -> None:
    names = dir(torchopt)
    assert set(names) <= set(torchopt.__all__)
    modules = {name for name in names if isinstance(getattr(torchopt, name), ModuleType)}
    assert modules == {
        *("diff", "kernels", "linear_solve", "nn", "projections", "schedules"),
        *("solvers", "typing", "visual"),
    }
    assert not [name for name in names if name.startswith("_") and name != "__version__"]


def test_import_of_everything_gives_what_all_names() -> None:
    scope: dict[str, object] = {}
    exec("from torchopt import *", scope)
    assert set(torchopt.__all__) <= scope.keys()


@pytest.mark.parametrize("folder", ["torchopt", "tests", "examples", "benchmarks", "docs"])
def test_no_file_is_too_long(folder: str) -> None:
    limit = 500 if folder == "tests" else LONG
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert lengths
    assert not {name: n for name, n in lengths.items() if n > limit}
