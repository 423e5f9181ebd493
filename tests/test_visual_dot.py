"""Pictures: what their source says, and errors where a program is missing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import nonzero
from torch import nn

import torchopt
from torchopt.visual import make_dot, resize_graph


graphviz = pytest.importorskip("graphviz")
needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="the program dot is missing")


@pytest.fixture(name="picture")
def picture_fixture() -> Any:
    """A function that draws two steps of MetaAdam; it takes the options of make_dot."""

    def draw(**options: Any) -> Any:
        torch.manual_seed(0)
        net, x = nn.Linear(2, 1), torch.randn(4, 2)
        lr = torch.tensor(0.1, requires_grad=True)
        names: list[Any] = [{"lr": lr}]
        with torchopt.inner_loop(net, torchopt.adam(lr)) as inner:
            for step in range(3):
                names.append(
                    torchopt.extract_state_dict(
                        net, enable_visual=True, visual_prefix=f"step{step}."
                    )
                )
                if step < 2:
                    inner.step(net(x).square().mean())
            loss = net(x).square().mean()
        return make_dot(loss, [*names, {"loss": loss}], **options)

    return draw


def test_colours_and_names(picture: Any) -> None:
    lines = picture().source.splitlines()

    def line(text: str) -> str:
        (found,) = [
            entry for entry in lines if f'label="{text}' in entry or f"[label={text}" in entry
        ]
        return found

    assert "fillcolor=lightblue" in line("lr")
    assert "fillcolor=lightblue" in line("step0.weight")
    assert "fillcolor=lightcyan" in line("step1.weight")
    assert "fillcolor=orange" in line("Adam step 1")
    assert "fillcolor=darkolivegreen1" in line("loss")
    assert sum("fillcolor=orange" in entry for entry in lines) == 2
    assert "fillcolor=lightgrey" in picture().source


def test_calls_as_in_0_7_3() -> None:
    net = nn.Linear(2, 1)
    loss = net(torch.ones(3, 2)).sum()
    for params in (
        None,
        dict(net.named_parameters()),
        net.named_parameters(),
        torchopt.extract_state_dict(net, enable_visual=True),
        [torchopt.extract_state_dict(net, enable_visual=True, visual_prefix="p."), {"loss": loss}],
    ):
        dot = make_dot(loss, params, True, True, 20)
        assert isinstance(dot, graphviz.Digraph)
        assert params is None or "weight" in dot.source
    assert isinstance(make_dot((loss, loss * 2)), graphviz.Digraph)


def test_attributes_and_saved_tensors() -> None:
    x, y = nonzero(2, 3, requires_grad=True), nonzero(2, 3)
    loss = (x * y).sum(dim=1, keepdim=True).sum()
    plain = make_dot(loss).source
    assert "keepdim: True" not in plain
    assert "khaki" not in plain
    assert "keepdim: True" in make_dot(loss, show_attrs=True).source
    assert "(2, 3) float64" in make_dot(loss, show_saved=True).source.split("khaki")[0][-80:]
    long = make_dot(loss, show_attrs=True, max_attr_chars=1).source
    assert "keepdim: T" in long
    assert "keepdim: True" not in long
    last = make_dot(x.select(-1, -2).sum(dim=-1), show_attrs=True).source
    assert "index: -2" in last
    assert "dim: -1" in last.replace("dim: (-1,)", "dim: -1")
    assert "1844674407370955" not in last


def test_saved_tensors_that_cannot_be_read() -> None:
    x = nonzero(3, requires_grad=True)
    y = x * 2
    loss = (y * y).sum()
    with torch.no_grad():
        y.add_(1)
    assert "overwritten in place" in make_dot(loss, show_saved=True).source
    freed = (x * x).sum()
    freed.backward()
    assert "freed by an earlier" in make_dot(freed, show_saved=True).source


def test_clusters(picture: Any) -> None:
    source = picture(clusters=True).source
    assert [f"cluster_{lane}" in source for lane in range(4)] == [True, True, True, False]
    assert "cluster" not in picture().source


def test_a_cut_is_written_into_the_step() -> None:
    net = nn.Linear(2, 1)
    inner = torchopt.MetaSGD(net, lr=0.1)
    inner.step(net(torch.ones(3, 2)).square().mean(), create_graph=False)
    source = make_dot(net(torch.ones(3, 2)).sum()).source
    assert "create_graph=False" in source
    assert "color=red" in source


@pytest.mark.parametrize("name", ['a"b', "back\\slash", "<i>html</i>", "two\nlines", "λ", ""])
@needs_dot
def test_any_name_can_be_drawn(name: str) -> None:
    w = nonzero(2, requires_grad=True)
    assert b"<svg" in make_dot(w.sum(), {name: w}).pipe(format="svg")


@needs_dot
def test_rendering(picture: Any, tmp_path: Path) -> None:
    path = Path(picture(clusters=True, show_saved=True).render(tmp_path / "graph", format="png"))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("call", ["render", "pipe", "view", "_repr_mimebundle_"])
def test_without_dot_the_error_says_how_to_get_it(
    picture: Any, call: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    dot = picture()
    with pytest.raises(graphviz.ExecutableNotFound) as error:
        getattr(dot, call)()
    for text in ("apt install graphviz", "brew install", ".source", "torchopt.visual.show"):
        assert text in str(error.value)
    assert dot.source.startswith("digraph")


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchopt.visual import dot

    dot._digraph_class.cache_clear()
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(ImportError, match=r"torchopt\[visual\]"):
        make_dot(nonzero(2, requires_grad=True).sum())


def test_resize_graph(picture: Any) -> None:
    dot = picture()
    elements = len(dot.body)
    assert resize_graph(dot, size_per_element=1.0) is dot
    assert dot.graph_attr["size"] == f"{elements},{elements}"
    resize_graph(dot, size_per_element=0.01, min_size=7.0)
    assert dot.graph_attr["size"] == "7,7"
    with pytest.raises(ValueError, match="must be > 0, got 0 and 12"):
        resize_graph(dot, size_per_element=0)


def test_bad_options_are_refused() -> None:
    loss = nonzero(2, requires_grad=True).sum()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_dot(loss, max_attr_chars=0)
    with pytest.raises(TypeError, match="without a name"):
        make_dot(loss, [loss])
