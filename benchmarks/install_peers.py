"""Install what the benchmarks compare with: ``python -m benchmarks.install_peers``.

Each peer gets a virtual environment of its own under ``.venvs/`` (up to 1 GB each), so that neither
its dependencies nor its version of ``torchopt`` meet ours.
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

#: Environment -> what pip installs there. All sides take their numbers from NumPy, and those that
#: use torch run on the version that we run on.
TORCH = "torch"
PEERS = {
    "higher": ["higher==0.2.1", "numpy", TORCH],
    "torchopt073": ["torchopt==0.7.3", "numpy", TORCH],
    "jax": ["jax[cpu]==0.10.2", "optax==0.2.8", "numpy"],
    "betty": ["betty-ml==0.1.1", "numpy", TORCH],
}
#: Environment -> what pip has to be to read what the peer says of itself.
PIPS = {"betty": "pip<24.1"}


def python_of(name: str) -> Path:
    """Return the interpreter of a peer's environment, which need not exist."""
    folder = ENVIRONMENTS / name
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(name: str, again: bool = False) -> None:
    """Create one environment; nothing happens if it is there, unless ``again``."""
    python = python_of(name)
    if python.exists() and not again:
        print(f"{name}: already in {python.parent.parent}")
        return
    print(f"{name}: installing into {python.parent.parent}", flush=True)
    venv.create(python.parent.parent, with_pip=True, clear=again)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if name in PIPS:
        subprocess.run([*pip, PIPS[name]], check=True)
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *constraints, *PEERS[name]], check=True)


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
