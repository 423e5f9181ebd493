"""Seeds, one thread, and random inputs that are never zero."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling import is_thorough, mark_thorough

from torchopt.base.torch_internals import nothing_is_compiled


pytest_plugins = ["pytester", "visual_browsers"]
torch.set_num_threads(1)


#: Words in the names of files that test loops whose steps are taken again.
LOOPS = ("unroll", "checkpoint_schedules", "replay", "run_folder", "accumul", "attribution")


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Mark combinations before pytest makes tests of them, and leave out what ``-m`` deselects.

    Making thirty thousand tests to deselect them takes as long as running five thousand.
    """
    calls = metafunc._calls
    mark_thorough(metafunc.definition.nodeid, calls, metafunc.definition.get_closest_marker)
    if metafunc.config.option.markexpr == "not thorough":
        # of an empty list pytest makes one test without parameters
        metafunc._calls = [call for call in calls if not is_thorough(call)] or calls


def pytest_collection_finish() -> None:
    # Thousands of collected tests stay to the end; no collection of garbage need walk them again.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240)


@pytest.fixture(autouse=True)
def _nothing_compiled(request: pytest.FixtureRequest) -> None:
    """Let loops run as in a process that compiles nothing, whatever was compiled before."""
    if any(word in request.node.path.name for word in LOOPS) and not nothing_is_compiled():
        torch.compiler.reset()


@pytest.fixture
def float64_by_default(_seed: None) -> Iterator[None]:
    """New networks and numbers are of float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _float64_where_torch_keeps_numbers_of_it(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("float64_scalars") is not None:
        request.getfixturevalue("float64_by_default")


@pytest.fixture(scope="module")
def examples_on_path() -> Iterator[None]:
    """Let the examples and what they share be imported, as when they are run as scripts."""
    folder = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let examples draw nothing: seconds a run, where the figure is not what is tested."""
    figure = pytest.importorskip("matplotlib.figure")
    stub = lambda self, file, **_: file.write(b"\x89PNG")  # noqa: E731
    monkeypatch.setattr(figure.Figure, "savefig", stub)


def nonzero(
    *shape: int, dtype: torch.dtype = torch.float64, requires_grad: bool = False
) -> torch.Tensor:
    """Return random numbers of either sign with 0.2 <= |x| < 1.2, so that none is nearly zero."""
    size = 0.2 + torch.rand(shape, dtype=torch.float64)
    x = torch.where(torch.rand(shape) < 0.5, -size, size)
    if dtype.is_complex:
        x = torch.complex(x, 0.2 + torch.rand(shape, dtype=torch.float64))
    return x.to(dtype).requires_grad_(requires_grad)


def nonzero_like(tree: Any) -> Any:
    """Return a tree of tensors like ``tree`` with entries of :func:`nonzero`; ``None`` stays."""
    return torch.utils._pytree.tree_map(
        lambda x: nonzero(*x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) else x, tree
    )


@pytest.fixture(name="nonzero")
def nonzero_fixture() -> Any:
    """The function :func:`nonzero`."""
    return nonzero


@pytest.fixture(name="nonzero_like")
def nonzero_like_fixture() -> Any:
    """The function :func:`nonzero_like`."""
    return nonzero_like
