"""Memory and time of a loop's adjoints: ``python -m benchmarks.unroll_memory``.

Each measurement has a process of its own. It warms up with a loop of two steps, and then
differentiates the loop once: memory is the highest resident memory over that before, time that of
the processor, which includes what it costs to get fresh memory. Ratios are to the plain unroll of the
same round, and the median of several rounds counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchopt.diff import Checkpointed, Unrolled, unroll


RESULTS = Path(__file__).parent / "results" / "unroll_memory.json"

#: widths of the layers, batch, steps
PROBLEMS = {
    "deep": ([256] * 17, 2048, 16),
    "long": ([32, 256, 1], 256, 256),
}

ADJOINTS: dict[str, Any] = {
    "Unrolled()": Unrolled(),
    "Checkpointed()": Checkpointed(),
    'Checkpointed("sqrt")': Checkpointed("sqrt"),
    'Checkpointed("log")': Checkpointed("log"),
    'Checkpointed("revolve")': Checkpointed("revolve"),
}

#: What is promised: at most so much of the memory and of the time of the plain unroll.
LIMITS = {
    ("deep", "Checkpointed()"): (0.3, 1.2),
    ("long", 'Checkpointed("sqrt")'): (0.1, 1.5),
    ("long", 'Checkpointed("log")'): (0.06, 2.5),
    ("long", 'Checkpointed("revolve")'): (0.06, 2.5),
}


def problem(name: str) -> tuple[Callable[[Any, int], Tensor], list[Tensor], int]:
    """Return a function of an adjoint and a number of steps, and what to differentiate by."""
    widths, batch, length = PROBLEMS[name]
    torch.manual_seed(0)
    weights = [torch.randn(a, b) / a**0.5 for a, b in itertools.pairwise(widths)]
    biases = [torch.zeros(b) for b in widths[1:]]
    start = [*weights, *biases]
    x, y = torch.randn(batch, widths[0]), torch.randn(batch, widths[-1])
    lr = torch.tensor(0.01)

    def loss(params: list[Tensor]) -> Tensor:
        n = len(weights)
        h = x
        for i, (w, b) in enumerate(zip(params[:n], params[n:])):
            h = torch.addmm(b, h, w)
            h = h.tanh() if i < n - 1 or name == "deep" else h
        return (h - y).square().mean()

    def meta_loss(adjoint: Any, steps: int) -> Tensor:
        def step(params: list[Tensor], _: None) -> tuple[list[Tensor], None]:
            grads = torch.func.grad(loss)(params)
            return [p - lr * g for p, g in zip(params, grads)], None

        last, _ = unroll(step, start, length=steps, adjoint=adjoint)
        return loss(last)

    by = [*start, lr]
    for tensor in by:
        tensor.requires_grad_()
    return meta_loss, by, length


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(name: str, adjoint: str, repeats: int) -> dict[str, float]:
    """Return megabytes over the baseline, and seconds."""
    torch.set_num_threads(1)
    meta_loss, by, length = problem(name)
    torch.autograd.grad(meta_loss(ADJOINTS[adjoint], 2), by)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the highest so far
    before = _status("VmRSS")
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        grads = torch.autograd.grad(meta_loss(ADJOINTS[adjoint], length), by)
        seconds.append(time.process_time() - begin)
    norm = float(torch.stack([g.norm() for g in grads]).norm())
    return {"mb": _status("VmHWM") - before, "seconds": min(seconds), "norm": norm}


def measured(name: str, adjoint: str, repeats: int) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.unroll_memory", "--only", name, adjoint]
    command += ["--repeats", str(repeats)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--problem", choices=sorted(PROBLEMS))
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(*arguments.only, arguments.repeats)))
        return
    results: dict[str, Any] = {"torch": torch.__version__}
    for name in [arguments.problem] if arguments.problem else PROBLEMS:
        rows = {}
        for adjoint in ADJOINTS:
            rows[adjoint] = row = measured(name, adjoint, arguments.repeats)
            plain = rows["Unrolled()"]
            memory, seconds = row["mb"] / plain["mb"], row["seconds"] / plain["seconds"]
            row |= {"memory": memory, "time": seconds}
            limit = LIMITS.get((name, adjoint))
            promise = f"  (at most {limit[0]} and {limit[1]})" if limit else ""
            print(
                f"{name}  {adjoint:25} {row['mb']:8.1f} MB {row['seconds']:7.2f} s  "
                f"{memory:.3f} of the memory, {seconds:.2f} of the time{promise}"
            )
        results[name] = rows
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
