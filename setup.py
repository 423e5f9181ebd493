"""Build the fused engine: a plain C library beside the package, loaded with ctypes.

It knows neither Python nor torch, so one wheel serves every version of both. Without a working C
compiler the package installs without it and runs unfused.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


NAME = "torchopt.kernels._fused"
#: Instruction sets with kernels of their own -> compiler flags; the best is chosen at run time.
X86 = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        "-mavx512f",
        "-mavx512dq",
        "-mavx512bw",
        "-mavx512vl",
        "-mfma",
        "-mprefer-vector-width=512",
    ],
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


def instruction_sets() -> dict[str, list[str]]:
    """Return the instruction sets to compile for."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64") and os.name == "posix"
    cross = "ARCHFLAGS" in os.environ  # several architectures in one file: no flags for one of them
    return X86 if is_x86 and not cross else {"generic": []}


class BuildFused(build_ext):
    """Compile the kernels once for each instruction set, and link."""

    def get_ext_filename(self, fullname: str) -> str:
        suffix = ".dll" if os.name == "nt" else ".so"  # no tag: it depends on no Python
        return str(Path(*fullname.split(".")).with_suffix(suffix))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)))
        except Exception as error:
            print(
                f"torchopt: no fused kernels, the package will run unfused ({error})",
                file=sys.stderr,
            )
            if os.environ.get("TORCHOPT_REQUIRE_FUSED"):
                raise

    def copy_extensions_to_source(self) -> None:
        """Copy what has been built; nothing if there was no compiler."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, built = self._get_inplace_equivalent(build_py, ext)
            for suffix in ("", ".json"):
                if Path(built + suffix).exists():
                    self.copy_file(built + suffix, inplace + suffix)

    def get_outputs(self) -> list[str]:
        return [name for name in super().get_outputs() if Path(name).exists()]

    def _build(self, target: Path) -> None:
        flags = FLAGS if os.name == "posix" else ["/O2", "/std:c11"]
        sets = instruction_sets()
        macros = [("TORCHOPT_X86", None)] if len(sets) > 1 else []
        objects = self.compiler.compile(
            ["csrc/engine.c", "csrc/threads.c"],
            output_dir=self.build_temp,
            macros=macros,
            depends=["csrc/engine.h"],
            extra_postargs=flags,
        )
        for name, own in sets.items():
            objects += self.compiler.compile(
                ["csrc/kernels.c"],
                output_dir=str(Path(self.build_temp) / name),
                macros=[("TORCHOPT_ISA", name)],
                depends=["csrc/engine.h", "csrc/kernels.inc"],
                extra_postargs=flags + own,
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = ["m", "pthread"] if os.name == "posix" else []
        self.compiler.link_shared_object(objects, str(target), libraries=libraries)
        content = target.read_bytes()
        facts = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "machine": platform.machine(),
            "system": platform.system(),
        }
        Path(f"{target}.json").write_text(json.dumps(facts) + "\n")


class Wheel(bdist_wheel):
    """Tag the wheel for the platform, but for no version of Python; a pure one if unfused."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, machine = super().get_tag()
        return "py3", "none", machine if self._has_library() else "any"

    def _has_library(self) -> bool:
        return any(Path(self.bdist_dir or "build").rglob("_fused.*"))


setup(
    ext_modules=[Extension(NAME, ["csrc/engine.c"])],
    cmdclass={"build_ext": BuildFused, "bdist_wheel": Wheel},
)
