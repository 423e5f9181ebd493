"""Parameters with a meaning of their own are typed: by their class, or by a Protocol."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
#: What stands for one thing everywhere, and so has a class.
NAMES = {"tx", "plan", "part", "optimizer", "call", "leaves", "group"}
#: File, function and parameter of what may be anything nevertheless, with the reason.
EXCEPTIONS: dict[tuple[str, str, str], str] = {}


def is_untyped(annotation: ast.expr | None) -> bool:
    """Whether it says nothing: none, ``Any``, ``typing.Any``, or one that is a part of a union."""
    if annotation is None:
        return True
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return is_untyped(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return is_untyped(annotation.left) or is_untyped(annotation.right)
    if isinstance(annotation, ast.Subscript):
        if ast.unparse(annotation.value).split(".")[-1] not in ("Optional", "Union"):
            return False
        inner = annotation.slice
        return any(map(is_untyped, inner.elts if isinstance(inner, ast.Tuple) else [inner]))
    return ast.unparse(annotation).split(".")[-1] == "Any"


def untyped(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, function and parameter; a lambda can have no annotations."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs):
                if arg.arg in NAMES and is_untyped(arg.annotation):
                    yield node.lineno, node.name, arg.arg


def test_no_such_parameter_is_untyped() -> None:
    wrong, excused = [], set()
    files = sorted((ROOT / "torchopt").rglob("*.py"))
    assert files
    for path in files:
        name = path.relative_to(ROOT / "torchopt").as_posix()
        for line, function, parameter in untyped(path.read_text(encoding="utf-8")):
            key = (name, function, parameter)
            if key in EXCEPTIONS:
                excused.add(key)
            else:
                wrong.append(f"{name}:{line} {function}({parameter})")
    assert not wrong, "name the class, or a Protocol such as those of torchopt/core/protocols.py"
    assert excused == set(EXCEPTIONS), "an exception that nothing needs any more"


UNTYPED = """tx: Any; tx; a, *, plan: typing.Any = None; call: Any | None; part, /; group: 'Any';
self, leaves: Optional[Any]; optimizer: Union[int, Any]"""
TYPED = """tx: GradientTransformation; leaves: Sequence[Any]; group: dict[str, Any]; tx: object;
call: Group | BackwardCall; plan: Plan | None; *leaves: Any; anything: Any"""


@pytest.mark.parametrize("signature", map(str.strip, UNTYPED.split(";")))
def test_an_untyped_parameter_is_seen(signature: str) -> None:
    assert len(list(untyped(f"class A:\n    async def f({signature}): ..."))) == 1


@pytest.mark.parametrize("signature", map(str.strip, TYPED.split(";")))
def test_a_typed_parameter_is_free(signature: str) -> None:
    assert not list(untyped(f"def f({signature}): ..."))
