import base64
import hashlib
import html
import importlib
import json
import os
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
import torch
from visual_graphs import diamond, loop, node

import torchopt
from torchopt.visual.graph import Graph, build
from torchopt.visual.lanes import homes
from torchopt.visual.show import GraphPage, show


module = importlib.import_module("torchopt.visual.show")  # the package has a function of this name


class Parsed(HTMLParser):
    """The elements of a page, and the text in its scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.open = (tag, dict(attrs))

    def handle_data(self, data):
        if self.open:
            self.texts.append((*self.open, data))
            self.open = None

    def graph(self):
        (text,) = [t for _, attributes, t in self.texts if attributes.get("id") == "graph"]
        return json.loads(text)

    def policy(self):
        (policy,) = [a["content"] for _, a in self.elements if a.get("http-equiv")]
        return policy


def test_page_holds_the_graph_of_the_loss():
    loss, named = loop()
    page = show(loss, named)
    assert page.graph == build(loss, named)
    held = Parsed(page.html).graph()
    given = {**page.graph.to_json(), "homes": homes(page.graph), "unreached": []}
    assert held == json.loads(json.dumps(given))
    assert {n["name"] for n in held["nodes"] if n["kind"] == "leaf"} == set(named)


def test_page_refers_to_nothing_outside():
    parsed = Parsed(show(loop()[0]).html)
    assert not [tag for tag, _ in parsed.elements if tag in ("link", "img", "iframe", "object")]
    allowed = {"viewBox", "viewbox"}  # of the drawn icon
    for tag, attributes in parsed.elements:
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes) - allowed, tag
    policy = parsed.policy()
    assert "default-src 'none'" in policy
    for word in ("http", "unsafe", "*", "data:", "connect-src", "img-src"):
        assert word not in policy


def test_policy_names_the_scripts_and_the_style_that_are_there():
    parsed = Parsed(GraphPage(diamond(), title="<é>").html)
    run = [(tag, t) for tag, a, t in parsed.texts if a.get("type") != "application/json"]
    assert [tag for tag, _ in run] == ["style", "script", "script"]
    for _, text in run:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in parsed.policy()
    assert parsed.policy().count("sha256-") == 3


@pytest.mark.parametrize(
    "name",
    ["</script><script>alert(1)</script>", "<!--<script>", "{{script}}", "a\"'&amp;\u2028é", "a\\"],
)
def test_names_are_text(name):
    graph = Graph([node(0, "leaf", name, name=name), node(1, "result", name)], [(0, 1)])
    plain = Parsed(GraphPage(diamond(), ["name"], "title").html)
    page = Parsed(GraphPage(graph, [name], name).html)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    held = page.graph()
    assert held["nodes"][0]["name"] == name
    assert held["unreached"] == [name]


def test_unreached_are_those_the_loss_does_not_depend_on():
    w, v, fixed = (
        torch.ones(2, requires_grad=True),
        torch.ones(3, requires_grad=True),
        torch.ones(4),
    )
    loss = (w * fixed[:2]).sum()
    page = show(loss, {"w": w, "v": v, "fixed": fixed, "loss": loss})
    assert Parsed(page.html).graph()["unreached"] == ["v"]


def test_weights_before_a_full_cut_are_not_reached():
    loss, named = loop(steps=3, cut_after=1)
    names = Parsed(show(loss, named).html).graph()["unreached"]
    reached = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    assert names == [name for name, grad in zip(named, reached) if grad is None]
    assert "lr" not in names
    assert len(names) == 4


def test_names_may_come_from_a_generator():
    net = torch.nn.Linear(2, 1)
    page = show(net(torch.ones(1, 2)).sum(), net.named_parameters())
    assert {n.name for n in page.graph.nodes if n.kind == "leaf"} == {"weight", "bias"}
    assert Parsed(page.html).graph()["unreached"] == []


def test_path_none_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = show(loop()[0])
    assert page.path is None
    assert "not saved" in repr(page)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [str, Path])
def test_path_is_written_whole(tmp_path, kind):
    page = show(loop()[0], path=kind(tmp_path / "graph.html"))
    assert page.path == (tmp_path / "graph.html").resolve()
    assert page.path.read_text("utf-8") == page.html
    assert [p.name for p in tmp_path.iterdir()] == ["graph.html"]
    assert str(page.path) in repr(page)


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "graph.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="no graph"):
        show(torch.ones(()), path=path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["graph.html"]


@pytest.mark.parametrize(
    ("place", "error", "text"),
    [
        ("missing/graph.html", FileNotFoundError, "create it first"),
        ("file/graph.html", FileNotFoundError, "create it first"),
        ("folder", IsADirectoryError, "must name a file"),
    ],
)
def test_bad_path_is_refused_before_the_graph_is_read(tmp_path, monkeypatch, place, error, text):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(module, "build", lambda *_: pytest.fail("the graph has been read"))
    with pytest.raises(error, match=text):
        show(loop()[0], path=tmp_path / place)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_unwritable_folder_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError, match="choose another path"):
            show(loop()[0], path=tmp_path / "graph.html")
    finally:
        tmp_path.chmod(0o755)


def test_open_uses_the_saved_file_or_a_temporary_one(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(module.webbrowser, "open", opened.append)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    page = GraphPage(diamond())
    temporary = page.open()
    assert tmp_path.resolve() in temporary.parents
    assert page.save(tmp_path / "kept.html") == page.open()
    assert opened == [temporary.as_uri(), (tmp_path / "kept.html").resolve().as_uri()]


def test_notebook_frame_holds_the_page():
    page = GraphPage(diamond(), ["<b>"], 'a "title"')
    page.height = 300
    ((tag, attributes),) = Parsed(page._repr_html_()).elements
    assert tag == "iframe"
    assert attributes["srcdoc"] == page.html
    assert attributes["sandbox"] == "allow-scripts"
    assert "height: 300px" in attributes["style"]


def test_heading_tells_the_size():
    loss, named = loop(steps=3)
    graph = build(loss, named)
    text = module.summary(graph)
    assert text.startswith("3 optimizer steps, ")
    assert f"{len(graph.nodes):,} boxes" in text
    assert text in html.unescape(show(loss, named).html)
    assert module.summary(Graph([node(0, "result", "x")], [])).endswith("1 box")


def test_licence_of_the_layout_library_is_in_the_package_and_in_each_page():
    folder = resources.files("torchopt.visual") / "page"
    licence = (folder / "dagre" / "LICENSE").read_text("utf-8")
    assert "Permission is hereby granted" in licence
    assert licence in GraphPage(diamond()).html


def test_every_script_of_the_package_is_in_the_page():
    folder = resources.files("torchopt.visual") / "page" / "script"
    there = {Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".js")}
    assert there == set(module._SCRIPTS)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="var must be"):
        show(3)  # pyright: ignore
    with pytest.raises(TypeError, match="params"):
        show(loop()[0], params=3)
    with torchopt.inner_loop(torch.nn.Linear(1, 1), torchopt.sgd(0.1)), pytest.raises(ValueError):
        show(torch.ones(1))
