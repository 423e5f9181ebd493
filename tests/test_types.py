"""What a type checker says of a user's file: each mistake is found, and nothing else is blamed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
CODE = Path(__file__).parent / "data" / "users_code.py"
NAMES = "every_name.py"
CONFIG = {"typeCheckingMode": "strict", "pythonVersion": "3.10"}
MODULES = ("", ".diff", ".diff.implicit", ".diff.zero_order", ".kernels", ".linear_solve", ".nn")
MODULES += (".projections", ".schedules", ".solvers", ".typing", ".visual")


def every_public_name() -> str:
    """Return a file that names all: in strict mode each must have a type that is known in full."""
    modules = [importlib.import_module(f"torchopt{name}") for name in MODULES]
    lines = [f"import {module.__name__}" for module in modules]
    for module in modules:
        names = sorted({*getattr(module, "__all__", ()), *dir(module)})
        uses = (f"print({module.__name__}.{name})" for name in names if name[:1] != "_")
        lines.extend(uses)
    return "\n".join(lines)


def diagnostics(folder: Path) -> list[dict]:
    """Return what pyright says of two files in a project of their own.

    The library is found among the installed packages, as a user's is: what ``py.typed`` promises
    has to be written down, for there types are not inferred from the code.
    """
    beside = Path(sys.executable).with_name("pyright")
    pyright = str(beside) if beside.exists() else shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed; `make lint` installs it and runs this")
    shutil.copy(CODE, folder)
    (folder / NAMES).write_text(every_public_name(), encoding="utf-8")
    (folder / "pyrightconfig.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    done = subprocess.run(
        [pyright, "--pythonpath", sys.executable, "--outputjson"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 1), done.stderr or done.stdout
    return json.loads(done.stdout)["generalDiagnostics"]


@pytest.mark.thorough
def test_a_type_checker_finds_the_mistakes_of_a_user_and_nothing_else(tmp_path: Path) -> None:
    lines = CODE.read_text(encoding="utf-8").splitlines()
    mistakes = {number for number, line in enumerate(lines, 1) if "  # wrong: " in line}
    assert len(mistakes) > 30
    found: dict[int, str] = {}
    of_names = []
    for one in diagnostics(tmp_path):
        if Path(one["file"]).name == NAMES:
            of_names.append(one["message"])
        elif one["severity"] != "information":
            found[one["range"]["start"]["line"] + 1] = one["message"]
    assert not of_names
    blamed = {lines[n - 1].strip(): said for n, said in found.items() if n not in mistakes}
    assert not blamed
    missed = [lines[number - 1].strip() for number in sorted(mistakes - found.keys())]
    assert not missed
