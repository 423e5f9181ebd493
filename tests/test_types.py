"""What a type checker says of a user's file: each mistake is found, and nothing else is blamed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
CODE = Path(__file__).parent / "data" / "users_code.py"
CONFIG = {"include": [CODE.name], "typeCheckingMode": "strict", "pythonVersion": "3.10"}


def diagnostics(folder: Path) -> list[dict]:
    """Return what pyright says of the file as one in a project of its own.

    The library is found among the installed packages, as a user's is: what ``py.typed`` promises
    has to be written down, for there types are not inferred from the code.
    """
    beside = Path(sys.executable).with_name("pyright")
    pyright = str(beside) if beside.exists() else shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed; `make lint` installs it and runs this")
    shutil.copy(CODE, folder)
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
    for one in diagnostics(tmp_path):
        if one["severity"] != "information":
            found[one["range"]["start"]["line"] + 1] = one["message"]
    blamed = {lines[n - 1].strip(): said for n, said in found.items() if n not in mistakes}
    assert not blamed
    missed = [lines[number - 1].strip() for number in sorted(mistakes - found.keys())]
    assert not missed
