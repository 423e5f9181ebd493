"""The example of data attribution at tiny size: right derivatives, the run, a run resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from torchopt.diff import Checkpointed


pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.usefixtures("examples_on_path", "no_figures")

TINY = [
    *("--examples", "12", "--batch", "4", "--steps", "6", "--text-steps", "2", "--subsets", "3"),
    *("--tracin-checkpoints", "2", "--killed-steps", "2", "--share", "0.2"),
]


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    from common import attribution_report

    monkeypatch.setattr(attribution_report, "_draw", lambda *_: None)


@pytest.mark.parametrize("problem", ["digits", "text"])
def test_the_derivative_is_that_of_the_run(problem: str) -> None:
    """By central differences, with everything at once: the order of batches, AdamW, eps_root."""
    from common.attribution import Run

    run = Run(problem, examples=8, batch=4, steps=4, lr=0.01, micro_batches=2)
    grads, loss = run.metagradient(Checkpointed("log"))
    assert grads.abs().max() > 1e-6

    def loss_at(weights: torch.Tensor) -> float:
        with torch.no_grad():
            return run.made()[0].held_out_loss(run.trained(weights, Checkpointed())[0]).item()

    ones, eps = torch.ones(8, dtype=torch.float64), 1e-5
    assert loss_at(ones) == pytest.approx(loss, rel=1e-12)
    direction = torch.linspace(-1, 1, 8, dtype=torch.float64)
    slope = (loss_at(ones + eps * direction) - loss_at(ones - eps * direction)) / (2 * eps)
    assert (grads @ direction).item() == pytest.approx(slope, rel=1e-5, abs=1e-10)


def test_a_run_without_any_example_left_out_is_the_run() -> None:
    from common.attribution import Run

    run = Run("digits", examples=12, batch=4, steps=5, lr=0.01)
    left_out = torch.zeros(2, 12, dtype=torch.bool)
    left_out[1, 3] = True
    whole, without = run.retrained(left_out).tolist()
    grads, loss = run.metagradient(Checkpointed())
    assert whole == pytest.approx(loss, rel=1e-10)
    assert abs(without - whole) > 1e-8
    assert torch.isfinite(grads).all()


def test_the_run_and_going_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import data_attribution

    def main(*options: str) -> dict[str, Any]:
        return data_attribution.main([*TINY, "--output", str(tmp_path), *options])

    killed = {"killed": True, "same": True, "steps": 2, "left_files": 0}
    monkeypatch.setattr(data_attribution, "killed_and_resumed", lambda *_: killed)
    retrained = data_attribution.retrained

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data_attribution, "retrained", interrupted)
        with pytest.raises(SystemExit, match="Pass --resume to continue"):
            main()
    results = main("--resume")
    assert data_attribution.retrained is retrained
    assert len(results["claims"]) == 4
    assert results["claims"][-1]["holds"]
    assert json.loads((tmp_path / "results.json").read_text())["scores"] == results["scores"]
    assert not list((tmp_path / "checkpoints-digits").iterdir())
    first = (tmp_path / "metrics.jsonl").read_text()
    main("--resume")
    assert (tmp_path / "metrics.jsonl").read_text() == first
