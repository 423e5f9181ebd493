"""Run every benchmark that can run here: ``python -m benchmarks``."""

from __future__ import annotations

import sys

from benchmarks import meta_step


#: Entry points in the order in which they run; each takes its own command line.
BENCHMARKS = {
    "meta_step": lambda: meta_step.main(["--import-time"]),
}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"There is no benchmark {unknown[0]!r}; there are {list(BENCHMARKS)}.")
        return 2
    for name in names or BENCHMARKS:
        print(f"== {name}", flush=True)
        BENCHMARKS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
