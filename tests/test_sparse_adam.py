"""SparseAdam, and what all rules have in common that take the entries of a sparse gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Case, every_sparse_case, named
from conftest import nonzero
from refusing import refused
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.functional import embedding

import torchopt


NUMBERS = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3}
SIZE = (7, 3)
#: The rows of some batches: twice the same, none at all, and all.
ROWS = [[1, 1, 4], [0, 4], [], [6, 2, 2, 2], [4], list(range(7)), [3, 1]]
every_row_keeper = pytest.mark.parametrize(
    "case", [named("sparse_adam"), named("adagrad")], ids=lambda case: case.name
)


def gradient(rows: list[int], dtype: torch.dtype = torch.float64) -> Tensor:
    values = nonzero(len(rows), SIZE[1], dtype=dtype)
    return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.int64), values, SIZE)


# Against torch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
def test_every_face_does_what_torch_does(maximize: bool) -> None:
    k = {**NUMBERS, "maximize": maximize}
    ours, theirs = (nn.Parameter(torch.ones(SIZE, dtype=torch.float64)) for _ in range(2))
    net = nn.ParameterDict({"w": ours.detach().clone()})
    optimizer, peer = torchopt.SparseAdam([ours], **k), torch.optim.SparseAdam([theirs], **k)
    inner, tx = torchopt.MetaSparseAdam(net, **k), torchopt.sparse_adam(**k)
    params = {False: {"w": ours.detach().clone()}, True: {"w": ours.detach().clone()}}
    states = {inplace: tx.init(p) for inplace, p in params.items()}
    for rows in ROWS:
        g = gradient(rows)
        ours.grad, theirs.grad = g.clone(), g.clone()
        optimizer.step()
        peer.step()
        # of this loss the gradient is g
        picked = embedding(g._indices()[0], net["w"], sparse=True)
        inner.step((picked * g._values()).sum())
        for inplace, p in params.items():
            grads = {"w": g.clone()}
            params[inplace], states[inplace] = tx.apply_gradients(
                grads, states[inplace], p, inplace=inplace
            )
        kept, (own,) = peer.state[theirs], inner.extract_state()
        for found in (ours, net["w"], params[False]["w"], params[True]["w"]):
            assert_close(found.detach(), theirs.detach())
        for slot in ("exp_avg", "exp_avg_sq"):
            assert_close(optimizer.state[ours][slot], kept[slot])
            for state in (own, states[False], states[True]):
                assert_close(state.slots[slot]["w"].detach(), kept[slot])
        steps = {optimizer.state[ours]["step"], own.step, states[False].step, states[True].step}
        assert steps == {kept["step"]}


@pytest.mark.usefixtures("float64_by_default")  # in which torch computes with our step count
def test_checkpoints_go_to_torch_and_come_back() -> None:
    ours = nn.Parameter(torch.ones(SIZE, dtype=torch.float64))
    theirs = nn.Parameter(ours.detach().clone())
    makers = {"ours": torchopt.SparseAdam, "theirs": torch.optim.SparseAdam}
    alone = torch.optim.SparseAdam([theirs], **NUMBERS)
    owner = "ours"
    optimizer: Any = makers[owner]([ours], **NUMBERS)
    for rows in ROWS:
        g = gradient(rows)
        ours.grad, theirs.grad = g.clone(), g.clone()
        optimizer.step()
        alone.step()
        assert_close(ours.detach(), theirs.detach())
        owner = "theirs" if owner == "ours" else "ours"
        following: Any = makers[owner]([ours])
        following.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer = following


# Only the rows that there are ---------------------------------------------------------------------


@every_row_keeper
def test_a_step_overwrites_slots_instead_of_copying_them(case: Case) -> None:
    p = nn.Parameter(nonzero(*SIZE))
    optimizer = case.cls([p], **case.kwargs)
    p.grad = gradient([1, 2])
    optimizer.step()
    slots = {n: x for n, x in optimizer.state[p].items() if isinstance(x, Tensor)}
    before = {n: x.clone() for n, x in slots.items()}
    p.grad = gradient([2, 5])
    optimizer.step()
    for name, slot in slots.items():
        assert optimizer.state[p][name] is slot
        changed = (slot != before[name]).any(1)
        assert changed.tolist() == [k in (2, 5) for k in range(SIZE[0])]


@every_row_keeper
def test_what_a_state_dict_holds_is_not_overwritten(case: Case) -> None:
    p = nn.Parameter(nonzero(*SIZE))
    optimizer = case.cls([p], **case.kwargs)
    p.grad = gradient([1, 2])
    optimizer.step()
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    twin = nn.Parameter(p.detach().clone())
    for _ in range(2):
        p.grad = gradient([2, 5])
        optimizer.step()
    for name, value in before["state"][0].items():
        assert torch.equal(saved["state"][0][name], value)
    other = case.cls([twin], **case.kwargs)
    other.load_state_dict(saved)
    twin.grad = gradient([0])
    other.step()
    for name, value in before["state"][0].items():
        assert torch.equal(saved["state"][0][name], value)


def test_an_expanded_slot_is_replaced() -> None:
    p, twin = (nn.Parameter(torch.ones(SIZE)) for _ in range(2))
    optimizer, peer = (torchopt.SparseAdam([x], **NUMBERS) for x in (p, twin))
    zero = torch.zeros(1).expand(SIZE)
    optimizer.state[p].update({"step": 0, "exp_avg": zero, "exp_avg_sq": zero})
    p.grad = gradient([1, 3], torch.float32)
    twin.grad = p.grad.clone()
    optimizer.step()
    peer.step()
    assert torch.equal(p, twin)
    assert not zero.any()


# Everywhere else ----------------------------------------------------------------------------------

WHERE = {
    "masked": lambda tx: torchopt.masked(tx, True),
    "partition": lambda tx: torchopt.partition({"a": tx}, lambda params: ["a"] * len(params)),
    "finite": lambda tx: torchopt.apply_if_finite(tx, 3),
    "injected": torchopt.inject_hyperparams,
}


@pytest.mark.parametrize("where", WHERE)
def test_inside_of_others(where: str) -> None:
    p, twin = (nn.Parameter(torch.ones(SIZE, dtype=torch.float64)) for _ in range(2))
    optimizer = torchopt.Optimizer([p], WHERE[where](torchopt.sparse_adam(**NUMBERS)))
    peer = torch.optim.SparseAdam([twin], **NUMBERS)
    for rows in ROWS:
        p.grad = gradient(rows)
        twin.grad = p.grad.clone()
        optimizer.step()
        peer.step()
        assert_close(p.detach(), twin.detach())


def _views_sparse_as_real() -> bool:
    try:
        torch.view_as_real(torch.ones(2, dtype=torch.complex64).to_sparse())
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128], ids=str)
@every_sparse_case
def test_a_sparse_gradient_is_the_dense_one_where_all_entries_are(
    case: Case, dtype: torch.dtype
) -> None:
    if dtype.is_complex and not _views_sparse_as_real():
        pytest.skip("this torch has no view_as_real of sparse tensors")
    p = nonzero(*SIZE, dtype=dtype)
    found = []
    grads = [gradient(list(range(7)), dtype) for _ in range(3)]
    for sparse in (True, False):
        own = nn.Parameter(p.clone())
        optimizer = case.cls([own], **case.kwargs)
        for g in grads:
            own.grad = g.clone() if sparse else g.to_dense()
            optimizer.step()
        found.append(own.detach())
    assert_close(found[0], found[1], times=4)
    assert not torch.equal(found[0], p)


def test_numbers_with_a_value_for_each_entry() -> None:
    params = [nonzero(*SIZE)]
    rate, betas = torch.rand(SIZE).double(), (torch.rand(SIZE).double(), 0.9)
    tx = torchopt.sparse_adam(rate, betas, 1e-3)
    g = gradient(list(range(7)))
    (sparse,), _ = tx.update([g], tx.init(params), params, inplace=False)
    (dense,), _ = tx.update([g.to_dense()], tx.init(params), params, inplace=False)
    assert sparse.is_sparse
    assert_close(sparse.to_dense(), dense)


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("face", ["functional", "differentiable"])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "sparse_adam"])
def test_meta_gradients_through_sparse_gradients(name: str, face: str) -> None:
    """As by autograd through the rule written out, where rows without a gradient rest."""
    tables = [torch.tensor(rows) for rows in ([1, 1, 4], [4, 0], [6, 1])]
    start, weights = nonzero(*SIZE), nonzero(*SIZE)

    def written_out(w: Tensor, lr: Tensor) -> Tensor:
        m, v = torch.zeros(SIZE), torch.zeros(SIZE)
        for t, rows in enumerate(tables, start=1):
            (g,) = torch.autograd.grad((w[rows] ** 3).sum(), w, create_graph=True)
            there = torch.zeros(SIZE).index_fill(0, rows, 1.0) > 0
            if name == "sgd":
                u = g
            elif name == "adagrad":
                v = v + g**2
                u = g / (torch.where(there, v, 1.0).sqrt() + 1e-3)
            else:
                m = torch.where(there, 0.8 * m + 0.2 * g, m)
                v = torch.where(there, 0.9 * v + 0.1 * g**2, v)
                scale = (1 - 0.9**t) ** 0.5 / (1 - 0.8**t)
                u = scale * m / (torch.where(there, v, 1.0).sqrt() + 1e-3)
            w = w - lr * torch.where(there, u, 0.0)
        return (w * weights).sum()

    def by_us(w: Tensor, lr: Tensor) -> Tensor:
        more: Any = {"sgd": {}, "adagrad": {"eps": 1e-3}, "sparse_adam": NUMBERS}[name]
        tx = getattr(torchopt, name)(**{**more, "lr": lr})
        if face == "differentiable":
            net = nn.ParameterDict({"w": start.clone()})
            net._parameters["w"] = w  # pyright: ignore[reportArgumentType]
            inner = torchopt.MetaOptimizer(net, tx)
            for rows in tables:
                inner.step((embedding(rows, net["w"], sparse=True) ** 3).sum())
            return (net["w"] * weights).sum()
        state = tx.init(w)
        for rows in tables:
            loss = (embedding(rows, w, sparse=True) ** 3).sum()
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
            assert g.is_sparse
            w, state = tx.apply_gradients(g, state, w, inplace=False)
        return (w * weights).sum()

    results = []
    for function in (written_out, by_us):
        w, lr = start.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)
        value = function(w, lr)
        grads = torch.autograd.grad(value, [w, lr])
        results.append([value.detach(), *(g.to_dense() for g in grads)])
    assert_close(results[1], results[0], times=10)


def test_a_sparse_parameter_is_refused_by_name() -> None:
    p = nn.Parameter(torch.eye(3).to_sparse())
    with refused(ValueError, r"'params\[0\]' is sparse itself.*to_dense"):
        torchopt.SparseAdam([p])
    with refused(ValueError, "'w' is sparse itself.*to_dense"):
        torchopt.sparse_adam().init({"w": p.detach()})


def test_others_say_who_takes_sparse_gradients() -> None:
    p = nn.Parameter(torch.ones(SIZE))
    p.grad = gradient([1], torch.float32)
    with pytest.raises(TypeError, match="or SGD, Adagrad or SparseAdam, without weight decay"):
        torchopt.Adam([p]).step()
