"""Build the fused engine: a plain C library beside the package, loaded with ctypes.

It knows neither Python nor torch, so one wheel serves every version of both. Without a working C
compiler the package installs without it and runs unfused; set ``TORCHOPT_REQUIRE_FUSED=1`` to let
the build fail instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


#: Instruction sets with kernels of their own -> compiler flags; the best is chosen at run time.
#: Those that take longest to compile come first. csrc/tests/Makefile repeats these flags.
X86 = {
    "avx512": [
        "-mavx512f",
        "-mavx512dq",
        "-mavx512bw",
        "-mavx512vl",
        "-mfma",
        "-mprefer-vector-width=512",
    ],
    "avx2": ["-mavx2", "-mfma"],
    "generic": [],
}
#: Errors in errno and floating-point traps are read by nobody; without these flags roots and
#: choices are not vectorised. Nothing here changes a result: no -ffast-math, and no product and
#: sum rounded as one, so that every instruction set, and every face, gives the same bits.
FLAGS = [
    "-O3",
    "-g0",
    "-std=gnu11",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
]
WINDOWS_FLAGS = ["/O2", "/std:c11"]


def instruction_sets() -> dict[str, list[str]]:
    """Return the instruction sets to compile for."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64") and os.name == "posix"
    cross = "ARCHFLAGS" in os.environ  # several architectures in one file: no flags for one of them
    return X86 if is_x86 and not cross else {"generic": []}


#: The address, with a slash at its end, under which the files of this repository can be read;
#: ``None`` as long as it is published nowhere.
SOURCES: str | None = None


class BuildFused(build_ext):
    """Compile the kernels once for each instruction set, and link."""

    def get_ext_filename(self, fullname: str) -> str:
        suffix = ".dll" if os.name == "nt" else ".so"  # no tag: it depends on no Python
        return str(Path(*fullname.split(".")).with_suffix(suffix))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        if self._reused(ext, target):
            return
        for stale in _with_facts(target):
            stale.unlink(missing_ok=True)  # a library of older sources is worse than none
        try:
            self._build(target)
        except Exception as error:
            if os.environ.get("TORCHOPT_REQUIRE_FUSED"):
                raise
            print(
                f"torchopt: no fused kernels, the package will run unfused ({error})",
                file=sys.stderr,
            )

    def _reused(self, ext: Extension, target: Path) -> bool:
        """Copy the library beside the sources if it was built of these: it saves half a minute."""
        build_py = self.get_finalized_command("build_py")
        here = Path(self._get_inplace_equivalent(build_py, ext)[0])
        try:
            facts = json.loads(_with_facts(here)[1].read_text())
            same = facts["built_from"] == self._sources()
            whole = facts["sha256"] == hashlib.sha256(here.read_bytes()).hexdigest()
        except (OSError, ValueError, KeyError):
            return False
        if not (same and whole):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        if here.resolve() != target.resolve():
            for file, copy in zip(_with_facts(here), _with_facts(target)):
                self.copy_file(str(file), str(copy))
        return True

    def _sources(self) -> str:
        """Return the hash of all that a library depends on: sources, flags, compiler, machine."""
        digest = hashlib.sha256()
        for file in sorted(Path("csrc").glob("*.[ch]")) + sorted(Path("csrc").glob("*.inc")):
            digest.update(file.read_bytes())
        commands = [getattr(self.compiler, of, None) for of in ("compiler_so", "linker_so")]
        machine = [platform.system(), platform.machine()]
        facts = [FLAGS, WINDOWS_FLAGS, instruction_sets(), commands, machine]
        digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def copy_extensions_to_source(self) -> None:
        """Put what has been built beside the sources, for an editable installation."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, built = self._get_inplace_equivalent(build_py, ext)
            for here, there in zip(_with_facts(Path(inplace)), _with_facts(Path(built))):
                here.unlink(missing_ok=True)  # a process may run it: never write into the file
                if there.exists():
                    self.copy_file(str(there), str(here))

    def get_outputs(self) -> list[str]:
        files = [file for name in super().get_outputs() for file in _with_facts(Path(name))]
        return [str(file) for file in files if file.exists()]

    def _build(self, target: Path) -> None:
        flags = FLAGS if os.name == "posix" else WINDOWS_FLAGS
        sets = instruction_sets()
        macros = [("TORCHOPT_X86", None)] if "avx2" in sets else []
        jobs = [
            (["csrc/kernels.c"], name, [*macros, ("TORCHOPT_ISA", name)], flags + own)
            for name, own in sets.items()
        ]
        jobs.append((["csrc/engine.c", "csrc/threads.c"], "core", macros, flags))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [file for files in pool.map(self._compile, jobs) for file in files]
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = ["m", "pthread"] if os.name == "posix" else []
        self.compiler.link_shared_object(objects, str(target), libraries=libraries)
        _write_facts(target, self._sources())

    def _compile(self, job: tuple[list[str], str, list, list[str]]) -> list[str]:
        sources, name, macros, flags = job
        folder = str(Path(self.build_temp, name))
        return self.compiler.compile(sources, folder, macros, extra_postargs=flags)


class Wheel(bdist_wheel):
    """Tag the wheel for the platform, but for no version of Python; a pure one if unfused."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = not self.get_finalized_command("build_ext").get_outputs()
        return "py3", "none", super().get_tag()[2]


def _with_facts(library: Path) -> list[Path]:
    """Return a library and the file beside it that torchopt/kernels/native.py reads first."""
    return [library, Path(f"{library}.json")]


def _write_facts(library: Path, built_from: str) -> None:
    facts = {
        "built_from": built_from,
        "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "machine": platform.machine(),
        "system": platform.system(),
    }
    _with_facts(library)[1].write_text(json.dumps(facts) + "\n")


def description() -> str:
    """Return README.md for the page of a package index, where the files it links to are not.

    They are named there, and their pictures left out; links become absolute with ``SOURCES``.
    """
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    relative = r"\]\((?![a-z]+:|#)([^)]+)\)"
    if SOURCES is not None:
        return re.sub(relative, rf"]({SOURCES}\1)", text)
    text = re.sub(rf"^\[?!\[.*{relative}\n+", "", text, flags=re.MULTILINE)
    return re.sub(rf"\[([^\[\]]+){relative}", r"\1", text)


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("torchopt.kernels._fused", ["csrc/engine.c"])],
    cmdclass={"build_ext": BuildFused, "bdist_wheel": Wheel},
)
