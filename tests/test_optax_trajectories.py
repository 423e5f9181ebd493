"""Optimizers and transformations beside those of Optax that have the same name.

``data/optax_trajectories.json`` says where Optax went; ``data/optax_trajectories.py`` wrote it, and
says how. ``optax_names.py`` says what each name and each argument is here, where the definitions
differ, and what is not in the file.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ALGORITHMS, SPECIAL_ALGORITHMS
from optax_names import F64, LEFT_OUT, TABLE, Call, translated
from tolerances import assert_close, close
from torch import Tensor, nn

import torchopt


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "data" / "optax_trajectories.py"
DATA: dict[str, Any] = json.loads(SCRIPT.with_suffix(".json").read_text(encoding="utf-8"))
CALLS: dict[str, list[dict[str, Any]]] = DATA["trajectories"]
CLASSES: dict[Any, type[torchopt.Optimizer]] = {
    row.recipe: row.cls for row in (*ALGORITHMS, *SPECIAL_ALGORITHMS)
}


def has_class(call: Call) -> bool:
    """Whether an object does the same: those take numbers, and no trees or functions."""
    plain = not any(isinstance(value, (Call, dict)) for value in call.kwargs.values())
    return plain and call.recipe in CLASSES


# Values -------------------------------------------------------------------------------------------


def tensors(tree: dict[str, Any], like: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(tree[name], dtype=F64) for name in like}


def gradient_at(step: int, params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a step, and its gradient."""
    constant, curvature = tensors(DATA["gradients"][step], params), DATA["curvature"]
    loss = torch.tensor(DATA["lowest"], dtype=F64)
    for name, p in params.items():
        loss = loss + (constant[name] * p + curvature / 2 * p**2).sum()
    return loss, {name: constant[name] + curvature * p for name, p in params.items()}


def check(call: str, step: int, params: dict[str, Tensor]) -> None:
    """Compare the parameters after a step with those of Optax, where it says them."""
    if step + 1 in DATA["kept"]:
        expected = CALLS[call][DATA["kept"].index(step + 1)]
        dtype = torch.float32 if any(name in call for name in SINGLE) else F64
        assert_close(params, tensors(expected, expected), dtype, what=f"step {step + 1}")


SINGLE = [f"{name}(" for name, row in TABLE.items() if row.dtype == torch.float32]


def named(calls: Iterable[str]) -> pytest.MarkDecorator:
    """Run a test for calls, under short names."""
    return pytest.mark.parametrize("call", [pytest.param(c, id=c[:40]) for c in calls])


def walk(call: str, leaves: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Take the steps of a call, and give the parameters after each."""
    tx, params = translated(call).built(), tensors(DATA["params"], leaves)
    state = tx.init(params)
    for step in range(DATA["steps"]):
        loss, grads = gradient_at(step, params)
        given = {"value": loss} if "polyak" in call or "plateau" in call else {}
        params, state = tx.apply_gradients(grads, state, params, inplace=False, **given)
        yield params


@named(CALLS)
def test_the_functional_api_goes_where_optax_goes(call: str) -> None:
    for step, params in enumerate(walk(call, CALLS[call][0])):
        check(call, step, params)


@named(text for text in CALLS if has_class(translated(text)))
def test_the_object_oriented_api_goes_where_optax_goes(call: str) -> None:
    ours, leaves = translated(call), CALLS[call][0]
    params = {n: nn.Parameter(p) for n, p in tensors(DATA["params"], leaves).items()}
    optimizer = CLASSES[ours.recipe](params.values(), **ours.kwargs)
    for step in range(DATA["steps"]):

        def closure(step: int = step) -> Tensor:
            loss, grads = gradient_at(step, {n: p.detach() for n, p in params.items()})
            for n, p in params.items():
                p.grad = grads[n]
            return loss

        optimizer.step(closure)
        check(call, step, {n: p.detach() for n, p in params.items()})


@pytest.mark.thorough
@named(CALLS)
def test_every_number_of_a_call_matters(call: str) -> None:
    """With another one it goes elsewhere: else the file would not tell what it means."""
    leaves, changed = CALLS[call][0], 0
    *_, end = walk(call, leaves)
    for number in re.finditer(r"(?<![\w.])\d+\.\d+", call):
        given = float(number[0])
        other = str(1.3 * given if given >= 1 else given / 2 or 0.3)
        text = call[: number.start()] + other + call[number.end() :]
        try:
            *_, elsewhere = walk(text, leaves)
        except (AssertionError, KeyError):  # what has to be as it is for the two to be the same
            continue
        assert not close(
            torch.cat([p.flatten() for p in elsewhere.values()]),
            torch.cat([p.flatten() for p in end.values()]),
        ), f"{other} for {number[0]}"
        changed += 1
    assert changed or not re.search(r"\d\.\d", call)


# The file and the table ---------------------------------------------------------------------------


def test_every_name_that_optax_has_is_here_or_left_out_by_name() -> None:
    theirs, used = set(DATA["names"]), set()
    for call in CALLS:
        used |= {name for name in TABLE if f"{name}(" in call}
    shared = {
        name
        for name in torchopt.__all__
        if name in theirs and not inspect.isclass(getattr(torchopt, name))
    }
    assert set(TABLE) == used, "a row of the table, and no trajectory of it"
    assert not LEFT_OUT.keys() & used
    assert shared - used == set(LEFT_OUT)
    assert used <= theirs
    assert all((ROOT / word).exists() for why in LEFT_OUT.values() for word in files_in(why))


def files_in(text: str) -> list[str]:
    return [word for word in text.replace(",", " ").split() if word.startswith("tests/")]


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.differs])
def test_a_docstring_says_how_the_definitions_differ(name: str) -> None:
    recipe = getattr(torchopt, TABLE[name].ours or name)
    assert "Optax" in inspect.getdoc(recipe)  # pyright: ignore[reportOperatorIssue]


def test_the_file_is_what_the_script_writes() -> None:
    """Its calls and its start; the rest takes Optax, of the version that benchmarks have."""
    spec = importlib.util.spec_from_file_location("write_optax_trajectories", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert list(CALLS) == script.CALLS
    assert all(set(rows[0]) == set(script.leaves_of(call)) for call, rows in CALLS.items())
    for name in ("steps", "kept", "curvature", "lowest"):
        assert DATA[name] == json.loads(json.dumps(getattr(script, name.upper())))
    assert DATA["provenance"]["command"] == script.COMMAND
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.install_peers import PEERS
    finally:
        sys.path.remove(str(ROOT))
    assert f"optax=={DATA['provenance']['optax']}" in PEERS["jax"]
    assert SCRIPT.with_suffix(".json").stat().st_size < 150_000
