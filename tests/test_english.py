"""Pages for users have no words that a native writer would not use there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs" / "coming_from").glob("*.md"),
    *(ROOT / "tutorials").glob("*.md"),
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "README.md",
    ROOT / "CONTRIBUTING.md",
]
#: What stood there, and what to write instead.
INSTEAD = {
    r"\banew\b": "again, new, re-",
    r"\bat hand\b": "say which, or leave it out",
    r"\bin the place of\b": "instead of",
    r"\b(?:there )?(?:is|are) none\b": "there is no ..., or does not",
    r"\bwhat it gave\b": "its result",
    r"\b(?:is|are) to reach\b": "target, should reach",
    r"\bbeside\b": "next to, with, compared with",
    r"\bwithout a word\b": "silently",
    r"\bfor ever\b": "forever",
    r"\b(?:go|goes|going|gone|went) on (?:with|at|from|after|improving|learning)\b": "continue",
    r"\bwith the same digits\b": "bit for bit",
    r"\bfrom nothing\b": "from scratch",
    r"\bunless given\b": "default, unless you set it",
    r"\b(?:what it (?:took|has taken)|which it took)\b": "its choice",
    r"\btakes? (?:\w+ ){1,3}for a constant\b": "treat as a constant",
    r"\bmakes? of (?:a|an|the) \w+": "turn ... into",
    r"\bthe memory that there is\b": "how much memory there is",
    r"\bsome seconds\b": "a few seconds",
    r"\b(?:is|are) void\b": "no longer counts",
    r"\bdecided by figures\b": "measurements decide",
    r"\bnot yet here\b": "not available yet",
    r"\bby the weights? of\b": "with respect to the weight of",
    r", for (?:it|they|these|those|there) (?:is|are|was|were|has|have)\b": ", because",
    r"\bno more\.": "no longer",
}


def found(text: str) -> list[str]:
    """Return such words in the prose of a page; code and what it prints are left alone."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return [f"{word[0]!r}: {better}" for w, better in INSTEAD.items() for word in _all(w, prose)]


def _all(pattern: str, text: str) -> list[re.Match[str]]:
    return list(re.finditer(pattern, text, flags=re.IGNORECASE))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_pages_read_like_english(page: Path) -> None:
    assert found(page.read_text(encoding="utf-8")) == []


def test_such_words_are_found_in_prose_only() -> None:
    text = "It is made anew beside it.\n\n```text\nanew\n```\n`anew`"
    assert found(text) == ["'anew': again, new, re-", "'beside': next to, with, compared with"]
