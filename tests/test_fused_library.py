"""A library that is missing, broken or somebody else's: said once, and never fatal."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ALGORITHMS
from fusing import FACES, data, needs_library
from tolerances import assert_close

import torchopt
from torchopt.kernels import fused, why
from torchopt.kernels.backends import availability as backends
from torchopt.kernels.backends import cpu as native


pytestmark = needs_library
BUILT = native.LIBRARY
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@pytest.fixture(name="library")
def library_fixture(tmp_path: Path) -> Path:
    """A copy of the library with its facts, to be tampered with."""
    path = tmp_path / native.LIBRARY.name
    shutil.copy(native.LIBRARY, path)
    shutil.copy(f"{native.LIBRARY}.json", f"{path}.json")
    return path


def facts_of(path: Path) -> Path:
    return Path(f"{path}.json")


def change_facts(path: Path, **changed: Any) -> None:
    facts = json.loads(facts_of(path).read_text()) | changed
    facts_of(path).write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))


def build(path: Path, source: str) -> None:
    """Put a small library of its own there, with right facts."""
    if COMPILER is None:
        pytest.skip("there is no C compiler")
    code = path.with_suffix(".c")
    code.write_text(source)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(path), str(code)], check=True)
    change_facts(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


# What may be wrong --------------------------------------------------------------------------------


def missing(path: Path) -> None:
    path.unlink()


def facts_missing(path: Path) -> None:
    facts_of(path).unlink()


def facts_empty(path: Path) -> None:
    facts_of(path).write_text("")


def facts_incomplete(path: Path) -> None:
    change_facts(path, sha256=None)


def facts_no_dict(path: Path) -> None:
    facts_of(path).write_text("[1, 2]")


def facts_binary(path: Path) -> None:
    facts_of(path).write_bytes(b"\xff\xfe\x00")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_machine(path: Path) -> None:
    change_facts(path, machine="pdp11")


def other_system(path: Path) -> None:
    change_facts(path, system="Plan9")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def no_library(path: Path) -> None:
    path.write_bytes(b"This is no library.")
    change_facts(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def somebody_elses(path: Path) -> None:
    build(path, "int answer(void) { return 42; }")


def other_interface(path: Path) -> None:
    build(
        path, 'const long long torchopt_abi = 99; const char torchopt_compiled_for[] = "DEFAULT";'
    )


def other_processor(path: Path) -> None:
    source = f"const long long torchopt_abi = {native.ABI};"
    build(path, source + 'const char torchopt_compiled_for[] = "AVX9000";')


#: What is wrong -> what the reason must say.
FAULTS: dict[Callable[[Path], None], str] = {
    missing: "installed without its C library",
    facts_missing: "cannot be read",
    facts_empty: "cannot be read",
    facts_incomplete: "",
    facts_no_dict: "",
    facts_binary: "cannot be read",
    truncated: "damaged",
    emptied: "damaged",
    one_bit: "damaged",
    other_machine: f"built for {platform.system()} on pdp11, this is {platform.system()} on",
    other_system: "built for Plan9 on",
    a_directory: "",
    no_library: "does not load",
    somebody_elses: "is no library of torchopt's",
    other_interface: f"has interface 99 instead of {native.ABI}",
    other_processor: "compiled for AVX9000, this processor has",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_reason(fault: Callable[[Path], None], library: Path) -> None:
    fault(library)
    with pytest.raises(native.UnavailableError) as caught:
        native.Library(library)
    message = str(caught.value)
    assert FAULTS[fault] in message
    assert native.LIBRARY.name in message or "C library" in message, "it says which file"
    assert "reinstall torchopt" in message, "it says what to do"
    assert "\n" not in message.strip()


def test_an_untouched_copy_loads(library: Path) -> None:
    loaded = native.Library(library)
    assert loaded.instruction_set == native.library().instruction_set


# What follows -------------------------------------------------------------------------------------


@pytest.fixture(name="without")
def without_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package with its library gone, as if it had just been imported."""
    path = tmp_path / "_fused.so"
    monkeypatch.setattr(native, "LIBRARY", path)
    caches = (native.load, backends.find, fused._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield path
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("face", FACES)
def test_without_the_library_everything_works(face: str, without: Path) -> None:
    params, grads = data()
    expected = FACES[face](torchopt.adam(0.1, use_accelerated_op=False), params, grads)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = FACES[face](torchopt.adam(0.1), params, grads)
        FACES[face](torchopt.sgd(0.1, momentum=0.9), params, grads)
    assert all(map(torch.equal, actual, expected))
    messages = [str(w.message) for w in caught if "torchopt" in str(w.message).lower()]
    assert len(messages) == 1, messages
    assert "Optimizers run unfused" in messages[0]
    assert "installed without its C library" in messages[0]
    assert "use_accelerated_op=False" in messages[0], "it says how to be rid of it"


def test_without_the_library_nothing_is_said_to_who_asked_for_nothing(without: Path) -> None:
    params, grads = data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for face in FACES.values():
            face(torchopt.adam(0.1, use_accelerated_op=False), params, grads)
    assert not caught


def test_without_the_library_it_is_said(without: Path) -> None:
    params, (grads,) = data(steps=1)
    assert not torchopt.accelerated_op_available()
    assert not torchopt.accelerated_op_available("cpu")
    assert not torchopt.accelerated_op_available(["cpu", "cpu"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # to ask is not to complain
        lines = why(torchopt.adam(0.1), grads, params=params)
    assert lines
    assert all("installed without its C library" in line for line in lines)


def test_required_without_the_library(without: Path) -> None:
    reason = "use_accelerated_op=True requires a fused kernel, but .* without its C library"
    if not torchopt.accelerated_op_available("cuda"):
        for make in (row.recipe for row in ALGORITHMS if row.fused):
            with pytest.raises(RuntimeError, match=reason):
                make(0.1, use_accelerated_op=True)
        with pytest.raises(RuntimeError, match=reason):
            torchopt.Adam([torch.nn.Parameter(torch.ones(2))], use_accelerated_op=True)
        with pytest.raises(RuntimeError, match=reason):
            torchopt.MetaAdam(torch.nn.Linear(1, 1), use_accelerated_op=True)
    # made by other means, it is refused when it is used, and nothing changes
    tx = torchopt.adam(0.1).with_accelerated_op(True)
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torchopt.Optimizer([p], tx)
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="without its C library"):
        optimizer.step()
    assert_close(p.detach(), torch.ones(2))
    assert not optimizer.state.get(p)


@pytest.mark.parametrize("fault", [facts_incomplete, truncated, a_directory, other_processor])
def test_a_broken_library_is_no_worse_than_none(
    fault: Callable[[Path], None], without: Path
) -> None:
    for suffix in ("", ".json"):
        shutil.copy(f"{BUILT}{suffix}", f"{without}{suffix}")
    fault(without)
    params, grads = data(steps=2)
    with pytest.warns(UserWarning, match="Optimizers run unfused"):
        FACES["functional"](torchopt.adam(0.1), params, grads)
    assert not torchopt.accelerated_op_available()


FIRST_USE = """
import sys, warnings
from torchopt.kernels.backends import cpu as native
native.LIBRARY = native.LIBRARY.with_name("gone.so")
import torch, torchopt
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for make in (torchopt.adam, torchopt.sgd):
        for _ in range(3):
            tx, g = make(0.5), [torch.ones(2)]
            u, _ = tx.update(g, tx.init(g), g)
print(len([w for w in caught if "unfused" in str(w.message)]), u[0].tolist())
"""


def test_a_fresh_process_warns_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "1 [-0.5, -0.5]", done.stderr


def test_importing_loads_nothing() -> None:
    """The library is loaded when it is needed, and not by everybody who imports torchopt."""
    code = (
        "import torchopt; from torchopt.kernels.backends import cpu; print(cpu.load.cache_info())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "currsize=0" in done.stdout, done.stderr


def test_available() -> None:
    assert torchopt.accelerated_op_available()
    assert torchopt.accelerated_op_available("cpu")
    assert torchopt.accelerated_op_available(torch.device("cpu"))
    assert not torchopt.accelerated_op_available("meta")
    assert not torchopt.accelerated_op_available(["cpu", "meta"])
    assert not torchopt.accelerated_op_available(torch.device("meta"))
    assert torchopt.accelerated_op_available("cuda") <= torch.cuda.is_available()
