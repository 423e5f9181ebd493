"""Write kernels as C."""

from __future__ import annotations

from collections.abc import Sequence

from torchopt.kernels.generate.graph import TRUTH, Kernel


#: Operation -> the C expression. ``R`` is float or double; the macros are in csrc/kernels.c.
EXPRESSIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "sqrt": "SQRT({0})",
    "root_slope": "({0} == 0 ? (R)0 : (R)0.5 / {0})",
    "reciprocal": "(R)1 / {0}",
    "abs": "ABS({0})",
    "sign": "(R)(({0} > 0) - ({0} < 0))",
    "maximum": "MAXIMUM({0}, {1})",
    "minimum": "MINIMUM({0}, {1})",
    "less": "{0} < {1}",
    "less_equal": "{0} <= {1}",
    "equal": "{0} == {1}",
    "not_equal": "{0} != {1}",
    "where": "{0} ? {1} : {2}",
    "and": "({0} != 0) & ({1} != 0)",
    "or": "({0} != 0) | ({1} != 0)",
    "not": "{0} == 0",
    "exp": "EXP({0})",
    "log": "LOG({0})",
    "expm1": "EXPM1({0})",
    "log1p": "LOG1P({0})",
    "tanh": "TANH({0})",
    "sigmoid": "SIGMOID({0})",
    "pow": "POW({0}, {1})",
}


def function(kernel: Kernel) -> str:
    """Return the C function of a kernel; ``in`` and ``out`` hold its operands in order."""
    listing = kernel.listing
    loads = [f"const R {s} = in_{s}[i];" for s in listing.inputs]
    lines = [
        f"const {'int' if op in TRUTH else 'R'} {name} = {EXPRESSIONS[op].format(*args)};"
        for name, op, args in listing.statements
    ]
    stores = [f"out_{s}[i] = {name};" for s, name in listing.results.items()]
    head = [f"const R *const in_{s} = in[{k}];" for k, s in enumerate(listing.inputs)]
    head += [f"R *const out_{s} = out[{k}];" for k, s in enumerate(listing.results)]
    head += [f"const R n{k} = (R)n[{k}];" for k in range(len(listing.numbers))]
    body = "\n".join(
        [*(f"  {line}" for line in head), "  EACH_ENTRY {"]
        + [f"    {line}" for line in (*loads, *lines, *stores)]
        + ["  }"]
    )
    return f"KERNEL({kernel.name}) {{\n  STREAMS\n{body}\n}}\n"


def source(kernels: Sequence[Kernel]) -> str:
    """Return the file of all kernels, to be compiled once for each dtype and instruction set."""
    parts = ["/* Made by `make kernels`; do not edit. */\n"]
    parts += [function(kernel) for kernel in kernels]
    entries = "\n".join(f"  ENTRY({k.name}, {len(k.inputs)}, {len(k.outputs)})" for k in kernels)
    table = entries.replace("\n", " \\\n")
    return "\n".join(parts) + f"\n#define ALL_KERNELS \\\n{table}\n"
