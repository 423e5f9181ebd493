"""The documentation: every public name has a page, links lead somewhere, what is shown runs."""

import inspect
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import torchopt


for needed in ("sphinx", "myst_nb", "latex2mathml", "matplotlib"):
    pytest.importorskip(needed)
jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT)]

from extensions import (  # noqa: E402 - they lie in the docs folder
    api_pages,
    clone_links,
    files,
    gallery_pages,
    generated_pages,
    mathml,
    navigation,
    symbols,
    transcripts,
)


TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.md"))
PAGES = [
    path
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "coming_from").glob("*.md")]
    if "{code-cell}" in path.read_text(encoding="utf-8")
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """All sources of the site, the generated ones made anew, beside the files they refer to."""
    root = tmp_path_factory.mktemp("project")
    docs = root / "docs"
    generated = shutil.ignore_patterns("_build", "api", "gallery", "tutorials", "project")
    shutil.copytree(ROOT / "docs", docs, ignore=generated)
    shutil.copytree(ROOT / "examples", root / "examples", ignore=shutil.ignore_patterns("runs"))
    generated_pages.generate(docs)
    return docs


@pytest.fixture
def _torch_as_it_was():
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    yield
    torch.set_default_dtype(dtype)
    torch.set_rng_state(state)


# Public names ------------------------------------------------------------------------------------


def visible_names():
    """What a user finds by ``dir(torchopt)``, in another way than the generator does."""
    modules = ("torchopt", "torchopt.schedules", "torchopt.kernels")
    kinds = (type, type(torchopt.adam))
    for module in modules:
        for name, value in vars(sys.modules[module]).items():
            home = str(getattr(value, "__module__", ""))
            within = module if module == "torchopt.schedules" else "torchopt"
            own = home.startswith(within)
            if isinstance(value, kinds) and own and not name.startswith("_"):
                yield f"{module}.{name}", value


def test_every_public_name_is_on_the_page_of_its_object(site):
    page_of = {id(s.value): f"{api_pages.page_of(s)}.rst" for s in symbols.symbols()}
    names = dict(visible_names())
    assert len(names) > 40
    for name, value in names.items():
        assert id(value) in page_of, f"{name} has no page"
        text = (site / "api" / page_of[id(value)]).read_text(encoding="utf-8")
        assert re.search(rf"{re.escape(name)}\b", text), f"{name} is not on its page"


def test_pages_differ_on_file_systems_without_case(site):
    names = [path.name.lower() for path in (site / "api").iterdir()]
    assert len(names) == len(set(names))


def test_every_public_name_has_an_example_that_runs():
    assert api_pages.failing_examples(symbols.symbols()) == []


def test_bad_examples_are_found():
    def without():
        """Do nothing."""

    def wrong():
        """Add.

        >>> 1 + 1
        3
        """

    found = [symbols.Symbol(f"torchopt.{f.__name__}", f) for f in (without, wrong)]
    first, second = api_pages.failing_examples(found)
    assert "torchopt.without has no example" in first
    assert "torchopt.wrong fails" in second


def test_named_classes_show_equation_arguments_and_example_of_their_recipe():
    lines = torchopt.MetaAdam.__doc__.splitlines()
    api_pages.complete_docstring(None, "class", "", torchopt.MetaAdam, None, lines)
    text = "\n".join(lines)
    assert ".. math::" in text
    assert "    module: The network" in text
    assert "    lr: Learning rate" in text
    assert ">>> inner = torchopt.MetaAdam(net, lr=lr)" in text
    assert "[torch.Size([1, 2]), torch.Size([])]" in text


def test_a_class_with_an_example_of_its_own_is_left_as_it_is():
    """Its arguments are others than those of its recipe, of which the usual example is made."""
    lines = torchopt.MetaSAM.__doc__.splitlines()
    before = list(lines)
    api_pages.complete_docstring(None, "class", "", torchopt.MetaSAM, None, lines)
    assert lines == before


def test_a_transcript_shows_what_was_printed():
    text = transcripts.transcript("a = 2\nfor k in range(a):\n    print(k)\n\na + 1")
    assert text.splitlines() == [
        ">>> a = 2",
        ">>> for k in range(a):",
        "...     print(k)",
        "0",
        "1",
        ">>> a + 1",
        "3",
    ]


# Formulas ----------------------------------------------------------------------------------------


def test_formulas_of_docstrings_become_mathml():
    count = 0
    for symbol in symbols.symbols():
        doc = inspect.cleandoc(symbol.value.__doc__ or "")  # a formula ends where its indent does
        blocks = re.findall(r"\.\. math::\n((?:[ ]+\S.*\n|\s*\n)+)", doc)
        for formula in [*re.findall(r":math:`([^`]*)`", doc), *blocks]:
            assert mathml.to_mathml(formula).startswith("<math")
            count += 1
    assert count > 50


def test_an_unknown_command_is_refused():
    with pytest.raises(ValueError, match="nosuchcommand"):
        mathml.to_mathml(r"\nosuchcommand{x}")


# Links -------------------------------------------------------------------------------------------


def headings(text):
    """Return the anchors of a Markdown file, as GitHub and MyST make them."""
    titles = re.findall(r"^#{1,6} (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    kept = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in kept}


def broken_links(path, change=lambda text: text):
    text = change(path.read_text(encoding="utf-8"))
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for target in files.LINK.findall(prose):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        page = linked if linked.exists() else linked.with_suffix(".md")
        if not page.exists():
            yield f"{path.name}: {target} does not exist"
        elif anchor and anchor not in headings(page.read_text(encoding="utf-8")):
            yield f"{path.name}: {target} has no such heading"


def test_links_of_the_site(site):
    pages = list(site.rglob("*.md"))
    assert len(pages) > 10
    problems = []
    for page in pages:
        docname = page.relative_to(site).with_suffix("").as_posix()
        generated = docname.startswith(("api/", "gallery/", "project/", "tutorials/"))
        change = (
            (lambda text: text) if generated else partial(clone_links.for_the_site, docname=docname)
        )
        problems += broken_links(page, change)
    assert problems == []


def test_links_of_the_pages_in_a_clone():
    """What is generated is not there; only the API reference has no file in its place."""
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "coming_from").glob("*.md")]
    generated = re.compile(r"/(?:api|gallery|project|tutorials|generated)/")
    for page in pages:
        for target in files.LINK.findall(page.read_text(encoding="utf-8")):
            linked = page.parent / target.partition("#")[0]
            if re.match(r"[a-z]+:", target) or target[0] == "#" or target.endswith("api/index.md"):
                continue
            inside = linked.resolve().is_relative_to(ROOT / "docs")
            place = f"/{linked.resolve().relative_to(ROOT).as_posix()}"
            assert not (inside and generated.search(place)), f"{page.name}: {target}"
            assert linked.exists(), f"{page.name}: {target}"


def test_links_of_a_clone_become_those_of_the_site():
    text = "[a](../tutorials/README.md) [b](../tutorials/1_a.md#c) [d](faq.md) [e](../CHANGELOG.md)"
    assert clone_links.for_the_site(text, "index") == (
        "[a](tutorials/index.md) [b](tutorials/1_a.md#c) [d](faq.md) [e](project/changelog.md)"
    )
    text = "[a](../../examples/README.md) [b](../index.md) [c](https://a.org)"
    assert clone_links.for_the_site(text, "coming_from/optax") == (
        "[a](../gallery/index.md) [b](../index.md) [c](https://a.org)"
    )


def test_links_of_the_project():
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "tutorials").glob("*.md"),
        *(ROOT / "examples").glob("*.md"),
    ]
    assert len(pages) > 5
    assert [problem for page in pages for problem in broken_links(page)] == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# A title, here\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md) [b](gone.md) [c](there.md#a-title-here) [d](there.md#other)")
    assert [problem.split(": ")[1] for problem in broken_links(page)] == [
        "gone.md does not exist",
        "there.md#other has no such heading",
    ]


def test_tutorials_are_listed():
    listed = re.findall(r"\((\d_\w+\.md)\)", (ROOT / "tutorials" / "README.md").read_text())
    assert listed == [path.name for path in TUTORIALS]


# What is shown, runs -----------------------------------------------------------------------------


@pytest.mark.thorough  # `make docs` runs them, too
@pytest.mark.usefixtures("_torch_as_it_was")
@pytest.mark.parametrize("path", [*TUTORIALS, *PAGES], ids=lambda path: path.stem)
def test_cells_run(path):
    torch.set_default_dtype(torch.float32)
    namespace = {}
    cells = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    assert cells
    for cell in cells:
        exec(compile(cell.source, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_become_notebooks(path, tmp_path):
    notebook = jupytext.read(path)
    jupytext.write(notebook, tmp_path / "notebook.ipynb")
    read = nbformat.read(tmp_path / "notebook.ipynb", as_version=4)
    nbformat.validate(read)
    assert read.metadata.kernelspec.name == "python3"
    assert [cell.source for cell in read.cells] == [cell.source for cell in notebook.cells]
    assert "assert" in "".join(cell.source for cell in read.cells)  # states checked numbers


def test_tutorials_offer_their_notebook(site):
    for path in TUTORIALS:
        text = (site / "tutorials" / path.name).read_text(encoding="utf-8")
        assert f"{{nb-download}}`Download as a Jupyter notebook <{path.stem}.ipynb>`" in text


# Generated pages ---------------------------------------------------------------------------------


def test_the_gallery_has_every_example_and_its_source(site):
    names = {path.stem for path in (ROOT / "examples").glob("*.py")} - gallery_pages.TOOLS
    assert names == {path.stem for path in (site / "gallery").glob("*.md")} - {"index"}
    text = (site / "gallery" / "few_shot.md").read_text(encoding="utf-8")
    assert "```bash\npython examples/few_shot.py" in text
    assert "literalinclude" in text
    assert "omniglot_1shot.png" in text


def test_docstrings_of_examples_as_markdown():
    text = "See ``a``::\n\n    python a.py\n\n    python b.py\n\nhttps://a.org/b."
    assert gallery_pages.as_markdown(text) == (
        "See `a`:\n\n```bash\npython a.py\n\npython b.py\n```\n\n<https://a.org/b>."
    )


def test_claims_that_do_not_hold_are_shown():
    claims = [{"claim": "up", "measured": "1.0 ± 0.1", "holds": False}]
    run = {"command": "python examples/a.py", "claims": claims, "seconds": 61.2}
    text = gallery_pages.claims_table(run)
    assert "| up | 1.0 ± 0.1 | **no** |" in text
    assert "61 seconds" in text


def test_figures_of_the_benchmark_come_from_its_file(site):
    import json

    rows = json.loads((ROOT / "benchmarks/results/benchmarks.json").read_text())["rows"]
    text = (site / "generated" / "benchmark_table.md").read_text(encoding="utf-8")
    measured = [row for row in rows if "wall" in row]
    assert measured
    for row in measured:
        assert f"{row['wall']['value']:.3g}" in text
        assert row["row"] in text


def test_a_generated_folder_loses_what_is_no_longer_written(tmp_path):
    for names in (("a.md", "b.md"), ("b.md",)):
        with files.Folder(tmp_path) as folder:
            for name in names:
                folder.write(name, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["b.md"]


def test_the_navigation_of_a_symbol_is_that_of_the_index_but_for_two_entries():
    here = ' current-page"><a class="current reference internal" href="#">'
    plain = '"><a class="reference internal" href='
    rest = '</a><input/><ul>{}<li class="toctree-l2{}"b.html">b</a></li></ul></li>'
    index = f'<li class="toctree-l1 current{here}API' + rest.format(
        f'<li class="toctree-l2{plain}"a.html">a</a></li>', plain[1:]
    ).replace("toctree-l2><", 'toctree-l2"><')
    page = navigation.marked(index, "a")
    assert page.startswith(f'<li class="toctree-l1 current{plain}"index.html">API')
    assert f'<ul class="current"><li class="toctree-l2 current{here}a</a>' in page
    assert page.count("current-page") == 1
    with pytest.raises(ValueError, match="0 entries of c"):
        navigation.marked(index, "c")
