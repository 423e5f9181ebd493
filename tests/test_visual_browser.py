"""The pages of torchopt.visual.show in a real browser: clicks, keys, and what is shown then."""

import time

import pytest
from visual_browsers import needs_browser
from visual_graphs import diamond, loop, node, on_paths, unrolled
from visual_view import PIXELS, View

from torchopt.visual.graph import Graph
from torchopt.visual.show import GraphPage, show


pytestmark = needs_browser


def test_a_click_lights_the_paths_and_escape_puts_them_out(view):
    page = view(GraphPage(diamond()))
    assert page.state()["lit"] is None
    assert page.click(0)["lit"] == [0, 2, 3, 4, 5]
    assert page.click(1)["lit"] == [1, 4, 5]
    assert page.click(3)["lit"] == [3, 5]
    assert page.click(5)["lit"] == [5]
    state = page.press("Escape")
    assert (state["lit"], state["selected"]) == (None, None)


def test_a_click_beside_everything_clears(view):
    page = view(GraphPage(diamond()))
    page.click(0)
    box = page.page.locator("#picture").bounding_box()
    page.page.mouse.click(box["x"] + 5, box["y"] + box["height"] - 5)
    assert page.settle()["selected"] is None


def test_lit_paths_and_cuts_are_drawn(view):
    """w -> A -> loss stand below each other, so between two of them there is only their edge."""
    nodes = [node(0, "leaf", "w"), node(1, "operation", "A", cuts=("cut",)), node(2, "result", "r")]
    page = view(GraphPage(Graph(nodes, [(0, 1), (1, 2)])))
    places = [page.page.evaluate(f"torchoptGraph.place({key})") for key in range(3)]

    def between(above, below):
        x, y = ((a + b) / 2 for a, b in zip(places[above], places[below]))
        return page.page.evaluate(PIXELS, ["--lit", x - 4, y - 4, 8, 8])

    def cut_mark():
        x, y = places[1]
        return page.page.evaluate(PIXELS, ["--cut", x, y - 30, 80, 40])

    def after(action):
        action()
        page.drawn()
        return between(0, 1) > 0, between(1, 2) > 0, cut_mark() > 50

    assert after(lambda: None) == (False, False, True)
    assert after(lambda: page.click(1)) == (False, True, True)
    assert after(lambda: page.click(0)) == (True, True, True)
    assert after(lambda: page.press("Escape")) == (False, False, True)


def test_cuts_are_marked_and_told(view):
    page = view(GraphPage(diamond()))
    assert "detached on purpose" in page.panel()
    assert page.click(1)["cuts"] == {"on": [1], "off": []}
    assert "Cuts on these paths" in page.panel()
    assert page.click(0)["cuts"] == {"on": [], "off": [1]}
    assert "Cuts elsewhere" in page.panel()
    assert "detached on purpose" in page.panel()


def test_meta_parameter_of_a_real_loop(view):
    loss, named = loop(steps=4)
    made = show(loss, named)
    page = view(made)
    (key,) = [n.key for n in made.graph.nodes if n.name == "lr"]
    assert page.click(key)["lit"] == on_paths(made.graph, key)
    assert "meta-parameter" in page.panel()
    assert "through steps 1\u20134" in page.panel()
    steps = [n.key for n in made.graph.nodes if n.kind == "step"]
    assert page.click(steps[-1])["lit"] == on_paths(made.graph, steps[-1])
    assert "through step 4." in page.panel()


def test_every_node_of_a_real_loop_can_be_clicked(view):
    made = show(*loop(steps=2))
    page = view(made)
    page.press("e")
    for n in made.graph.nodes:
        state = page.click(n.key)
        assert (state["selected"], state["lit"]) == (n.key, on_paths(made.graph, n.key))


def test_after_a_cut_in_the_loop(view):
    loss, named = loop(steps=4, cut_after=1)
    made = show(loss, named)
    page = view(made)
    assert "Not reached by the loss" in page.panel()
    page.page.get_by_role("button", name="0.weight", exact=True).click()
    state = page.settle()
    assert (state["unreached"], state["selected"]) == ("0.weight", None)
    cuts = [n.key for n in made.graph.nodes if n.cuts]
    assert cuts
    assert state["cuts"]["on"] == cuts
    for key in cuts:
        assert set(on_paths(made.graph, key)) <= set(state["lit"])
        for text in made.graph.nodes[key].cuts:
            assert text in page.panel()


def test_steps_collapse_and_expand(view):
    graph = unrolled(steps=3, layers=4)
    page = view(GraphPage(graph))
    everything = [0, 1, 2, 3]
    assert page.state()["expanded"] == []
    assert page.press_button("Expand all")["expanded"] == everything
    assert page.click_header(0)["expanded"] == [1, 2, 3]
    assert page.click_header(0)["expanded"] == everything
    assert page.press_button("Collapse all")["expanded"] == []
    hidden = next(n.key for n in graph.nodes if n.label == "Mm" and n.lane == 2)
    assert page.page.evaluate(f"torchoptGraph.hidden({hidden})")
    page.click(hidden)  # the box that stands for it
    assert page.state()["expanded"] == [2]
    assert not page.page.evaluate(f"torchoptGraph.hidden({hidden})")
    assert page.press("e")["expanded"] == everything
    assert page.press("c")["expanded"] == []


def test_a_selection_stays_lit_while_steps_collapse(view):
    graph = unrolled(steps=3, layers=4)
    page = view(GraphPage(graph))
    assert page.click(0)["lit"] == on_paths(graph, 0)
    assert page.press("c")["lit"] == on_paths(graph, 0)
    row = next(n.key for n in graph.nodes if n.name == "layers.2.weight")
    assert page.click(row)["lit"] == on_paths(graph, row)  # a row of the list of parameters


def test_search_by_keys_alone(view):
    graph = unrolled(steps=9, layers=12)
    page = view(GraphPage(graph, ["lost.weight"]))
    assert page.state()["expanded"] == []
    page.press("/")
    page.page.keyboard.type("layers.1")
    hits = page.page.locator("#hits [role=option]")
    assert hits.count() == 3  # 1, 10 and 11
    page.press("ArrowDown", "ArrowDown", "ArrowUp", "Enter")
    (key,) = [n.key for n in graph.nodes if n.name == "layers.10.weight"]
    state = page.settle()
    assert (state["selected"], state["expanded"]) == (key, [0])
    left, top = page.page.evaluate(f"torchoptGraph.place({key})")
    box = page.page.locator("#picture").bounding_box()
    assert box["x"] < left < box["x"] + box["width"]
    assert box["y"] < top < box["y"] + box["height"]
    page.press("/")
    assert page.page.input_value("#search") == "layers.1"
    page.press("Escape")
    assert page.page.input_value("#search") == ""
    assert page.state()["selected"] == key  # the first Escape empties the field only
    page.press("Escape", "Escape")
    assert page.state()["selected"] is None


def test_search_tells_what_is_not_there_and_what_is_not_reached(view):
    page = view(GraphPage(diamond(), ["lost.weight"]))
    page.page.fill("#search", "nowhere")
    assert "Nothing has this name" in page.page.inner_text("#hits")
    page.page.fill("#search", "LOST")
    assert "not reached" in page.page.inner_text("#hits")
    page.page.click("#hits [role=option]")
    assert page.settle()["unreached"] == "lost.weight"
    assert "No path leads from the loss to it" in page.panel()


def test_hovering_tells_shape_and_dtype(view):
    page = view(GraphPage(diamond()))
    assert page.page.is_hidden("#tip")
    page.page.mouse.move(*page.page.evaluate("torchoptGraph.place(0)"))
    for text in ("w", "2\u00d73", "float32"):
        assert text in page.page.inner_text("#tip")
    page.page.mouse.move(*page.page.evaluate("torchoptGraph.place(2)"))
    assert "about A" in page.page.inner_text("#tip")
    page.page.mouse.move(*page.page.evaluate("torchoptGraph.place(1)"))
    assert "Cut: detached on purpose" in page.page.inner_text("#tip")


def test_dragging_and_the_wheel_move_the_picture(view):
    page = view(GraphPage(diamond()))
    where = lambda: page.page.evaluate("torchoptGraph.place(3)")  # noqa: E731
    x, y = where()
    page.page.mouse.move(300, 600)
    page.page.mouse.down()
    page.page.mouse.move(340, 570, steps=4)
    page.page.mouse.up()
    assert where() == pytest.approx([x + 40, y - 30])
    assert page.state()["selected"] is None  # a drag is not a click
    page.wheel(0, 25)
    assert where() == pytest.approx([x + 40, y - 55])
    scale = page.state()["scale"]
    page.page.keyboard.down("Control")
    page.wheel(0, -100)
    page.page.keyboard.up("Control")
    assert page.state()["scale"] > scale


def test_the_panel_leads_from_node_to_node(view):
    page = view(GraphPage(diamond()))
    page.click(2)
    page.page.locator("#panel-body").get_by_role("button", name="B", exact=False).click()
    assert page.settle()["selected"] == 3
    assert page.press_button("Clear")["selected"] is None


@pytest.mark.parametrize(
    "name", ["<img src=x onerror='hacked=1'>", "</script><script>hacked=1</script>"]
)
def test_names_are_shown_as_text(view, name):
    graph = Graph([node(0, "leaf", name, name=name, detail=name), node(1, "result", "r")], [(0, 1)])
    page = view(GraphPage(graph, [name], name))
    page.click(0)
    page.page.mouse.move(*page.page.evaluate("torchoptGraph.place(0)"))
    page.page.fill("#search", name[:5])
    for place in ("h1", "h2", "#tip b", "#hits li >> nth=0"):
        assert name in page.page.inner_text(place)
    assert page.page.evaluate("typeof hacked") == "undefined"
    assert page.page.locator("img").count() == 0


def test_in_a_notebook_frame(browser, tmp_path):
    """The frame has no origin of its own; the worker must run there too."""
    graph = unrolled(steps=9, layers=12)
    path = tmp_path / "notebook.html"
    path.write_text(f"<!DOCTYPE html><body>{GraphPage(graph)._repr_html_()}</body>", "utf-8")
    outer = View(browser, path)
    outer.page.goto(outer.url)
    frame = outer.page.frames[1]
    frame.click("#expand")
    for _ in range(1200):
        state = frame.evaluate("torchoptGraph.state()")
        if not state["waiting"]:
            break
        time.sleep(0.05)
    assert state["expanded"] == list(range(10))
    assert (state["waiting"], state["worker"]) == (0, "yes")
    assert [text for text in outer.complaints if "about:srcdoc" not in text] == []
    outer.page.close()


def test_where_workers_are_refused_lanes_are_laid_out_all_the_same(view):
    page = view(GraphPage(unrolled(steps=9, layers=12)), before="delete window.Worker")
    state = page.press_button("Expand all")
    assert state["worker"] == "refused"
    assert state["expanded"] == list(range(10))


def test_dark_by_the_system_and_by_the_button(view):
    page = view(GraphPage(diamond()), color_scheme="dark")
    theme = lambda: page.page.evaluate("document.documentElement.dataset.theme")  # noqa: E731
    shade = lambda: page.page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    dark = shade()
    assert theme() == "dark"
    page.press_button("Light or dark")
    assert theme() == "light"
    assert shade() != dark


def test_narrow_screen(view):
    page = view(GraphPage(unrolled(steps=3, layers=4)), viewport={"width": 400, "height": 700})
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.page.is_hidden("#panel-body")
    page.press_button("Details")
    assert page.page.is_visible("#panel-body")
    page.page.get_by_role("button", name="lr scalar").click()
    assert page.settle()["selected"] == 0


def test_one_step_of_the_strip_brings_its_lane_into_view(view):
    page = view(GraphPage(unrolled(steps=20, layers=6)))
    page.page.get_by_role("navigation").get_by_role("button", name="Step 15", exact=True).click()
    page.settle()
    x, _ = page.page.evaluate("torchoptGraph.header(14)")
    box = page.page.locator("#picture").bounding_box()
    assert box["x"] < x < box["x"] + box["width"]


@pytest.mark.thorough
def test_a_long_lane_is_laid_out_in_the_order_of_computation(view):
    """More boxes in one lane than the layout library is given at once."""
    graph = unrolled(steps=0, layers=600)
    page = view(GraphPage(graph))
    assert page.press_button("Expand all")["expanded"] == [0]
    chain = [n.key for n in graph.nodes if n.kind != "leaf"]
    heights = [page.page.evaluate(f"torchoptGraph.place({key})")[1] for key in chain]
    assert heights == sorted(set(heights))


@pytest.mark.thorough
def test_five_thousand_nodes(view, capsys):
    """Times are printed, not asserted: they are the machine's."""
    graph = unrolled(steps=30, layers=41)
    assert len(graph.nodes) > 5000
    page = view(GraphPage(graph))
    marks = "performance.getEntriesByType('mark').map(m => [m.name, Math.round(m.startTime)])"
    opened = dict(page.page.evaluate(marks))
    assert page.state()["expanded"] == []
    begin = time.perf_counter()
    assert page.press_button("Expand all")["expanded"] == list(range(31))
    expanded = time.perf_counter() - begin
    before = len(page.page.evaluate("torchoptGraph.frames()"))
    page.page.mouse.move(400, 400)
    for _ in range(60):
        page.page.mouse.wheel(60, 30)
    page.drawn()
    frames = sorted(page.page.evaluate("torchoptGraph.frames()")[before:])
    assert frames
    assert page.press("f", "Escape")["lit"] is None
    page.page.fill("#search", "lr")
    assert page.press("Enter")["lit"] == on_paths(graph, 0)
    while_moving = f"{frames[len(frames) // 2]:.1f} ms (median), {frames[-1]:.1f} ms (longest)"
    with capsys.disabled():
        print(f"\n{len(graph.nodes)} nodes: drawn after {opened['torchopt:drawn']} ms")
        print(f"all expanded after {expanded:.2f} s; drawing while moving {while_moving}")
