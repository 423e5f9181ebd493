"""Pictures and words about speed and memory are those of the results that are there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))

import speed_picture
from extensions import benchmark_page

import torchopt
from benchmarks import meta_step
from benchmarks.runner import relative_difference
from benchmarks.sides import torchopt_now
from benchmarks.sides.torch_problem import in_torch


ROOT = Path(__file__).resolve().parents[1]
FIGURES = json.loads(speed_picture.SPEED.read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_one_bar_for_each_of_five_peers() -> None:
    peers = [peer for peer, _, _ in speed_picture.ratios()]
    assert peers == ["higher", "TorchOpt 0.7.3", "Optax", "torch.optim, fused", "TorchOpt, unfused"]
    rows = {(r["key"], r["against"]): r for r in FIGURES["rows"]}
    values = [rows[of]["wall"]["value"] for of in speed_picture.PEERS]
    assert [value for _, _, value in speed_picture.ratios()] == values
    assert all(against.endswith("/ torchopt") for _, against in speed_picture.PEERS)


def test_the_picture_is_of_the_results_that_are_there() -> None:
    assert speed_picture.digest().encode() in speed_picture.PICTURE.read_bytes(), (
        "run `python docs/speed_picture.py`"
    )


def test_another_result_is_another_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    before = speed_picture.digest()
    monkeypatch.setattr(speed_picture, "megabytes", lambda: [("higher", 1.0)])
    assert speed_picture.digest() != before


def test_the_page_begins_with_the_picture_and_a_plain_paragraph() -> None:
    first = PAGE.partition("# Performance\n")[2].partition("\n## ")[0]
    assert re.findall(r"\{(\w+)\} generated/(\w+\.\w+)", first) == [
        ("image", "peers.png"),
        ("include", "benchmark_summary.md"),
    ]
    text = benchmark_page.summary(FIGURES)
    assert not re.search(r"interval|target|limits", text)
    small = next(r for r in FIGURES["rows"] if r["against"] == "higher / torchopt")
    assert f"`higher` takes {small['wall']['value']:.1f} times" in text


def test_readme_has_the_picture_after_the_ways_to_differentiate() -> None:
    headings = re.findall(r"^## (.*)$", README, flags=re.M)
    at = headings.index("Speed and memory")
    assert headings[at - 1] == "Every way to differentiate"
    section = README.partition("## Speed and memory\n")[2].partition("\n## ")[0]
    for needed in (
        "docs/images/speed_and_memory.png",
        "(docs/performance.md)",
        "`python -m benchmarks`",
    ):
        assert needed in section


def test_results_that_differ_are_explained() -> None:
    text = benchmark_page.differences(FIGURES["cases"])
    assert "e-01" not in text
    for side in re.findall(r"^\* \*\*(.+?)\*\*", text, flags=re.M):
        assert benchmark_page.REASONS[side] in text
    one = {"case": {"peer": {"relative_difference": {"float64": 0.25}}}}
    assert "* **peer**, by 0.25 on *case*." in benchmark_page.differences(one)
    assert "except" not in benchmark_page.differences({})


def test_the_place_of_eps_is_why_higher_differs() -> None:
    """Adam with ``higher``'s divisor, against ours: the difference that was measured."""
    problem = meta_step.problem("mlp", dtype="float64")
    ours = [grad.detach().clone() for grad in torchopt_now.meta_step(problem)()]
    built = in_torch(problem)
    net, adam = built.network, built.adam
    tx = torchopt.adam(
        adam.lr, adam.betas, lambda step: adam.eps / (1 - adam.betas[1] ** (step + 1)) ** 0.5
    )
    net.zero_grad()
    for task in built.tasks:
        with torchopt.inner_loop(net, tx) as inner:
            for _ in range(built.steps):
                inner.step(built.loss(net(task.support_x), task.support_y))
            built.loss(net(task.query_x), task.query_y).backward()
    theirs = [p.grad for p in net.parameters()]
    assert all(isinstance(grad, torch.Tensor) for grad in theirs)
    found = relative_difference([g.numpy() for g in theirs], [g.numpy() for g in ours])  # pyright: ignore
    checks = FIGURES["cases"]["meta-step mlp"]["higher"]["relative_difference"]
    assert found == pytest.approx(checks["float64, as timed"], rel=1e-6)
    assert checks["float64"] < 1e-12  # with a beta2 of 0 the two are one definition
