"""Data hyper-cleaning: derivatives against oracles, the data, and the run at tiny size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import META_GRADIENT, relative_error
from torch import Tensor


for needed in ("sklearn", "rich", "matplotlib", "joblib"):
    pytest.importorskip(needed)

pytestmark = [pytest.mark.usefixtures("examples_on_path", "no_figures")]


def settings(**changes: Any) -> Any:
    from dataclasses import replace

    import hyper_cleaning

    return replace(hyper_cleaning.CLEANING, **changes)


def small(count: int = 6) -> tuple[Any, Any]:
    """A problem of random numbers in float64: examples to train on, and clean ones."""
    from common.digit_data import Images

    x = torch.randn(count + 10, 1, 2, 2, dtype=torch.float64)
    images = Images(x, torch.randint(0, 10, (count + 10,)))
    places = torch.arange(len(images))
    return images[places[:count]], images[places[count:]]


def differences(function: Any, x: Tensor, eps: float = 1e-5) -> Tensor:
    steps = eps * torch.eye(len(x), dtype=x.dtype)
    return torch.tensor([(function(x + e) - function(x - e)) / (2 * eps) for e in steps]).to(x)


@pytest.mark.parametrize("method", ["unrolled", "checkpointed"])
def test_derivatives_through_the_steps(method: str) -> None:
    from common.cleaning_training import Inner, derivative

    train, clean = small()
    inner, scores = Inner(train, settings()), torch.randn(6).double()
    found = derivative(method, inner, clean, scores, 7)[1]
    value = lambda s: derivative(method, inner, clean, s, 7)[0]  # noqa: E731
    assert relative_error(found, differences(value, scores)) < META_GRADIENT


def test_the_implicit_derivative_is_that_of_a_long_training() -> None:
    from common.cleaning_training import Inner, derivative

    train, clean = small()
    inner, scores = Inner(train, settings(ridge=0.05)), torch.randn(6).double()
    exact = derivative("unrolled", inner, clean, scores, 250)[1]  # held to differences above
    assert relative_error(derivative("implicit", inner, clean, scores, 250)[1], exact) < 1e-3
    assert relative_error(derivative("T1-T2", inner, clean, scores, 250)[1], exact) > 1e-2


def test_t1_t2_is_the_derivative_of_one_step_from_the_solution() -> None:
    from common.cleaning_training import Inner, derivative, logits

    train, clean = small()
    inner = Inner(train, settings(momentum=0.0, ridge=0.05))
    scores = torch.randn(6).double()
    found = derivative("T1-T2", inner, clean, scores, 50)[1]
    at = inner.trained(scores.sigmoid(), 50)
    leaf = scores.clone().requires_grad_()
    grads = inner.gradient(at, leaf.sigmoid())
    flat = {name: p.detach().requires_grad_() for name, p in at.items()}
    loss = torch.nn.functional.cross_entropy(logits(flat, clean.x.flatten(1)), clean.y)
    outside = torch.autograd.grad(loss, list(flat.values()))
    total = sum((g * o).sum() for g, o in zip(grads.values(), outside))
    (expected,) = torch.autograd.grad(-total, leaf)  # pyright: ignore[reportArgumentType]
    assert relative_error(found, expected) < META_GRADIENT


TINY = (
    *("--seeds", "2", "--size", "60", "--clean", "20", "--inner-steps", "4"),
    *("--outer-steps", "2", "--workers", "1", "--threads", "1", "--rates", "0.5"),
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs it; memory is measured in this process, for a new one takes seconds to start."""
    import hyper_cleaning

    monkeypatch.setattr(hyper_cleaning, "CLEANING", settings(final_steps=20))
    monkeypatch.setattr(hyper_cleaning, "alone", lambda function, *args, **_: function(*args))
    return lambda *options: hyper_cleaning.main([*TINY, *options])


def test_the_example_at_tiny_size(run: Any, tmp_path: Path) -> None:
    results = run("--output", str(tmp_path))
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept == json.loads(json.dumps(results))
    assert len(results["figures"]) == 2 * 7
    accuracies = {(row["method"], row["seed"]): row["test_accuracy"] for row in results["figures"]}
    for seed in (0, 1):  # the same derivative, so the same weights
        pair = [accuracies[name, seed] for name in ("unrolled", "checkpointed")]
        assert pair[0] == pytest.approx(pair[1])
        assert accuracies["right labels only", seed] > 30
    assert len(results["claims"]) == 4 + 1 + 1 + 2
    assert (tmp_path / "hyper_cleaning.png").read_bytes().startswith(b"\x89PNG")
    errors = {(row["method"], row["steps"]): row["error"] for row in results["memory"]}
    assert errors["checkpointed", 40] < 1e-5
    assert errors["T1-T2", 40] > errors["checkpointed", 40]
    again = run("--output", str(tmp_path), "--resume")
    assert again["figures"] == results["figures"]


def test_options_that_do_not_fit(run: Any, tmp_path: Path, capsys: Any) -> None:
    for options, message in (
        (("--data", "mnist"), "needs --root DIR"),
        (("--rates", "1.5"), "must be strictly between 0 and 1"),
        (("--clean", "15"), "no multiple of the ten digits"),
    ):
        with pytest.raises(SystemExit) as ended:
            run("--output", str(tmp_path), *options)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_memory_is_measured_at_its_peak() -> None:
    """What is made and thrown away again is seen; a process of its own is another one."""
    from common.memory import alone, peak

    cpu = torch.device("cpu")
    assert 60 < peak(lambda: torch.ones(64 * 2**18).sum(), cpu) < 80
    assert peak(lambda: None, cpu) < 2
    assert alone(os.getpid) != os.getpid()


def test_a_single_seed_shows_nothing_and_has_no_interval(run: Any, tmp_path: Path) -> None:
    from common.cleaning_report import table

    results = run("--output", str(tmp_path), "--seeds", "1", "--methods", "no cleaning", "T1-T2")
    assert [claim["claim"] for claim in results["claims"] if "better than" in claim["claim"]] == []
    accuracies = list(table(results["figures"], results["memory"]).columns[1].cells)
    assert len(accuracies) == 2
    assert all(float(text) > 0 for text in accuracies)
