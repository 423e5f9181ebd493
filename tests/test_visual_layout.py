"""Where the pages of torchopt.visual.show put things: everything fits, in any window, in any state.

The window of a page is 1,920, 1,400 or 400 pixels wide, light or dark; what is measured are the
places of all boxes on the page, as a real browser has drawn it.
"""

from __future__ import annotations

import itertools

import pytest
from visual_browsers import needs_browser
from visual_graphs import loop, node, on_paths, unrolled

from torchopt.visual.graph import Graph
from torchopt.visual.lanes import homes
from torchopt.visual.show import GraphPage, show


pytestmark = needs_browser
WINDOWS = {"wide": (1920, 1080), "usual": (1400, 900), "narrow": (400, 800)}
WIDE = pytest.param("wide", marks=pytest.mark.thorough)


def window(name):
    width, height = WINDOWS[name]
    return {"viewport": {"width": width, "height": height}}


def area(page, selector):
    box = page.page.locator(selector).bounding_box()
    return box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]


def check_fitted(page):
    """Everything lies on the canvas, apart from each other, and no button covers it."""
    boxes = page.page.evaluate("torchoptGraph.boxes()")
    left, top, right, bottom = area(page, "#picture")
    buttons = [area(page, f"#zoom button >> nth={k}") for k in range(3)]
    for box in [*boxes["lanes"], *boxes["items"], *boxes["rails"]]:
        assert left <= box[0] < box[2] <= right, box
        assert top <= box[1] < box[3] <= bottom, box
        assert not any(overlap(box, button) for button in buttons)
    for kind in ("lanes", "items", "rails"):
        for one, other in itertools.combinations(boxes[kind], 2):
            assert not overlap(one, other), (kind, one, other)
    for one, other in itertools.product(boxes["lanes"], boxes["rails"]):
        assert not overlap(one, other)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= right + 300
    return boxes


def overlap(a, b):
    slack = 0.01
    return (
        a[0] < b[2] - slack and b[0] < a[2] - slack and a[1] < b[3] - slack and b[1] < a[3] - slack
    )


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", WINDOWS)
def test_it_opens_collapsed_with_everything_in_sight(view, name, scheme):
    page = view(show(*loop(steps=5, layers=3)), color_scheme=scheme, **window(name))
    assert page.state()["expanded"] == []
    boxes = check_fitted(page)
    assert len(boxes["lanes"]) == 6  # five steps, and the loss
    assert page.state()["scale"] > 0.55  # its text can be read
    width = page.page.evaluate("document.documentElement.scrollWidth")
    assert width <= WINDOWS[name][0]
    shade = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, shade[4:-1].split(","))) < 384) == (scheme == "dark")


@pytest.mark.parametrize(
    "name", ["usual", pytest.param("wide", marks=pytest.mark.thorough), "narrow"]
)
def test_it_is_fitted_again_after_each_change(view, name):
    made = show(*loop(steps=5, layers=3))
    page = view(made, **window(name))
    page.page.mouse.move(200, 300)
    for act in (
        lambda: page.press_button("Expand all"),
        lambda: page.press_button("Collapse all"),
        lambda: page.click_header(2),
    ):
        page.page.mouse.wheel(300, 900)  # it has been moved away by hand
        act()
        if not page.state()["expanded"] or len(page.state()["expanded"]) > 1:
            check_fitted(page)
        else:  # the whole, or where that would be too small the step
            lane = page.page.evaluate("torchoptGraph.boxes()")["lanes"][2]
            left, top, right, _ = area(page, "#picture")
            assert left <= lane[0] < lane[2] <= right
            assert top <= lane[1]


@pytest.mark.parametrize("name", ["usual", "narrow"])
def test_what_was_selected_in_the_panel_is_in_sight_with_its_paths(view, name):
    made = show(*loop(steps=5, layers=3))
    page = view(made, **window(name))
    if name == "narrow":
        page.press_button("Details")
    page.page.mouse.move(100, 250)
    page.page.mouse.wheel(500, 500)
    page.page.locator("#panel-body").get_by_role("button", name="0.weight").click()
    (key,) = [n.key for n in made.graph.nodes if n.name == "0.weight"]
    assert page.settle()["lit"] == on_paths(made.graph, key)
    x, y = page.page.evaluate(f"torchoptGraph.place({key})")
    left, top, right, bottom = area(page, "#picture")
    assert left < x < right
    assert top < y < bottom
    if name == "usual":
        check_fitted(page)


def test_another_window_is_filled_again_unless_the_reader_has_moved_the_picture(view):
    page = view(show(*loop(steps=5, layers=3)), **window("usual"))
    page.resize(900, 900)
    check_fitted(page)
    page.page.mouse.move(200, 300)
    page.wheel(0, 40)
    before = page.page.evaluate("torchoptGraph.boxes()")
    page.resize(800, 900)
    assert page.page.evaluate("torchoptGraph.boxes()") == before


def test_lines_stay_within_the_picture_where_a_cut_lets_steps_be_passed(view):
    """A state that is handed on past lanes in other rows runs beside them."""
    page = view(show(*loop(steps=12, cut_after=6)), **window("narrow"))
    check_fitted(page)


@pytest.mark.parametrize("name", ["usual", "narrow"])
def test_the_strip_holds_a_thousand_steps(view, name):
    page = view(GraphPage(unrolled(steps=1000, layers=2)), **window(name))
    strip = page.page.get_by_role("navigation")
    assert page.page.evaluate("document.getElementById('strip').scrollWidth") <= WINDOWS[name][0]
    places = [button.bounding_box() for button in strip.get_by_role("button").all()]
    assert all(0 <= p["x"] < p["x"] + p["width"] <= WINDOWS[name][0] for p in places)
    assert min(p["width"] for p in places) >= 24  # to be hit by a finger

    def covered():
        numbers = []
        for text in strip.get_by_role("button").all_inner_texts()[:-1]:
            first, _, last = text.partition("\N{EN DASH}")
            numbers += range(int(first), int(last or first) + 1)
        return numbers

    assert covered() == list(range(1, 1001))
    run = strip.get_by_role("button").filter(has_text="\N{EN DASH}").last
    first = run.inner_text().partition("\N{EN DASH}")[0]
    run.click()
    page.settle()
    page.drawn()
    assert covered() == list(range(1, 1001))
    one = strip.get_by_role("button", name=f"Step {first}", exact=True)  # it has its own by now
    one.click()
    page.settle()
    x, _ = page.page.evaluate(f"torchoptGraph.header({int(first) - 1})")
    left, _, right, _ = area(page, "#picture")
    assert left < x < right
    assert page.state()["scale"] >= 0.75


def test_weights_that_were_cut_off_are_one_entry(view):
    made = show(*loop(steps=5, cut_after=2))
    page = view(made)
    (group,) = [n for n in made.graph.nodes if n.kind == "leaf" and n.cuts]
    assert (group.label, group.members, group.shape) == ("4 weights, step 4", 4, None)
    assert "4 weights, step 4" in page.panel()
    assert "(4, 3)" not in page.panel()
    assert page.panel().count("detached before step 4") == 1
    page.page.locator(".cut").get_by_role("button", name="4 weights, step 4").click()
    assert page.settle()["selected"] == group.key
    for shape in ("(4, 3)", "(4,)", "(2, 4)", "(2,)"):
        assert shape in page.panel()


def test_lanes_of_nodes():
    """What was cut off stands where it is used first, though no step lies before it."""
    nodes = [
        node(0, "leaf", "w"),
        node(1, "operation", "forward"),
        node(2, "step", "SGD step 1"),
        node(3, "leaf", "(2, 3)", cuts=("detached",)),
        node(4, "operation", "forward of what was cut off"),
        node(5, "operation", "forward", 1),
        node(6, "step", "SGD step 2", 1),
        node(7, "result", "the loss", 2),
    ]
    edges = [(0, 1), (0, 2), (1, 2), (2, 5), (3, 4), (4, 6), (5, 6), (6, 7)]
    assert homes(Graph(nodes, edges)) == [0, 0, 0, 1, 1, 1, 1, 2]
