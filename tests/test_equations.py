"""The page of each optimizer shows its whole update: nothing has to be looked up on another page.

Whether an equation is that of the rule, the closed forms and references of ``algorithms.py`` say of
the rule; here it is held to what a reader needs: every symbol explained, every argument in it.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import torchopt


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))

import catalogue_tables


NAMES = sorted(set(re.findall(r"^\|[^|]*\| `(\w+)` \|", catalogue_tables.optimizers(), flags=re.M)))
#: Arguments that every equation has in it, if the optimizer takes them.
IN_EVERY_EQUATION = {
    *("lr", "betas", "eps", "weight_decay", "momentum", "rho", "alpha", "gamma"),
    *("eps_root", "eta", "clip_threshold", "momentum_decay", "trust_coefficient", "dampening"),
}
#: Each step's: ``m_t``, ``v_{t-1}``, ``\bar p_t``, ``\mu_{t-1}(S)``.
OF_A_STEP = re.compile(r"(?<![A-Za-z\\])(\\?[A-Za-z]+)_(?:\{t[-+]1\}|\{t\}|t(?![A-Za-z]))")
GREEK_OR_LETTER = re.compile(r"\\(?:epsilon_[r12]|[a-z]+)(?:_[A-Za-z0-9])?|[A-Za-z](?:_\d)?")


def equation_and_text(doc: str) -> tuple[str, str]:
    """Return the displayed equations, and all mathematics before the arguments."""
    before = doc.partition("Args:")[0]
    blocks = re.findall(r"\.\. math::(.*\n(?:[ ]+\S.*\n|\s*\n)+)", before)
    return "\n".join(blocks), "\n".join([*blocks, *re.findall(r":math:`([^`]*)`", before)])


def arguments(doc: str) -> dict[str, str]:
    """Return the arguments that a docstring explains."""
    section = doc.partition("Args:\n")[2].partition("\n\n")[0]
    return dict(re.findall(r"^    (\w+): ((?:.*\n?)(?:        .*\n?)*)", section, flags=re.M))


def problems(recipe: Any) -> list[str]:
    """Return what a reader of a docstring has to look up elsewhere."""
    doc = inspect.getdoc(recipe) or ""
    equation, text = equation_and_text(doc)
    explained = arguments(doc)
    found = []
    taken = [name for name in inspect.signature(recipe).parameters if name != "use_accelerated_op"]
    found += [f"{name} is not explained" for name in taken if name not in explained]
    if not re.search(r"\b[py]_\{?t(\+1)?\}? =", equation):
        found.append("no equation for the new parameters")
    for name in sorted(IN_EVERY_EQUATION & set(taken)):
        symbols = re.search(r":math:`([^`]*)`", explained.get(name, ""))
        wanted = (
            GREEK_OR_LETTER.findall(re.sub(r"\\g?[el]e?\b.*", "", symbols[1])) if symbols else []
        )
        wanted = [symbol for symbol in wanted if symbol not in (r"\ge", r"\le")]
        if not wanted:
            found.append(f"{name} has no symbol")
        found += [f"{name}, {symbol}, is not in it" for symbol in wanted if symbol not in text]
    used = {
        symbol for symbol in OF_A_STEP.findall(text) if symbol not in ("g", "p", "y", r"\rVert")
    }
    for symbol in sorted(used):
        start = (
            rf"(?<![A-Za-z\\]){re.escape(symbol)}_?(?:\{{t\+1\}}|\{{k\+1\}}|[t01])(?:\([A-Za-z]\))?"
        )
        if not re.search(rf"{start}(?: = |,\\?! ?)", text):
            found.append(f"{symbol}_t has no equation")
    if "Reference:" not in doc:
        found.append("no source")
    return found


def test_there_is_a_sweep() -> None:
    assert len(NAMES) > 35
    assert {"adam", "sgd", "adamw", "sam"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_the_whole_update(name: str) -> None:
    assert problems(getattr(torchopt, name)) == []


def test_a_page_that_sends_its_reader_elsewhere_is_found() -> None:
    def adam(lr: float, eps: float) -> None:
        r"""Adam.

        .. math::
            p_t = p_{t-1} - \eta\, u_t

        Args:
            lr: Learning rate :math:`\eta \ge 0`.
            eps: Added to the root.
        """

    assert problems(adam) == ["eps has no symbol", "u_t has no equation", "no source"]


@pytest.mark.parametrize("cls", [torchopt.SAM, torchopt.MetaSAM, torchopt.LBFGS])
def test_classes_with_arguments_of_their_own_have_an_equation_too(cls: type) -> None:
    equation, _ = equation_and_text(inspect.getdoc(cls) or "")
    assert re.search(r"p_(\{k\+1\}|t) = ", equation)


def test_lines_of_a_formula_are_lines_in_a_browser() -> None:
    pytest.importorskip("latex2mathml")
    pytest.importorskip("sphinx")
    from extensions import mathml

    formula = r"a = b, \\ c = \begin{cases} 1 & x \\ 2 & y \end{cases} \\ d = e"
    assert mathml.lines_of(formula) == [
        "a = b,",
        r"c = \begin{cases} 1 & x \\ 2 & y \end{cases}",
        "d = e",
    ]
    assert all("newline" not in mathml.to_mathml(line) for line in ("a = b,", "d = e"))
