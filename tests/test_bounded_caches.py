"""What the fused engine keeps depends on structures, of which there are few, not on numbers."""

from __future__ import annotations

import functools
import gc
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
from conftest import nonzero
from fusing import needs_library
from tolerances import assert_close
from torch import Tensor, nn

import torchopt
from torchopt.core.hyper import hyper
from torchopt.core.packed import Packing
from torchopt.core.plan import Plan
from torchopt.core.rules import ElementwiseTransformation
from torchopt.core.transform import transformation
from torchopt.kernels import cached_call, matching, nodes
from torchopt.kernels import differentiable as differentiable_kernels
from torchopt.kernels.backends import launch
from torchopt.kernels.generate.graph import Kernel
from torchopt.kernels.generate.program import Program
from torchopt.kernels.matching import Segment, Variant


pytestmark = needs_library

KINDS = (Kernel, Program, Variant, Segment, Plan, Packing)
#: Caches without a bound, and why they are finite.
FINITE = {
    "torchopt.kernels.backends.cpu.load": "no argument",
    "torchopt.kernels.backends.availability._cuda_unavailable": "no argument",
    "torchopt.kernels.backends.availability._too_old": "one entry for each GPU",
    "torchopt.visual.dot._digraph_class": "no argument",
    "torchopt.visual.titles._known": "no argument",
}


@pytest.fixture(name="traces")
def traces_fixture(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows with each trace."""
    seen: list[Any] = []
    original = matching.build

    def watched(parts: Any, *args: Any) -> Any:
        seen.append(parts)
        return original(parts, *args)

    monkeypatch.setattr(matching, "build", watched)
    return seen


def living() -> dict[str, int]:
    """How many objects of the engine there are."""
    gc.collect()
    found = [type(x) for x in gc.get_objects() if type(x) in KINDS]
    return {kind.__name__: found.count(kind) for kind in KINDS}


def differentiable(tx: Any, shape: tuple[int, ...] = (3,)) -> None:
    net = nn.ParameterList([nonzero(*shape)])
    with torchopt.inner_loop(net, tx) as inner:
        for _ in range(2):
            inner.step(net[0].square().sum())
        net[0].sum().backward()


def functional(tx: Any, shape: tuple[int, ...] = (3,)) -> None:
    params, grads = {"w": nonzero(*shape)}, {"w": nonzero(*shape).requires_grad_()}
    state = tx.init(params)
    for _ in range(2):
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
    params["w"].sum().backward()


def object_oriented(tx: Any, shape: tuple[int, ...] = (3,)) -> None:
    p = nn.Parameter(nonzero(*shape))
    optimizer = torchopt.Optimizer([p], tx)
    for _ in range(2):
        p.grad = nonzero(*shape)
        optimizer.step()


FACES = (differentiable, functional, object_oriented)


def rate(k: int) -> float:
    return 0.1 * 0.9999**k


@pytest.mark.parametrize("face", FACES, ids=lambda f: f.__name__)
def test_new_numbers_cost_nothing(face: Callable[..., None], traces: list[Any]) -> None:
    face(torchopt.adam(0.5, weight_decay=0.3))
    before, count = living(), len(traces)
    for k in range(400):
        face(torchopt.adam(rate(k), betas=(rate(k), 0.9 * rate(k)), weight_decay=rate(k + 1)))
    now = living()  # what other tests had left may have gone
    assert not {kind: n for kind, n in now.items() if n > before[kind]}
    assert len(traces) == count


def test_a_new_number_at_each_step(traces: list[Any]) -> None:
    p = nn.Parameter(nonzero(3))
    optimizer = torchopt.SGD([p], lr=0.1)
    net = nn.ParameterList([nonzero(3)])
    meta = torchopt.MetaAdam(net, lr=0.1)

    def step(k: int) -> None:
        optimizer.param_groups[0]["lr"] = meta.param_groups[0]["lr"] = rate(k)
        p.grad = nonzero(3)
        optimizer.step()
        meta.step(net[0].square().sum())
        torchopt.stop_gradient(net)
        torchopt.stop_gradient(meta)

    for k in range(3):
        step(k)
    before, count = living(), len(traces)
    for k in range(600):
        step(k)
    assert living() == before
    assert len(traces) == count


@pytest.mark.parametrize("face", FACES, ids=lambda f: f.__name__)
def test_new_shapes_and_networks_leave_nothing(
    face: Callable[..., None], traces: list[Any]
) -> None:
    tx = torchopt.adam(0.1)
    face(tx)
    before, count = living(), len(traces)
    for k in range(200):
        face(tx, (1 + k % 40, 1 + k // 40))
    assert living() == before
    assert len(traces) == count


def new_transformation() -> Any:
    """A transformation of a class of its own."""

    @transformation
    class Own(ElementwiseTransformation):
        factor: float = hyper(1.0)

        def rule(self, g: Any, p: Any, t: Any, slots: Any, *, factor: float) -> Any:
            return g * factor, slots

    return Own(2.0)


def test_new_transformations_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many are kept as the cache has room for, and they go when it is emptied."""
    caches = (
        (matching, "_known_variants"),
        (cached_call, "executable"),
        (launch, "_facts"),
        (differentiable_kernels, "sources"),
        (nodes, "sources"),
    )
    for module, name in caches:
        few = functools.lru_cache(maxsize=8)(getattr(module, name).__wrapped__)
        monkeypatch.setattr(module, name, few)
    counts = []
    for _ in range(3):
        for _ in range(12):
            functional(torchopt.chain(new_transformation(), torchopt.scale(-0.1)))
        counts.append(living())
    assert counts[1] == counts[2]
    matching._known_variants.cache_clear()
    cached_call.executable.cache_clear()
    assert living()["Program"] < counts[2]["Program"]


def test_one_rule_keeps_a_bounded_number_of_programs(traces: list[Any]) -> None:
    """A rule that reads a number from itself is traced for each number, and for it alone."""

    @transformation
    class Reads(ElementwiseTransformation):
        factor: float = hyper(1.0)

        def rule(self, g: Any, p: Any, t: Any, slots: Any, *, factor: float) -> Any:
            return g * self.factor, slots

    def updated(factor: float) -> Tensor:
        tx = torchopt.chain(Reads(factor), torchopt.scale(-0.1))
        return tx.update(g, tx.init(g), g, inplace=False)[0]

    g, factor = nonzero(3), 1.0
    for k in range(3 * matching.VARIANTS):
        factor = 1.0 + k / 7
        assert_close(updated(factor), -0.1 * factor * g)
    plan = torchopt.chain(Reads(1.0), torchopt.scale(-0.1)).plan
    variants = matching.Segment(plan, 0, 2).variants
    assert 0 < len(variants) <= matching.VARIANTS
    count = len(traces)
    updated(factor)
    assert len(traces) == count


def test_a_rule_that_branches_on_numbers(traces: list[Any]) -> None:
    """Numbers that take the same branch share a program; also where a branch cannot be fused."""

    @transformation
    class Branches(ElementwiseTransformation):
        limit: float = hyper(1.0)

        def rule(self, g: Any, p: Any, t: Any, slots: Any, *, limit: float) -> Any:
            if limit > 5:
                return g.cumsum(0) * limit, slots
            return (g * limit if limit > 2 else g - limit), slots

    g = nonzero(4)
    for limit in [1.0, 3.0, 7.0] * 2 + [1.5 + k / 100 for k in range(50)] + [8.0, 9.0]:
        tx = Branches(limit)
        actual = tx.update(g, tx.init(g), g, inplace=False)[0]
        expected = g.cumsum(0) * limit if limit > 5 else g * limit if limit > 2 else g - limit
        assert_close(actual, expected)
    assert len(traces) == 3


def test_no_cache_without_a_bound() -> None:
    unbounded = set()
    for module in pkgutil.walk_packages(torchopt.__path__, "torchopt."):
        if module.name.endswith("._fused"):  # the C library, which is no module
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if getattr(value, "__module__", "") != module.name:
                continue
            if hasattr(value, "cache_parameters") and value.cache_parameters()["maxsize"] is None:
                unbounded.add(f"{module.name}.{name}")
    assert unbounded <= set(FINITE)
