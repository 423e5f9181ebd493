"""README's table beside other libraries, and what a newcomer types first."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import compared_libraries, comparison, first_minutes


README = Path(__file__).parents[1] / "README.md"


def test_readme_has_the_table_that_was_measured() -> None:
    text = README.read_text(encoding="utf-8")
    assert comparison.written(text) == text, "run `python -m benchmarks.comparison`"
    assert text.count(comparison.BEGIN) == text.count(comparison.END) == 1


def test_what_it_says_of_this_library_is_so() -> None:
    found = compared_libraries.facts("ours")
    for derivative in comparison.DERIVATIVES.values():
        assert found[derivative] < 1e-6
    assert found["scheduler"] is True
    assert f"| {found['optimizers']} |" in README.read_text(encoding="utf-8")


def test_what_it_says_of_those_that_do_not_install_was_found() -> None:
    found = json.loads(comparison.FOUND.read_text(encoding="utf-8"))
    assert "longintrepr.h" in found["learn2learn"]["installs"]  # a header that Python 3.11 lacks
    assert "pip<24.1" in found["betty"]["installs"]
    text = README.read_text(encoding="utf-8")
    assert "does not compile on Python 3.11" in text
    assert "current ones reject its metadata" in text
    installed = [name for name, facts in found.items() if facts.get("installs") is True]
    assert installed == ["ours", "higher", "torchopt073", "optax"]


def test_a_wrong_derivative_is_found() -> None:
    right = compared_libraries.alone(compared_libraries.ours(False), 0)
    assert compared_libraries.error(right, 0, False) < 1e-6
    wrong = [value + 1e-3 for value in right]
    assert compared_libraries.error(wrong, 0, False) > 1e-5
    assert compared_libraries.error([float("nan")] * 3, 0, False) == "nan"


def test_the_first_minutes_are_those_of_every_example() -> None:
    examples = README.parent / "examples"
    typed = " ".join(first_minutes.commands())
    for path in examples.glob("*.py"):
        quick = "QUICK" in path.read_text(encoding="utf-8")
        assert (f"examples/{path.name} --quick" in typed) == quick
    assert "make demo" in typed
