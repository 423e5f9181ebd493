"""Figures of long loops: all ways do the same work, and pages show what is recorded."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import unroll_picture as picture  # noqa: E402
from extensions import unroll_page  # noqa: E402

from benchmarks import registry, unroll_memory, unroll_study  # noqa: E402
from benchmarks.sides.unroll_torchopt import ADJOINTS, IN_BLOCK, differentiated  # noqa: E402
from benchmarks.unroll_problems import few_shot, long  # noqa: E402


MEMORY = json.loads(unroll_memory.RESULTS.read_text(encoding="utf-8"))
STUDY = json.loads(unroll_study.RESULTS.read_text(encoding="utf-8"))
COMPILED = json.loads((ROOT / "benchmarks/results/unroll_compiled.json").read_text("utf-8"))


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.fixture
def _in_double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


EXACT_WAYS = [way for way in ADJOINTS if way not in ("Truncated(16)", "FirstOrder()")]


@pytest.mark.usefixtures("_in_double")
@pytest.mark.parametrize("way", [*EXACT_WAYS, IN_BLOCK + 'Checkpointed("sqrt")'])
def test_every_exact_way_has_the_derivative_of_the_plain_one(way: str) -> None:
    expected, found = differentiated(long(), "Unrolled()")(5), differentiated(long(), way)(5)
    assert expected[-1].abs() > 1e-3
    if way == "Forward()":
        expected = expected[-1:]
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("_in_double")
def test_the_module_is_adapted_by_the_same_steps_of_adam() -> None:
    ways = "Unrolled()", IN_BLOCK + 'Checkpointed("sqrt")'
    expected, found = (flat(differentiated(few_shot(3), way)(3)) for way in ways)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_what_is_not_installed_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ghost = registry.Side("higher", "higher_peer", Path("/nonexistent/python"))
    monkeypatch.setitem(registry.SIDES, "higher", ghost)
    assert unroll_memory.here(["Unrolled()", "higher"]) == ["Unrolled()"]
    text = capsys.readouterr().out
    assert text == "higher is not installed: python -m benchmarks.install_peers higher\n"


def test_higher_has_the_same_derivative() -> None:
    for name in ("deep", "long"):
        assert MEMORY[name]["higher"]["apart"] < 1e-3
        for row in MEMORY[name].values():
            assert row.get("apart", 0) < 1e-3


@pytest.mark.parametrize("name", unroll_memory.MEGABYTES)
def test_the_main_job_fits(name: str) -> None:
    if name not in MEMORY:
        pytest.skip(f"run `python -m benchmarks.unroll_memory --problem '{name}'`")
    rows = {way: row for way, row in MEMORY[name].items() if way != unroll_memory.PLAIN}
    assert rows.keys() == set(unroll_memory.OF[name]) - {unroll_memory.PLAIN}
    assert all(row["mb"] <= unroll_memory.MEGABYTES[name] for row in rows.values())


@pytest.mark.parametrize(("name", "way"), unroll_memory.LIMITS)
def test_memory_is_what_was_promised(name: str, way: str) -> None:
    assert MEMORY[name][way]["memory"] <= unroll_memory.LIMITS[name, way][0]


def test_a_step_is_compiled_once_for_all_steps() -> None:
    for row in COMPILED["ways"].values():
        assert row["graphs"] >= 1
        assert row["graphs later"] == 0
        assert row["apart"] < 1e-3


def test_the_picture_is_of_the_figures_of_today() -> None:
    assert set(picture.STYLES) == set(unroll_study.WAYS)
    for rows in STUDY["lengths"].values():
        assert rows.keys() == set(unroll_study.WAYS)
    digest = hashlib.sha256(picture.DATA.read_bytes()).hexdigest()
    assert digest.encode() in picture.PICTURE.read_bytes(), "run `python docs/unroll_picture.py`"


def test_names_beside_the_lines_do_not_cover_each_other() -> None:
    ends = {"a": 1.0, "b": 1.01, "c": 1.0, "d": 40.0}
    places = sorted(picture._spread(ends, 1.5).values())
    assert all(b / a >= 1.49 for a, b in itertools.pairwise(places))
    assert places[-1] == 40.0


def test_tables_show_what_is_recorded() -> None:
    text = unroll_page.ways(STUDY)
    most = STUDY["lengths"][max(STUDY["lengths"], key=int)]
    assert unroll_page.ADVICE.keys() == most.keys()
    for way, row in most.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| `{way}` "))
        assert f"| {unroll_page.number(row['mb'])} |" in line
    shown = unroll_page.problems(MEMORY)
    assert shown.count("`higher`") == 2
    assert f"{MEMORY['long']['higher']['memory']:.3f}" in shown
