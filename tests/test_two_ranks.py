"""DDP and FSDP2 on two gloo processes: training is that of one process with the whole batch.

The two are started once; they run the jobs (``two_ranks.py``) of all tests that are selected here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case
from frameworks import every_optimizer


pytest.importorskip("torch.distributed.fsdp")
if not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("this torch has no fully_shard", allow_module_level=True)

jobs = pytest.importorskip("two_ranks")
OTHERS = [name.partition("-")[2] for name in jobs.JOBS if name.startswith("other-")]


def job_of(item: pytest.Item) -> str:
    """Return the job of a test."""
    given = getattr(item, "callspec").params  # noqa: B009
    if "other" in given:
        return f"other-{given['other']}"
    return f"{given['law']}-{given['case'].name}"


@pytest.fixture(name="found", scope="module")
def found_fixture(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """What the two processes found wrong, by job."""
    folder = Path(tmp_path_factory.mktemp("ranks"))
    names = [job_of(x) for x in request.session.items if x.path == request.path]
    (folder / "jobs.json").write_text(json.dumps(names))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, jobs.__file__]
    processes = [
        subprocess.Popen(
            [*program, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(jobs.WORLD)
    ]
    try:
        printed = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    files = [folder / f"found-{rank}.json" for rank in range(jobs.WORLD)]
    if not all(file.exists() for file in files):
        pytest.fail("\n".join(printed))
    return [json.loads(file.read_text()) for file in files]


def assert_done(found: list[dict[str, str]], job: str) -> None:
    for rank, results in enumerate(found):
        assert job in results, f"process {rank} did not come to {job}"
        assert not results[job], f"process {rank}: {results[job]}"


@every_optimizer()
@pytest.mark.parametrize("law", ["ddp", "fsdp", "fsdp_flat"])
def test_rows(law: str, case: Case, found: list[dict[str, str]]) -> None:
    assert_done(found, f"{law}-{case.name}")


@pytest.mark.complete
@pytest.mark.parametrize("other", OTHERS)
def test_others(other: str, found: list[dict[str, str]]) -> None:
    assert_done(found, f"other-{other}")
