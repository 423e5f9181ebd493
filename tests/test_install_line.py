"""README's installation line, typed in an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.thorough
def test_the_line_of_readme_installs_what_its_first_example_needs(tmp_path: Path) -> None:
    pytest.importorskip("setuptools.command.bdist_wheel", reason="setuptools is absent or old")
    (line,) = re.findall(r"```bash\n(python -m pip install .*?) +#.*\n```", README)
    unbuilt = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "_fused.*", "__pycache__")
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=unbuilt)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    programs = environment / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    # what a package index would bring is taken from here
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    (Path(own) / "elsewhere.pth").write_text("\n".join(site.getsitepackages()))
    for old in Path(own).glob("setuptools*"):  # it would hide the one that is needed
        shutil.rmtree(old)
    variables = {
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_BUILD_ISOLATION": "0",  # which means: no isolation
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    done = subprocess.run(
        line.split(), cwd=clone, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (block, *_) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    block += "\nprint(torchopt.__file__)"
    ran = subprocess.run(
        [str(python), "-c", block],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    *printed, file = ran.stdout.splitlines()
    assert Path(file).is_relative_to(environment), sys.path
    assert any("validation loss after five steps" in text for text in printed)
    assert list(Path(file).parent.glob("kernels/_fused.*")), "the library was not built"
