"""Private names of torch: one place knows them, and all of them are what they are said to be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchopt.base import torch_internals


ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "torchopt" / "base"
#: The files that may name what is private to torch.
ALLOWED = {BASE / "torch_internals.py", BASE / "torch_compiler.py"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def is_torch(path: str) -> bool:
    return path.split(".")[0] == "torch"


def is_ours(module: str) -> bool:
    """Whether what a module hands out belongs to torch."""
    return module in ("torchopt.base.torch_internals", "torchopt.base.torch_compiler")


def chain(node: ast.expr) -> list[str]:
    """Return the components of ``a.b.c``; none of what is no such chain."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def imported(tree: ast.AST) -> dict[str, list[str]]:
    """Return the paths in torch by the names that a file gives them.

    What has come through ``torch_internals`` belongs to torch as well.
    """
    known: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if is_torch(name.name):
                    path = name.name.split(".")
                    known[name.asname or "torch"] = path if name.asname else ["torch"]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            for n in node.names:
                if is_torch(module) or is_ours(module) or is_ours(f"{module}.{n.name}"):
                    known[n.asname or n.name] = [*module.split("."), n.name]
    return known


def private_names(source: str) -> list[str]:
    """Return, with its line, each private name of torch that a file reaches for."""
    tree = ast.parse(source)
    known = imported(tree)
    found = []
    for node in ast.walk(tree):
        paths: list[list[str]] = []
        if isinstance(node, ast.Import):
            paths = [name.name.split(".") for name in node.names if is_torch(name.name)]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if is_torch(module) or is_ours(module):
                paths = [[*module.split("."), name.name] for name in node.names]
        elif isinstance(node, ast.Attribute) and chain(node):
            first, *rest = chain(node)
            paths = [[*known[first], *rest]] if first in known else []
        elif isinstance(node, ast.Call):
            paths = by_string(node, known)
        found += [f"{node.lineno}: {'.'.join(p)}" for p in paths if any(map(is_private, p))]  # pyright: ignore[reportAttributeAccessIssue]
    return sorted(set(found))


def by_string(call: ast.Call, known: dict[str, list[str]]) -> list[list[str]]:
    """Return what ``getattr(torch..., "...")`` and ``import_module("torch...")`` reach for."""
    texts = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    name = (chain(call.func) or [""])[-1]
    if name in ("getattr", "hasattr", "setattr") and texts and chain(call.args[0]):
        first, *rest = chain(call.args[0])
        return [[*known[first], *rest, *texts]] if first in known else []
    if name in ("import_module", "__import__", "attrgetter"):
        return [text.split(".") for text in texts if is_torch(text)]
    return []


def test_one_place_knows_the_private_names_of_torch() -> None:
    files = sorted((ROOT / "torchopt").rglob("*.py"))
    assert set(files) >= ALLOWED
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in files
        if path not in ALLOWED and (found := private_names(path.read_text(encoding="utf-8")))
    }
    assert not wrong, "give them a name in torchopt/base/torch_internals.py"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._functorch",
        "import torch\nwith torch.autograd.function._hidden(): pass",
        "import torch._dynamo",
        "import torch.utils._pytree as trees",
        "def late():\n    from torch._C import stack",
        "from torch.autograd.function import _SingleLevelFunction as Function",
        "from torch.utils import _pytree",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "from torch import nn as layers\nlayers.Module._load_from_state_dict",
        "import torch as t\nt._utils",
        "import torch\ngetattr(torch, '_C')",
        "import importlib\nimportlib.import_module('torch._dynamo')",
        "from torchopt.base.torch_internals import torch_pytree\ntorch_pytree._get_node_type",
        "from torchopt.base.torch_internals import _autograd",
        "from torchopt.base import torch_internals\ntorch_internals._autograd",
    ],
)
def test_each_way_to_a_private_name_is_seen(source: str) -> None:
    assert private_names(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.Tensor.__add__, torch.nn.functional.relu",
        "from torch import Tensor\nversion = Tensor.data_ptr\nx: Tensor\nx._version",
        "def f(module):\n    return module._parameters, getattr(module, '_flat_weights')",
        "from torchopt.base.torch_internals import peek_interpreter_stack as peek\npeek()",
        "from torch.func import grad\nself._torch = grad",
    ],
)
def test_public_names_and_attributes_of_objects_are_free(source: str) -> None:
    assert not private_names(source)


def test_nothing_large_is_imported_with_the_package() -> None:
    """A compiler, or the distributions of PyTorch, take as long as the package itself."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport torchopt\n"
        "print(*(set(sys.modules) - before), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    new = set(done.stdout.split())
    assert "torchopt.base.torch_internals" in new, done.stderr
    assert not new & {"torch._dynamo", "torchopt.base.torch_compiler", "torch.distributions"}


def test_names_of_levels_are_what_they_say() -> None:
    inside: list[object] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        level = torch_internals.current_interpreter()
        inside.append(level.key() == torch_internals.TransformType.Vmap)
        inside.append(torch_internals.peek_interpreter_stack() is not None)
        inside.append(len(torch_internals.get_interpreter_stack() or ()))
        value, dim = torch_internals.unwrap_batched(x, level.level())
        inside.append((tuple(value.shape), dim, torch_internals.is_functorch_wrapped_tensor(x)))
        return 2 * x

    def lifted(x: torch.Tensor) -> torch.Tensor:
        level = torch_internals.current_interpreter()
        other = torch_internals.lift_of(level)(torch.ones(2))
        inside.append(torch_internals.is_gradtrackingtensor(other))
        return (x * other).sum()

    torch.func.vmap(look)(torch.randn(3, 2))
    torch.func.grad(lifted)(torch.randn(2))
    assert inside == [True, True, 1, ((3, 2), 0, True), True]
    assert torch_internals.peek_interpreter_stack() is None


def test_forward_mode_is_told_while_a_level_is_open() -> None:
    assert not torch_internals.in_forward_mode()
    with torch.autograd.forward_ad.dual_level():
        assert torch_internals.in_forward_mode()
    seen: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_internals.in_forward_mode())
        return x * x

    torch.func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    assert seen == [True]
    assert not torch_internals.in_forward_mode()


def test_a_backward_pass_has_a_number_and_tells_whether_it_keeps_the_graph() -> None:
    x = torch.randn(2, requires_grad=True)
    loss = x.sin().sum()
    seen: list[tuple[bool, bool]] = []

    def look(_: torch.Tensor) -> None:
        running = torch_internals.current_graph_task_id() != -1
        seen.append((running, torch_internals.graph_task_keeps_graph()))

    x.register_hook(look)
    loss.backward(retain_graph=True)
    loss.backward()
    assert seen == [(True, True), (True, False)]
    assert torch_internals.current_graph_task_id() == -1
