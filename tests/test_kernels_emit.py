"""The C of the kernels: kept in step with the catalogue, and right for any graph."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import catalogue
import pytest
import torch
from conftest import nonzero
from fusing import needs_library, run_kernel
from pointwise import (
    assert_equal,
    evaluate_kernel,
    program_of,
    single_operation,
    user_optimizer,
    values_of,
)
from tolerances import assert_close

from torchopt.kernels.backends import cpu as native
from torchopt.kernels.generate import emit_c
from torchopt.kernels.generate.graph import (
    OPERATIONS,
    TRUTH,
    Kernel,
    make_kernel,
    topological,
)


ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")


@functools.cache
def all_kernels() -> list[Kernel]:
    return catalogue.kernels()


def test_committed_kernels_are_those_of_the_catalogue() -> None:
    committed = (ROOT / "csrc" / "kernels.inc").read_text()
    assert committed == emit_c.source(all_kernels()), (
        "the rules, the catalogue or the emitter have changed: run make kernels and build again"
    )


@needs_library
def test_built_library_has_every_kernel() -> None:
    missing = [k.name for k in all_kernels() if native.library().find(k.name) is None]
    assert not missing, "the library is older than csrc/kernels.inc: build again"
    assert native.library().find("k0123456789abcdef") is None


def test_kernels_fit_the_engine() -> None:
    header = (ROOT / "csrc" / "engine.h").read_text()
    limit = int(header.split("#define MAX_STREAMS ")[1].split()[0])
    assert int(header.split("#define TORCHOPT_ABI ")[1].split()[0]) == native.ABI
    assert all(len(k.inputs) <= limit and len(k.outputs) <= limit for k in all_kernels())


def test_names_do_not_clash() -> None:
    texts = {kernel.text for kernel in all_kernels()}
    assert len({kernel.name for kernel in all_kernels()}) == len(texts) == len(all_kernels())


def test_every_operation_has_an_expression() -> None:
    assert emit_c.EXPRESSIONS.keys() == OPERATIONS.keys()
    for op, expression in emit_c.EXPRESSIONS.items():
        places = {k for k in range(9) if f"{{{k}}}" in expression}
        assert places == set(range(OPERATIONS[op])), op


# Any graph ----------------------------------------------------------------------------------------


def compiled(kernels: Sequence[Kernel], folder: Path) -> native.Library:
    """Build the engine with other kernels, for the least instruction set."""
    for path in (ROOT / "csrc").glob("*.*"):
        shutil.copy(path, folder)
    (folder / "kernels.inc").write_text(emit_c.source(kernels))
    path = folder / "_fused.so"
    flags = ["-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11"]
    sources = [str(folder / name) for name in ("engine.c", "threads.c", "kernels.c")]
    assert COMPILER is not None
    command = [COMPILER, *flags, "-Wall", "-Werror", "-DTORCHOPT_ISA=generic", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(path), *sources, "-lm", "-lpthread"], check=True)
    facts = {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "machine": platform.machine(),
        "system": platform.system(),
    }
    Path(f"{path}.json").write_text(json.dumps(facts))
    return native.Library(path)


def assert_as_torch(
    library: native.Library, kernel: Kernel, inputs: dict[str, torch.Tensor], row: list[float]
) -> None:
    """Assert that a kernel gives the bits of its operations, one after the other."""
    expected = evaluate_kernel(kernel, inputs, row, exact=True)
    like = next(iter(inputs.values()))
    outputs = {s: torch.full_like(like, 77.0) for s in kernel.outputs}
    position = library.find(kernel.name)
    assert position is not None
    given = [inputs[s].data_ptr() for s in kernel.inputs]
    taken = [x.data_ptr() for x in outputs.values()]
    run_kernel(
        library,
        position,
        native.DTYPES[like.dtype],
        0,
        0,
        [like.numel()],
        given,
        taken,
        row,
        None,
        len(row),
    )
    for operand, value in outputs.items():
        want = expected[operand].to(like.dtype)
        assert_equal(value, want, kernel)


@needs_compiler
def test_operations_and_a_users_optimizer_in_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation at all special values; and an optimizer that somebody adds to the catalogue.

    One test, since compiling is what takes the time.
    """

    def rule(g: Any, p: Any, t: Any, slots: Any, lr: float, beta: float, bound: float) -> Any:
        """A sign-momentum rule with everything that the others do not use."""
        (m,) = slots
        m = torch.lerp(m, g, 1 - beta)
        u = torch.where(m.abs() > bound, m.sign(), m / bound).clamp(-0.9, 0.9)
        u = torch.minimum(u, torch.relu(g) + p.abs()) - 0.01 * torch.reciprocal(p)
        return u * (-lr / t**0.5), (m,)

    lion = user_optimizer(rule, ("exp_avg",), lr=0.1, beta=0.9, bound=0.3)
    monkeypatch.setattr(catalogue, "ROWS", [(lion, {"lr": [0.1], "beta": [0.5]})])
    users = catalogue.kernels()
    program = program_of(lion())
    assert {program.kernels[m].name for m in ("update", "apply")} <= {k.name for k in users}

    single = [make_kernel(single_operation(op, f"u{k}")) for k, op in enumerate(OPERATIONS)]
    library = compiled([*users, *single], tmp_path)
    special = [0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan, 1e-40, 3e38]
    for dtype in (torch.float32, torch.float64):
        grid = torch.cartesian_prod(*[torch.tensor(special, dtype=dtype)] * 3).unbind(1)
        inputs = dict(zip(("g", "p", "s0"), map(torch.Tensor.contiguous, grid)))
        for op, kernel in zip(OPERATIONS, single):
            own = {s: inputs[s] for s in kernel.inputs}
            if op in ("sqrt", "root_slope", "sign"):  # torch.sign(nan) is nan or 0, by its build
                own = {s: x.nan_to_num(4.0).abs() for s, x in own.items()}
            assert_as_torch(library, kernel, own, [0.25] if op in TRUTH else [])
        for kernel in users:
            own = {s: nonzero(1000, dtype=dtype) for s in kernel.inputs}
            row = [0.3 + 0.1 * k for k in range(len(kernel.numbers))]
            assert_as_torch(library, kernel, own, row)

    # and the whole of it against the rule
    tx = lion()
    inputs = {"g": nonzero(50), "p": nonzero(50), "s0": nonzero(50)}
    row = list(program.numbers["update"](values_of(tx), 5))
    u, (m,) = tx.rule(inputs["g"], inputs["p"], 5, (inputs["s0"],), **tx.hyperparameters())
    kernel = program.kernels["update"]
    assert_close(evaluate_kernel(kernel, inputs, row), {"u": u, "s0": m}, times=10)
    assert_as_torch(library, kernel, {s: inputs[s] for s in kernel.inputs}, row)


def test_graphs_of_the_catalogue_are_pointwise_and_small() -> None:
    for kernel in all_kernels():
        nodes = topological(kernel.outputs.values())
        assert all(n.op in OPERATIONS or n.op in ("input", "number") for n in nodes)
        divisions = [n for n in nodes if n.op in ("div", "reciprocal")]
        assert len(divisions) <= 3, kernel.text
