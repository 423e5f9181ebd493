"""The build: what the library is made of, and what happens where there is no compiler."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from torchopt.kernels.backends import cpu as native


ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
FAILS = shutil.which("false")

#: In the place of csrc/kernels.inc, which takes long to compile.
ONE_KERNEL = """
KERNEL(scale) {
  STREAMS
  const R *const in_g = in[0];
  R *const out_u = out[0];
  const R n0 = (R)n[0];
  EACH_ENTRY { out_u[i] = in_g[i] * n0; }
}
#define ALL_KERNELS ENTRY(scale, 1, 1)
"""
#: A build environment has no torch.
RUN_SETUP = """
import runpy, sys
sys.modules["torch"] = None
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


# The library that is installed here ---------------------------------------------------------------


@pytest.fixture(name="installed", scope="module")
def installed_fixture() -> Path:
    if not native.LIBRARY.exists():
        pytest.skip("torchopt is installed without its library")
    return native.LIBRARY


def read_with(tool: str, *arguments: str) -> str:
    if sys.platform != "linux" or shutil.which(tool) is None:
        pytest.skip(f"there is no {tool}")
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def test_exports_only_names_of_its_own(installed: Path) -> None:
    lines = read_with("nm", "--dynamic", "--defined-only", str(installed)).splitlines()
    names = {line.split()[-1] for line in lines}
    assert {"torchopt_run", "torchopt_abi", "torchopt_compiled_for"} <= names
    assert {name for name in names if not name.startswith("torchopt_")} <= {"_init", "_fini"}


def test_links_nothing_but_the_c_library(installed: Path) -> None:
    needed = re.findall(r"NEEDED.*\[(.+)\]", read_with("readelf", "--dynamic", str(installed)))
    assert "libc" in {name.split(".")[0] for name in needed}
    assert all(re.match(r"(libc|libm|libpthread|ld-\w+|libc\.musl-\w+)[.-]", n) for n in needed)


def test_is_small(installed: Path) -> None:
    """Optimizers that come get no kernels of their own, so neither grows with them."""
    assert installed.stat().st_size <= 1_000_000
    assert len((ROOT / "csrc" / "kernels.inc").read_text().splitlines()) <= 3000


def test_facts_beside_the_library_are_its_own(installed: Path) -> None:
    facts = json.loads(Path(f"{installed}.json").read_text())
    assert facts["sha256"] == hashlib.sha256(installed.read_bytes()).hexdigest()


# Builds of a copy ---------------------------------------------------------------------------------


@pytest.fixture(name="sources")
def sources_fixture(tmp_path: Path) -> Path:
    """What a build needs, with a single kernel."""
    pytest.importorskip("setuptools.command.bdist_wheel", reason="setuptools is absent or old")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "TorchOpt.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "csrc" / "kernels.inc").write_text(ONE_KERNEL)
    unbuilt = shutil.ignore_patterns("_fused.*", "__pycache__")
    shutil.copytree(ROOT / "torchopt", tmp_path / "torchopt", ignore=unbuilt)
    return tmp_path


def run_setup(
    sources: Path, *arguments: str, compiler: str | None, **variables: str
) -> subprocess.CompletedProcess[str]:
    if compiler is None:
        pytest.skip("there is no such program")
    ours = {"CC", "CFLAGS", "ARCHFLAGS", "LDSHARED", "TORCHOPT_REQUIRE_FUSED"}
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.run(
        [sys.executable, "-c", RUN_SETUP, "-q", *arguments],
        cwd=sources,
        env={**environment, "CC": compiler, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def build_wheel(sources: Path, compiler: str | None) -> tuple[str, set[str], str]:
    """Return the file's name, the files in it, and what it says about itself."""
    shutil.rmtree(sources / "dist", ignore_errors=True)
    done = run_setup(sources, "bdist_wheel", compiler=compiler)
    assert done.returncode == 0, done.stderr
    (path,) = (sources / "dist").iterdir()
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        return path.name, names, wheel.read(about).decode()


LIBRARY = f"torchopt/kernels/{native.LIBRARY.name}"


def test_a_wheel_is_for_one_platform_and_for_every_python(sources: Path) -> None:
    filename, names, about = build_wheel(sources, COMPILER)
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", filename)
    assert "Root-Is-Purelib: false" in about
    assert {LIBRARY, f"{LIBRARY}.json", "torchopt/py.typed"} <= names
    assert not {name for name in names if re.search(r"csrc|test|\.[ch]$|\.inc$", name)}
    # the compiler is gone: nothing of the build before gets in
    filename, names, about = build_wheel(sources, FAILS)
    assert filename.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in about
    assert not {name for name in names if "_fused." in name}


def test_a_wheel_says_its_licences_and_links_to_nothing_that_is_not_there(sources: Path) -> None:
    build_wheel(sources, FAILS)
    (path,) = (sources / "dist").iterdir()
    with zipfile.ZipFile(path) as wheel:
        (about,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        head, text = wheel.read(about).decode().split("\n\n", 1)
        licences = [name for name in wheel.namelist() if "/licenses/" in name]
    assert "License-Expression: Apache-2.0 AND MIT\n" in head
    assert len(licences) == 2
    assert any("dagre" in name for name in licences)
    assert "Description-Content-Type: text/markdown" in head
    assert re.search(r"Requires-Dist: typing-extensions>=4.10\b", head)
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"\]\((?!https?:)", readme), "there are links to files to be rid of"
    assert not re.search(r"\]\((?!https?:)", text)
    assert "How it is built" in text
    assert "svg" not in text


@pytest.mark.thorough
def test_an_editable_build_has_what_was_built_last(sources: Path) -> None:
    path = sources / LIBRARY
    done = run_setup(sources, "build_ext", "--inplace", compiler=COMPILER)
    assert done.returncode == 0, done.stderr
    library = native.Library(path)
    assert library.find("scale") == 0
    assert library.find("other") is None
    done = run_setup(sources, "build_ext", "--inplace", compiler=FAILS)
    assert done.returncode == 0, done.stderr
    assert "the package will run unfused" in done.stderr
    assert not list(path.parent.glob("_fused.*"))


@pytest.mark.thorough
def test_a_library_of_the_same_sources_is_not_compiled_again(sources: Path) -> None:
    """Installations for the demo, the tests and the documentation compile once between them."""

    def build() -> bytes:
        done = run_setup(sources, "build_ext", "--inplace", compiler=COMPILER)
        assert done.returncode == 0, done.stderr
        return library.read_bytes()

    library, facts = sources / LIBRARY, sources / f"{LIBRARY}.json"
    built = build()
    marked = built + b"marked"
    library.unlink()  # never write into a library that may be loaded
    library.write_bytes(marked)
    assert build() == built, "the facts beside it are not of this file"
    library.unlink()
    library.write_bytes(marked)
    sha256 = hashlib.sha256(marked).hexdigest()
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "sha256": sha256}))
    assert build() == marked, "it was compiled again"
    source = sources / "csrc" / "kernels.inc"
    source.write_text(source.read_text() + "// changed\n")
    assert build() != marked


def test_a_build_can_insist_on_the_library(sources: Path) -> None:
    done = run_setup(sources, "build_ext", compiler=FAILS, TORCHOPT_REQUIRE_FUSED="1")
    assert done.returncode != 0


def test_sanitizers_see_what_is_shipped() -> None:
    """csrc/tests/Makefile repeats the flags of setup.py, but for the level of optimisation."""
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    words = set((ROOT / "csrc" / "tests" / "Makefile").read_text().split())
    flags = {*constants["FLAGS"], *(f for own in constants["X86"].values() for f in own)}
    assert flags - {"-O3", "-g0", "-fvisibility=hidden"} <= words
    assert set(constants["X86"]) <= words
