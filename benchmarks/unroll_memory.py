"""Memory and time of a loop's adjoints: ``python -m benchmarks.unroll_memory``.

Each measurement has a process of its own. It warms up with a loop of two steps, and then
differentiates the loop once: memory is the highest resident memory over that before, time that of
the processor, which includes what it costs to get fresh memory. Ratios are to the plain unroll of
the same round, and the median of several rounds counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
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
    "Checkpointed(16, graphs=16)": Checkpointed(16, graphs=16),
    'Checkpointed("revolve", graphs=4)': Checkpointed("revolve", graphs=4),
}

#: What is measured of each problem.
OF = {"deep": list(ADJOINTS)[:2], "long": list(ADJOINTS)}

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


def measure(name: str, adjoint: str) -> dict[str, float]:
    """Return megabytes over the baseline, and seconds."""
    torch.set_num_threads(1)
    meta_loss, by, length = problem(name)
    torch.autograd.grad(meta_loss(ADJOINTS[adjoint], 2), by)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the highest so far
    before = _status("VmRSS")
    begin = time.process_time()
    grads = torch.autograd.grad(meta_loss(ADJOINTS[adjoint], length), by)
    seconds = time.process_time() - begin
    norm = float(torch.stack([g.norm() for g in grads]).norm())
    return {"mb": _status("VmHWM") - before, "seconds": seconds, "norm": norm}


def measured(name: str, adjoint: str) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.unroll_memory", "--only", name, adjoint]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def compared(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return medians over rounds, with ratios to the plain unroll of the same round."""
    found: dict[str, list[dict[str, float]]] = {adjoint: [] for adjoint in OF[name]}
    for _ in range(rounds):
        for adjoint, rows in found.items():
            row = measured(name, adjoint)
            plain = found["Unrolled()"][-1] if rows is not found["Unrolled()"] else row
            ratios = {
                key: row[of] / plain[of] for key, of in (("memory", "mb"), ("time", "seconds"))
            }
            rows.append({**row, **ratios})
    return {
        adjoint: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for adjoint, rows in found.items()
    }


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs=2, metavar=("PROBLEM", "ADJOINT"))
    parser.add_argument("--problem", choices=PROBLEMS, nargs="*", default=list(PROBLEMS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(*arguments.only)))
        return
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results["torch"] = torch.__version__
    for name in arguments.problem:
        results[name] = compared(name, arguments.rounds)
        for adjoint, row in results[name].items():
            limit = LIMITS.get((name, adjoint))
            promise = f"  (at most {limit[0]} and {limit[1]})" if limit else ""
            print(
                f"{name}  {adjoint:34} {row['mb']:8.1f} MB {row['seconds']:7.2f} s  "
                f"{row['memory']:.3f} of the memory, {row['time']:.2f} of the time{promise}",
                flush=True,
            )
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
