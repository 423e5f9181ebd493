"""Write kernels in Triton's language, for GPUs.

One launch computes all tensors of a call. Each program of the launch takes one block of
:data:`BLOCK` entries of one tensor; what it must know stands in three tables on the device:

``owners``
    For each program the number of its tensor.
``records``
    For each tensor its number of entries, the first program that works on it, its row of numbers,
    and the addresses of its input and output streams. Address 0 reads as zeros, and what would be
    written there is dropped.
``numbers``
    Rows of the kernel's numbers in float64; they are rounded to the type of the arithmetic.

The arithmetic is float64 if the tensors are, else float32. Every operation is rounded by itself,
as by torch's operators: square roots and quotients correctly, and products and sums are not
contracted to fused multiply-adds, as long as the kernel is launched with :data:`OPTIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchopt.kernels.graph import Kernel, Node, topological
from torchopt.kernels.launch import OF_PARAMETERS


#: Entries of one program.
BLOCK = 1024

#: How to launch: 8 entries for each thread, and no contraction.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

#: What stands in a record before the addresses: entries, first program, row of numbers.
RECORD_HEAD = 3

#: Operation -> the expression; ``R`` is the type of the arithmetic. These are the expressions of
#: emit_c.py. A comparison with ``nan`` is false, but for ``!=``, so ``maximum`` and ``minimum``
#: pass ``nan`` on. The negative is a product because Triton 3.2 takes ``-x`` for ``0 - x``, which
#: loses the sign of zero.
EXPRESSIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "DIVIDE({0}, {1})",
    "neg": "{0} * -1.0",
    "sqrt": "SQRT({0})",
    "root_slope": "tl.where({0} == 0, 0.0, DIVIDE(0.5, {0}))",
    "reciprocal": "DIVIDE(1.0, {0})",
    "abs": "tl.abs({0})",
    "sign": "({0} > 0).to(R) - ({0} < 0).to(R)",
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "less": "{0} < {1}",
    "less_equal": "{0} <= {1}",
    "equal": "{0} == {1}",
    "not_equal": "{0} != {1}",
    "where": "tl.where({0}, {1}, {2})",
}

#: Type of the arithmetic -> what the names in the expressions stand for. In float32 ``/`` and
#: ``tl.sqrt`` are approximations; in float64 they are correctly rounded.
MEANINGS = {
    "float32": {"R": "tl.float32", "SQRT": "tl.math.sqrt_rn", "DIVIDE": "tl.math.div_rn"},
    "float64": {"R": "tl.float64", "SQRT": "tl.sqrt", "DIVIDE": "divide"},
}


def source(kernel: Kernel, stored: str) -> str:
    """Return the Python source of a kernel: a function of that name, to be given to ``triton.jit``.

    Args:
        kernel: What to compute.
        stored: The dtype of the parameters, by its name in both Triton and torch. Other streams
            have the dtype of the arithmetic.
    """
    real = arithmetic(stored)
    outputs = list(kernel.outputs)
    addresses = [f"in_{s}" for s in kernel.inputs] + [f"out_{s}" for s in outputs]
    lines = [
        "owner = tl.load(owners + tl.program_id(0)).to(tl.int64)",
        f"record = records + owner * {RECORD_HEAD + len(addresses)}",
        "size = tl.load(record)",
        f"start = (tl.program_id(0) - tl.load(record + 1)) * {BLOCK}",
        f"row = numbers + tl.load(record + 2) * {len(kernel.numbers)}",
        f"entry = tl.arange(0, {BLOCK})",
        *(
            f"n{k} = tl.load(row + {k}).to({MEANINGS[real]['R']})"
            for k in range(len(kernel.numbers))
        ),
    ]
    for position, name in enumerate(addresses, RECORD_HEAD):
        kind = f"tl.{_stored(name.split('_', 1)[1], stored)}"
        lines += [
            f"{name} = tl.multiple_of(tl.load(record + {position}), ALIGNMENT)",
            f"at_{name} = {name}.to(tl.pointer_type({kind})) + start + entry",
        ]
    # A block that is full is read and written without a mask for each entry, which would keep the
    # compiler from moving several entries at once.
    lines += [
        f"if start + {BLOCK} <= size:",
        *(f"    {line}" for line in _body(kernel, stored, "")),
        "else:",
        "    inside = entry < size - start",
        *(f"    {line}" for line in _body(kernel, stored, " & inside")),
    ]
    head = f"def {kernel.name}(owners, records, numbers, ALIGNMENT: tl.constexpr):"
    return "\n".join([head, *(f"    {line}" for line in lines)]) + "\n"


def arithmetic(stored: str) -> str:
    """Return the dtype of the arithmetic for parameters of a dtype."""
    return "float64" if stored == "float64" else "float32"


def _stored(stream: str, stored: str) -> str:
    return stored if stream in OF_PARAMETERS else arithmetic(stored)


def _body(kernel: Kernel, stored: str, inside: str) -> list[str]:
    """Return the lines that read, compute and write the entries of one block."""
    real = arithmetic(stored)
    names: dict[Node, str] = {}
    numbers = list(kernel.numbers)
    loads: list[str] = []
    lines: list[str] = []
    for node in topological(kernel.outputs.values()):
        if node.op == "input":
            (stream,) = node.args
            names[node] = stream
            mask = f"mask=(in_{stream} != 0){inside}"
            cast = f".to({MEANINGS[real]['R']})" if _stored(stream, stored) != real else ""
            loads.append(f"{stream} = tl.load(at_in_{stream}, {mask}, other=0.0){cast}")
        elif node.op == "number":
            names[node] = f"n{numbers.index(node.args[0].source)}"
        else:
            names[node] = f"x{len(lines)}"
            value = expression(node.op, [names[a] for a in node.args], real)
            lines.append(f"{names[node]} = {value}")
    stores = [
        f"tl.store(at_out_{s}, {names[n]}.to(tl.{_stored(s, stored)}), mask=(out_{s} != 0){inside})"
        for s, n in kernel.outputs.items()
    ]
    return [*loads, *lines, *stores]


def expression(op: str, arguments: Sequence[str], real: str) -> str:
    """Return the text of an operation in the type of the arithmetic."""
    template = EXPRESSIONS[op]
    if real == "float64":
        template = template.replace("DIVIDE(0.5, {0})", "0.5 / {0}")
