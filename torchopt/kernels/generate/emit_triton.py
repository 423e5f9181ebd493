"""Write kernels in Triton's language, for GPUs.

One launch computes all tensors of a call. Each program of the launch takes one block of
:data:`BLOCK` entries of one tensor; what it must know stands in three tables on the device:

``owners``
    For each program the number of its tensor.
``records``
    For each tensor its number of entries, how many of them may be moved several at once (all, if
    its addresses are multiples of :data:`ALIGNMENT`, else none), the first program that works on
    it, its row of numbers, and the addresses of its input and output operands. Address 0 reads as
    zeros, and what would be written there is dropped.
``numbers``
    Rows of the kernel's numbers in float64; they are rounded to the type of the arithmetic.

The arithmetic is float64 if the tensors are, else float32. Every operation is rounded by itself,
as by torch's operators: square roots and quotients correctly, and products and sums are not
contracted to fused multiply-adds, as long as the kernel is launched with :data:`OPTIONS`. What may
still differ from torch in the last bit: on a GPU torch divides by a number by multiplying with its
reciprocal, and Triton 3.2 takes subnormal float32 numbers for zero in roots and quotients.
"""

from __future__ import annotations

from torchopt.kernels.backends.memory import OF_PARAMETERS
from torchopt.kernels.generate.graph import Kernel


#: Entries of one program.
BLOCK = 1024

#: How to launch: 8 entries for each thread, and no contraction.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

#: Bytes that Triton moves at once, if it knows that an address is a multiple of that.
ALIGNMENT = 16

#: How many fields of a record stand before the addresses.
RECORD_HEAD = 4

#: Operation -> the expression; ``R`` is the type of the arithmetic. These are the expressions of
#: emit_c.py. A comparison with ``nan`` is false, but for ``!=``, so ``maximum`` and ``minimum``
#: pass ``nan`` on. The negative is a product because Triton 3.2 takes ``-x`` for ``0 - x``, which
#: loses the sign of zero.
EXPRESSIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "neg": "{0} * -1.0",
    "abs": "tl.abs({0})",
    "sign": "({0} > 0).to(R) - ({0} < 0).to(R)",
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "less": "{0} < {1}",
    "less_equal": "{0} <= {1}",
    "equal": "{0} == {1}",
    "not_equal": "{0} != {1}",
    "where": "tl.where({0}, {1}, {2})",
    "and": "({0} != 0) & ({1} != 0)",
    "or": "({0} != 0) | ({1} != 0)",
    "not": "{0} == 0",
}

#: Type of the arithmetic -> the expressions that differ: in float32 ``/`` and ``tl.sqrt`` are
#: approximations, in float64 they are correctly rounded (and the others do not exist).
ROUNDED = {
    "float32": {
        "div": "tl.math.div_rn({0}, {1})",
        "sqrt": "tl.math.sqrt_rn({0})",
        "root_slope": "tl.where({0} == 0, 0.0, tl.math.div_rn(0.5, {0}))",
        "reciprocal": "tl.math.div_rn(1.0, {0})",
        "exp": "tl.exp({0}.to(tl.float64)).to(R)",
        "log": "tl.log({0}.to(tl.float64)).to(R)",
        "sigmoid": "(1.0 / (1.0 + tl.exp(-({0}.to(tl.float64))))).to(R)",
    },
    "float64": {
        "div": "{0} / {1}",
        "sqrt": "tl.sqrt({0})",
        "root_slope": "tl.where({0} == 0, 0.0, 0.5 / {0})",
        "reciprocal": "1.0 / {0}",
        "exp": "tl.exp({0})",
        "log": "tl.log({0})",
        "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))",
    },
}


#: Operations that Triton has not, to the last digits that torch has.
ABSENT = frozenset({"expm1", "log1p", "tanh", "pow"})


def absent(kernel: Kernel) -> str:
    """Return an operation of a kernel that Triton has not; the empty string if it has all."""
    return next((op for _, op, _ in kernel.listing.statements if op in ABSENT), "")


def source(kernel: Kernel, stored: str) -> str:
    """Return the Python source of a kernel: a function of its name, to be given to ``triton.jit``.

    Args:
        kernel: What to compute.
        stored: The dtype of the parameters, by its name in both Triton and torch. Other operands
            have the dtype of the arithmetic.
    """
    addresses = [f"in_{s}" for s in kernel.inputs] + [f"out_{s}" for s in kernel.outputs]
    lines = [
        "owner = tl.load(owners + tl.program_id(0)).to(tl.int64)",
        f"record = records + owner * {RECORD_HEAD + len(addresses)}",
        f"start = (tl.program_id(0) - tl.load(record + 2)) * {BLOCK}",
        f"row = numbers + tl.load(record + 3) * {len(kernel.numbers)}",
        f"entry = tl.arange(0, {BLOCK})",
    ]
    for k in range(len(kernel.numbers)):
        lines.append(f"n{k} = tl.load(row + {k}).to(tl.{arithmetic(stored)})")
    for position, name in enumerate(addresses, RECORD_HEAD):
        lines += [
            f"{name} = tl.load(record + {position})",
            # compared entry by entry: Triton's interpreter spreads no truth value over a block
            f"has_{name} = tl.full(({BLOCK},), {name}, tl.int64) != 0",
        ]
    # Full blocks of aligned tensors are moved several entries at once. A mask with a value of its
    # own for each entry would prevent that, so the same is written twice.
    lines += [
        f"if start + {BLOCK} <= tl.load(record + 1):",
        *(f"    {line}" for line in _body(kernel, stored, aligned=True)),
        "else:",
        "    inside = entry < tl.load(record) - start",
        *(f"    {line}" for line in _body(kernel, stored, aligned=False)),
    ]
    head = f"def {kernel.name}(owners, records, numbers):"
    return "\n".join([head, *(f"    {line}" for line in lines)]) + "\n"


def arithmetic(stored: str) -> str:
    """Return the dtype of the arithmetic for parameters of a dtype."""
    return "float64" if stored == "float64" else "float32"


def _type_of(operand: str, stored: str) -> str:
    return f"tl.{stored if operand in OF_PARAMETERS else arithmetic(stored)}"


def _body(kernel: Kernel, stored: str, aligned: bool) -> list[str]:
    """Return the lines that read, compute and write the entries of one block."""
    real = f"tl.{arithmetic(stored)}"
    expressions = {**EXPRESSIONS, **ROUNDED[arithmetic(stored)]}
    listing = kernel.listing
    loads, stores = [], []
    for operand in listing.inputs:
        place = _place(f"in_{operand}", _type_of(operand, stored), aligned)
        loads.append(f"{operand} = tl.load({place}, other=0.0).to({real})")
    lines = [
        f"{name} = {expressions[op].format(*args).replace('(R)', f'({real})')}"
        for name, op, args in listing.statements
    ]
    for operand, name in listing.results.items():
        kind = _type_of(operand, stored)
        place = _place(f"out_{operand}", kind, aligned, f"{name}.to({kind})")
        stores.append(f"tl.store({place})")
    return [*loads, *lines, *stores]


def _place(name: str, kind: str, aligned: bool, *value: str) -> str:
    """Return the arguments of a load or a store: where, what, and under which condition.

    A operand of half precision is moved 8 bytes at once: as many entries as of the float32 operands
    beside it, or else entries would have to change threads.
    """
    pointer = f"{name}.to(tl.pointer_type({kind}))"
    if aligned:
        together = ALIGNMENT // 2 if kind in ("tl.bfloat16", "tl.float16") else ALIGNMENT
        pointer = f"tl.multiple_of({pointer}, {together})"
    mask = f"mask=has_{name}" if aligned else f"mask=has_{name} & inside"
    return ", ".join([f"{pointer} + start + entry", *value, mask])
