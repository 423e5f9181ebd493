"""README's table beside other libraries: ``python -m benchmarks.comparison``.

Each library is tried in its own environment (``python -m benchmarks.install_peers``) by
``compared_libraries.py``; speed comes from the figures of ``python -m benchmarks``. What was found
is kept in ``results/comparison.json``, and README's table is made from it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from benchmarks import compared_libraries
from benchmarks.install_peers import ENVIRONMENTS, python_of


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FOUND = RESULTS / "comparison.json"
PROGRAM = Path(__file__).with_name("compared_libraries.py")
BEGIN, END = (
    "<!-- comparison: made by benchmarks/comparison.py -->\n",
    "<!-- end of comparison -->\n",
)

#: Column -> the environment of the library.
LIBRARIES = {
    "ours": None,
    "higher": "higher",
    "learn2learn": "learn2learn",
    "betty": "betty",
    "torchopt073": "torchopt073",
    "torch": None,
    "optax": "jax",
}
HEADS = ("", "here", "`higher`", "learn2learn", "Betty", "TorchOpt 0.7.3", "`torch.optim`", "Optax")
#: Column -> what pip is given; ``torch.optim`` is there already.
SPECS = {
    "ours": str(ROOT),
    "higher": "higher==0.2.1",
    "learn2learn": "learn2learn==0.2.0",
    "betty": "betty-ml",
    "torchopt073": "torchopt==0.7.3",
    "optax": "optax",
}
#: Row of the table -> the fact, or the side of the benchmark.
DERIVATIVES = {
    "derivative of three steps of Adam by the initial weights, relative error": "weights",
    "the same where one feature is always 0": "zero feature",
    "by the learning rate": "lr",
    "by the second decay rate": "beta2",
}
TIMES = {
    "time of a step of MAML, small network": "meta-mlp",
    "the same, large network": "meta-wide",
}
SIDES = {"higher": "higher", "torchopt073": "torchopt-0.7.3", "optax": "optax"}


def installs() -> dict[str, Any]:
    """Return what a current pip says of each library alone, in a fresh environment."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [str(Path(folder) / python_of("").relative_to(ENVIRONMENTS)), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip"], check=True)
        version = subprocess.run([*pip, "--version"], check=True, capture_output=True, text=True)
        found: dict[str, Any] = {"pip": f"{version.stdout.split()[1]}, Python {sys.version[:4]}"}
        for name, spec in SPECS.items():
            command = [*pip, "install", "--quiet", "--no-deps", spec]
            done = subprocess.run(command, capture_output=True, text=True)
            found[name] = done.returncode == 0 or _cause(done.stderr)
    return found


def _cause(text: str) -> str:
    """Return the line of pip's errors that says why."""
    lines = [line.strip() for line in text.splitlines()]
    causes = (r"fatal error: .*", r"Please use pip.*", r"ERROR: .*")
    found = [match for cause in causes for line in lines if (match := re.search(cause, line))]
    return f"InstallError: {found[0][0] if found else 'for no reason that is known'}"


def look() -> dict[str, dict[str, Any]]:
    """Try every library that is installed here."""
    found, installed = {}, installs()
    for name, environment in LIBRARIES.items():
        python = sys.executable if environment is None else str(python_of(environment))
        if name not in compared_libraries.MAKERS:
            found[name] = {"installs": installed[name]}
            continue
        if not Path(python).exists():
            raise SystemExit(f"{name} is not installed: python -m benchmarks.install_peers")
        variables = {**os.environ, "PYTHONPATH": str(ROOT) if name == "ours" else ""}
        program = PROGRAM.read_text(encoding="utf-8")  # not run as a file: beside it are others
        command = [python, "-", name]
        with tempfile.TemporaryDirectory() as elsewhere:  # not where our package would be found
            done = subprocess.run(
                command,
                input=program,
                env=variables,
                cwd=elsewhere,
                capture_output=True,
                text=True,
                check=True,
            )
        found[name] = json.loads(done.stdout.splitlines()[-1])
        if name in installed:
            found[name]["installs"] = installed[name]
    found["ours"]["pip"] = installed["pip"]
    return found


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    kind = str(value).partition(":")[0]
    if kind == "InstallError":
        return "no"
    return f"`{kind}`" if kind.endswith("Error") else str(value)


def _speeds(row: str) -> dict[str, str]:
    """Return how many times as long each library takes as ours, for a row of the benchmark."""
    figures = json.loads((RESULTS / "benchmarks.json").read_text(encoding="utf-8"))
    found = {}
    for result in figures["rows"]:
        if result["key"] != row or "wall" not in result:
            continue
        for name, side in SIDES.items():
            if result["against"].lower().startswith(f"{side} /") and result["target"] is not None:
                found[name] = f"{result['wall']['value']:.1f}"
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return README's table."""
    rows = [list(HEADS), ["---"] * len(HEADS)]
    rows.append([f"installs (pip {found['ours']['pip']})", *_row(found, "installs")])
    rows.append(["optimizers that can be differentiated through", *_row(found, "optimizers")])
    rows += [[title, *_row(found, fact)] for title, fact in DERIVATIVES.items()]
    rows.append(["its Adam works with PyTorch's schedulers", *_row(found, "scheduler")])
    for title, key in (
        ("time of a MAML step, small network", "meta-mlp"),
        ("large network", "meta-wide"),
    ):
        speeds = {"ours": "1", **_speeds(key)}
        rows.append([title, *(speeds.get(name, "") for name in LIBRARIES)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(found: dict[str, dict[str, Any]], fact: str) -> list[str]:
    return [_cell(found[name].get(fact)) for name in LIBRARIES]


def written(readme: str) -> str:
    """Return README's text with the table put in again."""
    made = table(json.loads(FOUND.read_text(encoding="utf-8")))
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}{made}{END}", readme, flags=re.DOTALL)


def main() -> None:
    """Try the libraries, keep what was found, and write README's table."""
    FOUND.write_text(json.dumps(look(), indent=2) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
