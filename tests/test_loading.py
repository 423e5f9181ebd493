"""Where the library is loaded: odd paths, forks, archives, and where its warning points to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fusing import needs_library

from torchopt.kernels.backends import cpu as native


ROOT = Path(__file__).resolve().parents[1]
LINUX = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc")


def run(code: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=path.parent if path.is_file() else path,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
    )


# The runtime that torch has loaded ----------------------------------------------------------------

LINE = b"7f15d9a00000-7f15d9a21000 r-xp 00000000 fe:01 131  "
MAPS: dict[bytes, set[str]] = {
    b"/usr/lib/libgomp.so.1": {"/usr/lib/libgomp.so.1"},
    b"/my code/my env/libgomp-a34b3233.so.1.0.0": {"/my code/my env/libgomp-a34b3233.so.1.0.0"},
    b"/x\\012y/libiomp5.so": {"/x\ny/libiomp5.so"},
    b"/x/libomp.so (deleted)": {"/x/libomp.so (deleted)"},
    b"/x/caf\xe9/libomp.so": {os.fsdecode(b"/x/caf\xe9/libomp.so")},
    b"/x/\xff\xfe.bin": set(),
    b"/libgomp.so/data.bin": set(),
    b"/x/mylibgomp.so.1": set(),
    b"": set(),
}


@pytest.mark.parametrize(("name", "expected"), MAPS.items(), ids=str)
def test_mapped_files_of_any_name(name: bytes, expected: set[str]) -> None:
    others = [LINE + b"/bin/\xff", LINE.strip(), LINE + b"[stack]"]
    maps = b"\n".join([*others, LINE + name, LINE + name, b""])
    assert native._openmp_runtimes(maps) == expected


ODD_FILE = """
import mmap, sys, torch, torchopt
with open(sys.argv[1].encode() + b"/caf\\xe9.bin", "wb+") as file:
    file.write(b"x" * 4096)
    file.flush()
    kept = mmap.mmap(file.fileno(), 4096)
    p = [torch.ones(3)]
    tx = torchopt.sgd(0.5, use_accelerated_op=True)
    print(tx.apply_gradients(p, tx.init(p), p, inplace=False)[0][0].tolist())
"""


@needs_library
@LINUX
def test_a_mapped_file_whose_name_is_no_text(tmp_path: Path) -> None:
    code = f"import sys; sys.argv = ['', {str(tmp_path)!r}]\n{ODD_FILE}"
    done = run(code)
    assert done.stdout.strip() == "[0.5, 0.5, 0.5]", done.stderr


# Forks --------------------------------------------------------------------------------------------

FORK = """
import os, signal, torch, torchopt
from torchopt.kernels.backends import cpu as native
torch.set_num_threads(2)
x = torch.rand(400_000).exp()  # the team of the parent
params = [torch.nn.Parameter(torch.ones(30_000)) for _ in range(60)]
for p in params:
    p.grad = torch.ones(30_000)
optimizer = torchopt.SGD(params, lr=0.25)
assert native.load.cache_info().currsize == 0
child = os.fork()
if child == 0:
    signal.alarm(30)
    optimizer.step()
    os._exit(0 if all(p[0] == 0.75 for p in params) else 1)
assert os.waitpid(child, 0)[1] == 0, "the child hung"
optimizer.step()
print("right")
"""


@needs_library
@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="there is no fork")
def test_a_child_whose_first_step_loads_the_library() -> None:
    """OpenMP's team does not survive fork: the child has to take threads of the library's own."""
    done = run(FORK)
    assert done.stdout.strip() == "right", done.stderr


# Facts, archives, warnings ------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("nested", ["[" * 200_000, '{"sha256": ' * 100_000], ids=["list", "dict"])
def test_facts_nested_deep_are_a_reason(tmp_path: Path, nested: str) -> None:
    path = tmp_path / native.LIBRARY.name
    shutil.copy(native.LIBRARY, path)
    Path(f"{path}.json").write_text(nested)
    with pytest.raises(native.UnavailableError, match="cannot be read"):
        native.Library(path)


USERS = """
import warnings
import torch, torchopt
from torchopt.kernels.backends import cpu as native
{change}
p = torch.nn.Parameter(torch.ones(2))
p.grad = torch.ones(2)
optimizer = torchopt.Adam([p])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer.step()
for warning in caught:
    print(warning.filename, warning.message)
"""


def test_the_warning_points_to_the_users_line_and_says_what_to_type(tmp_path: Path) -> None:
    code = USERS.format(change="native.LIBRARY = native.LIBRARY.with_name('gone.so')")
    script = tmp_path / "users.py"
    script.write_text(code)
    done = run(f"import runpy; runpy.run_path({str(script)!r})")
    assert done.stdout.startswith(f"{script} Optimizers run unfused"), done.stderr
    assert "pip install --no-cache-dir --force-reinstall --no-deps torchopt" in done.stdout
    assert done.stdout.count("Optimizers run unfused") == 1


def test_an_import_from_an_archive_is_called_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for file in (ROOT / "torchopt").rglob("*.py*"):
            archive.write(file, file.relative_to(ROOT))
    done = run(USERS.format(change=""), tmp_path / "packed.zip")
    assert "from inside packed.zip" in done.stdout, done.stderr
    assert "unpack it" in done.stdout
