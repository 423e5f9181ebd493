"""What kernels are given: any layout is right, what they cannot take is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, every_fused_case
from conftest import nonzero
from fusing import (
    copy_of,
    data,
    kernel_calls_fixture,  # noqa: F401
    needs_library,
)
from tolerances import assert_close
from torch import Tensor, nn

import torchopt
from torchopt.kernels import why


pytestmark = needs_library

# Layouts ------------------------------------------------------------------------------------------


def sliced(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7.0, dtype=x.dtype)
    view = wide[..., 1::2]
    view.copy_(x)
    return view


def offset(x: Tensor) -> Tensor:
    flat = torch.full((x.numel() + 3,), 7.0, dtype=x.dtype)
    flat[3:] = x.flatten()
    return flat[3:].view(x.shape)


def negative_bit(x: Tensor) -> Tensor:
    view = torch.complex(torch.full_like(x, 3.0), -x).conj().imag
    assert view.is_neg()
    return view


def negative_contiguous(x: Tensor) -> Tensor:
    view = torch._neg_view(-x)
    assert view.is_neg()
    assert view.is_contiguous()
    return view


#: Each makes a tensor with the same entries but another place in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
    "sliced": sliced,
    "offset": offset,
    "flipped strides": lambda x: x.flip(0).flip(0),
    "negative bit": negative_bit,
    "negative and contiguous": negative_contiguous,
    "real part": lambda x: torch.complex(x, torch.ones_like(x)).real,
}
#: These repeat entries.
REPEATING: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.tensor(0.7, dtype=torch.float64).expand(2, 3, 4, 5),
    "expanded rows": lambda: nonzero(4, 5).expand(2, 3, 4, 5),
    "overlapping": lambda: nonzero(30).as_strided((2, 3, 4, 5), (1, 2, 3, 1)),
    "zero tensor": lambda: torch._efficientzerotensor((2, 3, 4, 5), dtype=torch.float64),
}


def one_update(tx: Any, g: Tensor, p: Tensor, slots: list[Tensor], inplace: bool) -> list[Tensor]:
    state = tx.init([p])
    state.step = 3
    state.slots = {name: [x] for name, x in zip(state.slots, slots)}
    (u,), new = tx.update([g], state, [p], inplace=inplace)
    return [u, *(column[0] for column in new.slots.values())]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "default"])
@pytest.mark.parametrize("which", ["gradient", "parameter", "slots", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
@every_fused_case
def test_layouts(
    case: Case, layout: str, which: str, inplace: bool, kernel_calls: list[int]
) -> None:
    tx = case.tx()
    g, p = nonzero(2, 3, 4, 5), nonzero(2, 3, 4, 5)
    slots = [nonzero(2, 3, 4, 5).abs() + 1 for _ in tx.init([p]).slots]
    expected = one_update(tx, g.clone(), p.clone(), copy_of(slots), inplace)
    lay = LAYOUTS[layout]
    if which in ("gradient", "all"):
        g = lay(g)
    if which in ("parameter", "all"):
        p = lay(p)
    if which in ("slots", "all"):
        slots = [lay(x) for x in slots]
    before = copy_of([g, p, slots])
    actual = one_update(tx, g, p, slots, inplace)
    assert len(kernel_calls) == 2, "not fused"
    for a, e in zip(actual, expected):
        assert torch.equal(a, e)
    if not inplace:
        after = torch.utils._pytree.tree_leaves([g, p, slots])
        assert all(map(torch.equal, torch.utils._pytree.tree_leaves(before), after))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", REPEATING)
@every_fused_case
def test_gradients_that_repeat_entries(case: Case, kind: str) -> None:
    tx = case.tx()
    g, p = REPEATING[kind](), nonzero(2, 3, 4, 5)
    slots = [nonzero(2, 3, 4, 5).abs() + 1 for _ in tx.init([p]).slots]
    expected = one_update(tx, g.clone() + 0, p, slots, False)
    for a, e in zip(one_update(tx, g, p, slots, False), expected):
        assert torch.equal(a, e)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["expanded", "expanded rows"])
@every_fused_case
def test_derivatives_by_gradients_that_repeat_entries(case: Case, kind: str) -> None:
    """As the derivative by the tensor that was expanded: the sum over its copies."""
    p, weights = nonzero(2, 3, 4, 5), nonzero(2, 3, 4, 5)
    slots = [nonzero(2, 3, 4, 5).abs() + 1 for _ in case.tx().init([p]).slots]
    row = nonzero(4, 5) if kind == "expanded rows" else nonzero()
    found = []
    for tx in (case.tx(), case.tx().with_accelerated_op(False)):
        source = row.clone().requires_grad_()
        outputs = one_update(tx, source.expand(2, 3, 4, 5), p, slots, False)
        total = sum((o * weights).sum() for o in outputs)
        found.append(torch.autograd.grad(total, source)[0])
    assert_close(found[0], found[1])


#: One row of a batch, large enough to be read again and again instead of copied.
ROWS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: nonzero(20, 30),
    "row of one more dimension": lambda: nonzero(2, 15, 20),
    "channels-last": lambda: nonzero(4, 15, 10).permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "transposed": lambda: nonzero(30, 20).t(),
    "small": lambda: nonzero(3, 5),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["gradients", "slots", "all"])
@pytest.mark.parametrize("kind", ROWS)
@every_fused_case
def test_rows_that_are_repeated(
    case: Case, kind: str, which: str, dtype: torch.dtype, kernel_calls: list[int]
) -> None:
    """A batch of which some inputs are the same for all, beside parameters that are no batch."""
    tx, shape = case.tx(), ROWS[kind]().shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def column(repeated: bool, dtype: torch.dtype) -> list[Tensor]:
        row = ROWS[kind]().abs().to(dtype)
        batch = row.expand(3, *shape) if repeated else nonzero(3, *shape).abs().to(dtype)
        return [nonzero(7).abs().to(dtype), batch, nonzero(4, 300).abs().to(dtype)]

    g, p = column(which != "slots", dtype), column(False, dtype)
    start = tx.init(p)
    counters = {name: 0.5 * (1 + k) for k, name in enumerate(start.counters)}
    slots = {name: column(which != "gradients", wide) for name in start.slots}
    results = []
    for turned in (list, copy_of):
        state = torchopt.OptState(3, {n: turned(c) for n, c in slots.items()}, dict(counters))
        results.append(tx.update(turned(g), state, p, inplace=False))
    actual, expected = results
    assert len(kernel_calls) == 2, "not fused"
    flat = torch.utils._pytree.tree_leaves
    assert len(flat(actual)) == 3 * (1 + len(slots)) + len(counters) + 1  # the step count
    assert all(map(torch.equal, flat(actual), flat(expected)))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("layout", ["transposed", "channels-last", "sliced", "offset", "permuted"])
@every_fused_case
def test_layouts_of_the_object_oriented_face(case: Case, layout: str) -> None:
    """The parameter stays where it is, and gets the values of a contiguous one."""
    results = []
    start = nonzero(2, 3, 4, 5)
    grads = [nonzero(2, 3, 4, 5) for _ in range(4)]
    for lay in (LAYOUTS["contiguous"], LAYOUTS[layout]):
        p = nn.Parameter(lay(start))
        assert p.stride() == lay(start).stride()
        place, strides = p.data_ptr(), p.stride()
        optimizer = torchopt.Optimizer([p], case.tx())
        for k, g in enumerate(grads):
            p.grad = lay(g) if k % 2 else g.clone()
            optimizer.step()
        assert (p.data_ptr(), p.stride()) == (place, strides)
        results.append(
            [p.detach(), *(x for x in optimizer.state[p].values() if torch.is_tensor(x))]
        )
    assert all(map(torch.equal, *results))


def test_writes_nothing_beside_the_parameter() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        memory = torch.full((1000,), 7.0, dtype=dtype)
        places = [slice(3, 4), slice(10, 267), slice(300, 301), slice(500, 999)]
        params = [nn.Parameter(memory[place]) for place in places]
        optimizer = torchopt.SGD(params, lr=0.1, momentum=0.9)
        for _ in range(4):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        inside = torch.zeros(1000, dtype=torch.bool)
        for place in places:
            inside[place] = True
            assert (memory[place] != 7.0).all()
        assert (memory[~inside] == 7.0).all()


def test_sum_of_a_parameter_and_conv_weights() -> None:
    """Gradients as autograd makes them: expanded, channels-last, transposed by a linear layer."""
    results = []
    for setting in (True, False):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)).double()
        net = net.to(memory_format=torch.channels_last)
        free = nn.Parameter(nonzero(3, 3))
        params = [*net.parameters(), free]
        optimizer = torchopt.AdamW(params, lr=0.01, use_accelerated_op=setting)
        for _ in range(4):
            optimizer.zero_grad()
            x = nonzero(2, 3, 6, 6).to(memory_format=torch.channels_last)
            (net(x).square().sum() + free.sum() + free.t().sum()).backward()
            optimizer.step()
        results.append([p.detach() for p in params])
    assert_close(results[0], results[1], times=10)


# What kernels cannot take -------------------------------------------------------------------------


class Subclass(Tensor):
    """A tensor class of a user's own."""


def meta_device() -> tuple[list[Tensor], str]:
    return [torch.ones(3, device="meta")], "'meta' devices"


def sparse() -> tuple[list[Tensor], str]:
    return [torch.eye(3).to_sparse()], "layout is torch.sparse_coo"


def subclass() -> tuple[list[Tensor], str]:
    return [torch.ones(3).as_subclass(Subclass)], "Subclass is no plain tensor"


@pytest.mark.parametrize("make", [meta_device, sparse, subclass], ids=lambda f: f.__name__)
def test_required_but_impossible(make: Any, kernel_calls: list[int]) -> None:
    (bad,), reason = make()
    plain = torch.ones(3) if bad.dim() == 1 else torch.eye(3)
    tx = torchopt.sgd(0.1, use_accelerated_op=True)
    params = [plain.clone(), torch.zeros_like(bad)]
    with pytest.raises(RuntimeError, match=reason) as caught:
        tx.update([plain.clone(), bad], tx.init(params), params, inplace=False)
    assert "use_accelerated_op=True requires a fused kernel" in str(caught.value)
    assert "'1'" in str(caught.value), "the parameter is named"
    assert not kernel_calls
    # without the requirement the rule takes it, and the kernel the other
    free = torchopt.sgd(0.1)
    (u, v), _ = free.update([plain.clone(), bad], free.init(params), params, inplace=False)
    assert torch.equal(u, plain * -0.1)
    assert type(v) is type(bad)
    assert len(kernel_calls) == 1
    lines = why(free, [plain, bad], params=params)
    assert lines
    assert all("'1'" in line for line in lines)


@pytest.mark.parametrize("face", ["functional", "object-oriented", "differentiable"])
def test_a_refused_call_changes_nothing(face: str) -> None:
    params, grads = data(steps=3)
    lr = torch.tensor(0.1, dtype=torch.float64).as_subclass(Subclass)
    if face == "functional":
        tx = torchopt.adam(lr, use_accelerated_op=True)
        state = tx.init(params)
        before = copy_of([params, grads, state])
        with pytest.raises(RuntimeError, match="lr is a Subclass, no plain tensor"):
            tx.update(grads[0], state, params)
        after: Any = [params, grads, state]
    elif face == "object-oriented":
        own = [nn.Parameter(p) for p in params]
        optimizer = torchopt.Adam(own, lr=0.1, use_accelerated_op=True)
        for k, gs in enumerate(grads):
            for p, g in zip(own, gs):
                p.grad = g
            if k == 2:
                # one entry would be read as a number
                rates = [torch.full_like(p, 0.1).as_subclass(Subclass) for p in params[:2]]
                optimizer.param_groups[0]["lr"] = [*rates, 0.1]
                before = copy_of([[*own], optimizer.state_dict()["state"]])
                with pytest.raises(RuntimeError, match="lr is a Subclass, no plain tensor"):
                    optimizer.step()
            else:
                optimizer.step()
        after = [[*own], optimizer.state_dict()["state"]]
    else:
        net = nn.ParameterList(params)
        meta = torchopt.MetaAdam(net, lr=0.1, use_accelerated_op=True)
        meta.step(sum((p**2).sum() for p in net))
        meta.param_groups[0]["lr"] = lr
        kept, before = list(net), copy_of([list(net), meta.state_dict()["state"]])
        with pytest.raises(RuntimeError, match="lr is a Subclass, no plain tensor"):
            meta.step(sum((p**2).sum() for p in net))
        assert all(a is b for a, b in zip(net, kept))
        after = [list(net), meta.state_dict()["state"]]
    flat = torch.utils._pytree.tree_leaves
    for a, b in zip(flat(before), flat(after)):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_complex_parameters() -> None:
    """They are pairs of real numbers, which kernels take."""
    params = [nonzero(3, 2, dtype=torch.complex128), nonzero(4)]
    grads = [[nonzero(3, 2, dtype=torch.complex128), nonzero(4)] for _ in range(3)]
    results = []
    for setting in (True, False):
        own = [nn.Parameter(p.clone()) for p in params]
        optimizer = torchopt.Adam(own, lr=0.1, use_accelerated_op=setting)
        for gs in grads:
            for p, g in zip(own, gs):
                p.grad = g
            optimizer.step()
        results.append([p.detach() for p in own])
    assert_close(results[0], results[1])


def test_distributed_tensors(kernel_calls: list[int]) -> None:
    distributed = pytest.importorskip("torch.distributed.tensor")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", rank=0, world_size=1, store=fake.FakeStore())
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        g = distributed.distribute_tensor(torch.ones(4), mesh, [distributed.Shard(0)])
        p = distributed.distribute_tensor(torch.full((4,), 2.0), mesh, [distributed.Shard(0)])
        tx = torchopt.adam(0.1)
        with torch.no_grad():
            (u,), _ = tx.update([g], tx.init([p]), [p], inplace=False)
        assert isinstance(u, distributed.DTensor)
        assert_close(u.to_local(), torch.full((4,), -0.1), times=4)
        assert not kernel_calls
        with pytest.raises(RuntimeError, match="DTensor is no plain tensor"):
            tx.with_accelerated_op(True).update([g], tx.init([p]), [p], inplace=False)
    finally:
        torch.distributed.destroy_process_group()


def test_numbers_of_numpy_and_integers(kernel_calls: list[int]) -> None:
    np = pytest.importorskip("numpy")
    params, (grads,) = data(steps=1)
    expected, _ = torchopt.sgd(0.5).update(grads, torchopt.sgd(0.5).init(params), inplace=False)
    for lr in (np.float64(0.5), np.float32(0.5)):
        tx = torchopt.sgd(lr)
        actual, _ = tx.update(grads, tx.init(params), inplace=False)
        assert_close(actual, expected)
        assert why(tx, grads) == []
    tx = torchopt.sgd(2)
    actual, _ = tx.update(grads, tx.init(params), inplace=False)
    assert_close(actual, [g * -2 for g in grads])
    assert len(kernel_calls) >= 2
