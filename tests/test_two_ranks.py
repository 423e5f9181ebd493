"""DDP and FSDP2 on two gloo processes: training is that of one process with the whole batch.

The two are started once; they run the jobs (``two_ranks.py``) of all tests that are selected here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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
#: Those that `make test` runs: whose mechanisms no row has.
FIRST = (
    *("clip_grad_norm-inf", "l2_ball", "reduce_on_plateau", "partition", "asam"),
    *("apply_if_finite", "lbfgs"),
)
PATIENCE = 600.0


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
    """What the two processes found wrong, by job. Of several workers one starts them for all."""
    base = tmp_path_factory.getbasetemp()
    folder = Path(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-ranks"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + PATIENCE
        while not (folder / "done").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    else:
        names = [job_of(x) for x in request.session.items if x.path == request.path]
        (folder / "jobs.json").write_text(json.dumps(names))
        (folder / "printed").write_text("\n".join(run(folder)))
        (folder / "done").touch()
    files = [folder / f"found-{rank}.json" for rank in range(jobs.WORLD)]
    if not all(file.exists() for file in files):
        pytest.fail((folder / "printed").read_text())
    return [json.loads(file.read_text()) for file in files]


def run(folder: Path) -> list[str]:
    """Run the jobs in two processes, and return what those printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen(
            [sys.executable, jobs.__file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(jobs.WORLD)
    ]
    try:
        return [p.communicate(timeout=PATIENCE)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()


def assert_done(found: list[dict[str, str]], job: str) -> None:
    for rank, results in enumerate(found):
        assert job in results, f"process {rank} did not come to {job}"
        if results[job] == jobs.SKIPPED:
            pytest.skip(jobs.SKIPPED)
        assert not results[job], f"process {rank}: {results[job]}"


@pytest.mark.sampled(3, by="family")
@every_optimizer()
@pytest.mark.parametrize("law", ["ddp", "fsdp", "fsdp_flat"])
def test_rows(law: str, case: Case, found: list[dict[str, str]]) -> None:
    assert_done(found, f"{law}-{case.name}")


@pytest.mark.parametrize(
    "other",
    [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.thorough]) for name in OTHERS],
)
def test_others(other: str, found: list[dict[str, str]]) -> None:
    assert_done(found, f"other-{other}")
