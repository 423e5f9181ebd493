"""Install what the benchmarks compare with: ``python -m benchmarks.install_peers``.

Each peer gets a virtual environment of its own under ``.venvs/`` (about 1 GB each, for torch), so
that neither its dependencies nor its version of ``torchopt`` meet ours.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venvs"

#: Environment -> what pip installs there, beside torch. NumPy spares a warning of torch's.
PEERS = {
    "higher": ["higher==0.2.1", "numpy"],
    "torchopt073": ["torchopt==0.7.3", "numpy"],
}


def python_of(name: str) -> Path:
    """Return the interpreter of a peer's environment, which need not exist."""
    folder = ENVIRONMENTS / name
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def torch_requirement() -> str:
    """Return the line of ``constraints.txt`` that pins torch: both sides run on the same one."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.strip() for line in lines if line.startswith("torch=="))


def install(name: str, again: bool = False) -> None:
    """Create one environment; nothing happens if it is there, unless ``again``."""
    python = python_of(name)
    if python.exists() and not again:
        print(f"{name}: already in {python.parent.parent}")
        return
    print(f"{name}: installing into {python.parent.parent}", flush=True)
    venv.create(python.parent.parent, with_pip=True, clear=again)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *constraints, torch_requirement(), *PEERS[name]], check=True)


def main() -> int:
    """Install the named peers, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--again", action="store_true", help="reinstall what is there")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in PEERS]
    if unknown:
        parser.error(f"there is no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    for name in options.names or PEERS:
        install(name, options.again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
