"""Write the kernels of the catalogue: ``make kernels``."""

from __future__ import annotations

import sys
from pathlib import Path

import catalogue

from torchopt.kernels.generate import emit_c


TARGET = Path(__file__).with_name("kernels.inc")


def main() -> int:
    """Write the file; return 0."""
    kernels = catalogue.kernels()
    TARGET.write_text(emit_c.source(kernels))
    print(f"{len(kernels)} kernels written to {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
