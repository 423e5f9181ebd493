"""Bring the tutorials and the files beside the docs folder into the site."""

from __future__ import annotations

from pathlib import Path

from extensions.files import Folder, change_links


#: Files of the project that are pages of the site, and what they are called there.
PROJECT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def tutorials(root: Path) -> list[Path]:
    """Return the notebooks, in the order of their numbers."""
    return sorted(path for path in (root / "tutorials").glob("*.md") if path.stem != "README")


def write_tutorials(root: Path, pages: Folder) -> None:
    """Copy the tutorials, each with a link to its executed notebook under the title."""
    for path in tutorials(root):
        text = path.read_text(encoding="utf-8")
        head, title, body = _split_at_title(text, path)
        link = f"{{nb-download}}`Download as a Jupyter notebook <{path.stem}.ipynb>`"
        pages.write(path.name, f"{head}{title}\n\n{link}\n\n{body}")
    text = (root / "tutorials" / "README.md").read_text(encoding="utf-8")
    entries = "\n".join(path.stem for path in tutorials(root))
    pages.write("index.md", f"{text}\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n")


def _split_at_title(text: str, path: Path) -> tuple[str, str, str]:
    at = text.find("\n# ") + 1
    if not at:
        raise ValueError(f"{path} has no title, a line that begins with '# '.")
    title, _, body = text[at:].partition("\n")
    return text[:at], title, body


def write_project(root: Path, pages: Folder) -> None:
    """Copy pages that stand in the root of the project."""
    for source, name in PROJECT.items():
        path = root / source
        if path.exists():
            pages.write(name, change_links(path.read_text(encoding="utf-8"), _from_project))


def _from_project(target: str) -> str:
    if target in PROJECT:
        return PROJECT[target]
    return "../" + target.removeprefix("docs/")
