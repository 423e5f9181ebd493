"""Modules that solve an inner problem, as users of TorchOpt 0.7.3 write them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from tolerances import META_GRADIENT, relative_error
from torch import Tensor, nn

import torchopt
from torchopt.linear_solve import (
    LinearSolveError,
    LinearSolveWarning,
    solve_cg,
    solve_normal_cg,
)
from torchopt.nn import ImplicitMetaGradientModule, MetaGradientModule


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, generator=g), torch.randn(12, 2, generator=g)


class IMAML(ImplicitMetaGradientModule, linear_solve=solve_cg(rtol=1e-12)):
    """The inner loop of iMAML: a copy of the meta-network, held near to it."""

    def __init__(self, meta_net: nn.Module, strength: Any = 1.0, steps: int = 300) -> None:
        super().__init__()
        self.meta_net = meta_net
        self.net = torchopt.module_clone(meta_net, by="deepcopy", detach_buffers=True)
        self.strength = strength
        self.steps = steps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for p, q in zip(self.parameters(), self.meta_net.parameters()):
                p.data.copy_(q.data)
                p.detach_().requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(self(x), y)
        for p, q in zip(self.parameters(), self.meta_net.parameters()):
            loss = loss + 0.5 * self.strength * (p - q).square().sum()
        return loss

    def solve(self, x: Tensor, y: Tensor) -> IMAML:
        params = tuple(self.parameters())
        optimizer = torchopt.SGD(params, lr=0.3)
        with torch.enable_grad():
            for _ in range(self.steps):
                loss = self.objective(x, y)
                optimizer.zero_grad()
                loss.backward(inputs=params)
                optimizer.step()
        return self


def net() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def meta_gradient(inner: Any, x: Tensor, y: Tensor, wrt: Any) -> Any:
    return torch.autograd.grad(inner.solve(x, y)(x[:5]).square().mean(), wrt)


def test_meta_gradients_are_those_of_the_solution() -> None:
    x, y = data()
    meta = net()
    strength = torch.tensor(0.7, requires_grad=True)
    found = meta_gradient(IMAML(meta, strength), x, y, [*meta.parameters(), strength])

    def value(flat: Tensor) -> Tensor:
        other = net()
        nn.utils.vector_to_parameters(flat[:-1], other.parameters())
        inner = IMAML(other, flat[-1].item())
        with torch.no_grad():
            return inner.solve(x, y)(x[:5]).square().mean()

    start = [*(p.detach().reshape(-1) for p in meta.parameters()), strength.detach().reshape(1)]
    at, flat = torch.cat(start), torch.cat([g.reshape(-1) for g in found])
    along = torch.randn_like(at)
    expected = (value(at + 2e-5 * along) - value(at - 2e-5 * along)) / 4e-5
    assert relative_error(flat @ along, expected) < META_GRADIENT


def test_an_outer_loop() -> None:
    """Solve, differentiate, step, reset: several times with the same module."""
    x, y = data()
    meta = net()
    inner = IMAML(meta, steps=40)
    outer = torch.optim.SGD(meta.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        inner.reset_parameters()
        optimal = inner.solve(x, y)
        assert optimal is inner
        assert all(not p.is_leaf for p in inner.parameters())
        loss = nn.functional.mse_loss(optimal(x), y)
        outer.zero_grad()
        loss.backward()
        outer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    again = [p.detach().clone() for p in inner.parameters()]
    inner.solve(x, y)  # from where it is, without a reset
    assert any(not torch.equal(a, b) for a, b in zip(again, inner.parameters()))


def test_the_inner_loop_leaves_meta_parameters_alone() -> None:
    x, y = data()
    meta = net()

    class Careless(IMAML):
        def solve(self, x: Tensor, y: Tensor) -> Careless:
            with torch.enable_grad():
                optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
                for _ in range(3):
                    optimizer.zero_grad()
                    self.objective(x, y).backward()  # into all that requires grad
                    optimizer.step()
            return self

    held = list(meta.parameters())
    Careless(meta).solve(x, y)
    assert all(p.grad is None for p in held)
    assert all(a is b for a, b in zip(held, meta.parameters()))


def test_an_optimizer_that_was_made_once() -> None:
    x, y = data()

    class Once(IMAML):
        def __init__(self, meta: nn.Module) -> None:
            super().__init__(meta)
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.3)

        def solve(self, x: Tensor, y: Tensor) -> Once:
            with torch.enable_grad():
                for _ in range(200):
                    self.optimizer.zero_grad()
                    self.objective(x, y).backward()
                    self.optimizer.step()
            return self

    meta = net()
    inner = Once(meta)
    first = meta_gradient(inner, x, y, list(meta.parameters()))
    second = meta_gradient(inner, x, y, list(meta.parameters()))
    for a, b in zip(first, second):
        assert relative_error(a, b) < 1e-6


class Ridge(ImplicitMetaGradientModule, linear_solve=solve_normal_cg(rtol=1e-13)):
    """By ``optimality``, with a frozen part, a tied weight, and a tensor in a sub-module."""

    def __init__(self, strength: Tensor) -> None:
        super().__init__()
        self.strength = strength
        self.w = nn.Parameter(torch.zeros(3))
        self.same = self.w
        self.scale = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)

    def optimality(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (x.T @ (x @ (self.same * self.scale) - y) * self.scale + self.strength * self.w,)

    def solve(self, x: Tensor, y: Tensor) -> str:
        a = x * self.scale
        solution = torch.linalg.solve(a.T @ a + self.strength * torch.eye(3), a.T @ y)
        self.w.copy_(solution)
        return "done"


def test_optimality_and_arguments_that_require_grad() -> None:
    x, y = data()
    x.requires_grad_()
    strength = torch.tensor(0.5, requires_grad=True)
    model = Ridge(strength)
    assert model.solve(x, y[:, 0]) == "done"
    assert model.same is model.w
    assert model.scale.is_leaf
    found = torch.autograd.grad(model.w.square().sum(), [strength, x])

    def formula(strength: Tensor, x: Tensor) -> Tensor:
        a = x * 2
        w = torch.linalg.solve(a.T @ a + strength * torch.eye(3), a.T @ y[:, 0])
        return w.square().sum()

    for a, b in zip(found, torch.func.grad(formula, (0, 1))(strength, x)):
        assert relative_error(a, b) < 1e-9

    def value(strength: Tensor) -> Tensor:
        model = Ridge(strength)
        model.solve(x.detach(), y[:, 0])
        return model.w.square().sum()

    second = torch.autograd.functional.hessian(value, strength.detach())
    expected = torch.func.grad(torch.func.grad(formula))(strength.detach(), x.detach())
    assert relative_error(second, expected) < 1e-9


def test_modes_buffers_and_checkpointing_at_the_time_of_the_backward_pass() -> None:
    """The condition is evaluated as it was solved: BatchNorm in training mode, no traces."""
    x, y = data()

    class Normed(IMAML):
        plain = True

        def forward(self, x: Tensor) -> Tensor:
            if self.plain:
                return self.net(x)
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    torch.manual_seed(4)
    meta = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    found = []
    for plain, evaluate in ((True, False), (False, False), (False, True)):
        inner = Normed(meta, steps=60)
        inner.plain = plain
        optimal = inner.solve(x, y)
        counted = inner.net[1].num_batches_tracked.item()
        loss = sum(p.square().sum() for p in optimal.parameters())
        if evaluate:
            inner.eval()
        found.append(torch.autograd.grad(loss, list(meta.parameters())))
        assert inner.net[1].num_batches_tracked.item() == counted
        assert inner.net[1].training is not evaluate
        meta.train()
    for a, b, c in zip(*found):
        assert relative_error(b, a) < 1e-5  # its BatchNorm's statistics do not matter
        assert torch.equal(b, c)


# Two kinds of parameters -------------------------------------------------------------------------


class Mixed(MetaGradientModule):
    def __init__(self, meta: nn.Module, tensor: Tensor, tree: Any = None) -> None:
        super().__init__(meta, tensor)  # which 0.7.3 accepted
        self.own = nn.Linear(2, 2)
        self.meta = meta
        self.tensor = tensor
        self.plain = torch.zeros(2, requires_grad=True)
        self.constant = torch.ones(1)
        if tree is not None:
            self.inside = tree["x"][0]


def mixed() -> Mixed:
    meta = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return Mixed(meta, torch.tensor(0.3, requires_grad=True))


def test_what_belongs_to_which() -> None:
    inside = torch.zeros(1, requires_grad=True)
    meta = nn.Linear(2, 2)
    m = Mixed(meta, torch.tensor(0.3, requires_grad=True), {"x": [inside]})
    assert [n for n, _ in m.named_parameters()] == ["plain", "own.weight", "own.bias"]
    metas = dict(m.named_meta_parameters())
    assert list(metas) == ["tensor", "inside", "meta.weight", "meta.bias"]
    assert metas["inside"] is inside
    assert m.meta is meta
    assert list(m.meta_modules()) == [meta]
    assert [n for n, _ in m.named_meta_children()] == ["meta"]
    assert [n for n, _ in m.named_meta_modules()] == ["meta"]
    assert meta not in list(m.modules())
    assert len(list(m.meta_parameters(recurse=False))) == 2
    assert isinstance(m.plain, nn.Parameter)
    assert "meta-modules (meta: Linear)" in repr(m)
    del m.tensor
    assert "tensor" not in dict(m.named_meta_parameters())
    with pytest.raises(ValueError, match="register_meta_parameter"):
        m.register_parameter("again", inside)
    with pytest.raises(ValueError, match="register_meta_module"):
        m.add_module("again", meta)
    with pytest.raises(KeyError, match="without a dot"):
        m.register_meta_module("a.b", meta)
    with pytest.raises(TypeError, match="must be a module"):
        m.add_meta_module("other", 3)  # type: ignore[arg-type]
    m.register_meta_parameter("other", inside)
    assert m.other is inside


def test_meta_parameters_follow_to_and_modes_and_state_dicts() -> None:
    m = mixed()
    held = m.meta[0].weight, m.tensor
    m.eval()
    assert not m.meta.training
    assert not m.meta[1].training
    m.train()
    assert m.meta[1].training
    m.to(torch.float32)
    assert (m.meta[0].weight, m.tensor) == held  # the same objects, for optimizers outside
    assert held[0].dtype == held[1].dtype == torch.float32
    state = m.state_dict()
    assert {"tensor", "meta.0.weight", "meta.1.running_mean", "own.weight", "plain"} <= set(state)
    other = mixed().to(torch.float32)
    other.load_state_dict(state)
    assert torch.equal(other.meta[0].weight, m.meta[0].weight)
    with pytest.raises(RuntimeError, match=r"meta\.0\.weight"):
        other.load_state_dict({k: v for k, v in state.items() if k != "meta.0.weight"})
    with pytest.raises(RuntimeError, match=r"meta\.9"):
        other.load_state_dict({**state, "meta.9": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch for tensor"):
        other.load_state_dict({**state, "tensor": torch.zeros(2)})
    old = {k: v for k, v in state.items() if not k.startswith(("meta.", "tensor"))}
    other.load_state_dict(old)  # of TorchOpt 0.7.3, which left them out


def test_nested_modules_and_copies() -> None:
    inner = mixed()

    class Outer(MetaGradientModule):
        def __init__(self, strength: Tensor) -> None:
            super().__init__()
            self.part = nn.Sequential(inner)
            self.strength = strength

    outer = Outer(torch.tensor(1.0, requires_grad=True))
    names = [n for n, _ in outer.named_meta_parameters()]
    assert names[:2] == ["strength", "part.0.tensor"]
    assert "part.0.meta.0.weight" in names
    assert "part.0.meta.0.weight" in outer.state_dict()
    clone = copy.deepcopy(outer)
    assert [n for n, _ in clone.named_meta_parameters()] == names
    assert clone.strength is not outer.strength
    file = io.BytesIO()
    torch.save(outer.state_dict(), file)
    file.seek(0)
    clone.load_state_dict(torch.load(file))


# Errors ------------------------------------------------------------------------------------------


def test_classes_that_cannot_be() -> None:
    base = ImplicitMetaGradientModule
    bodies: list[tuple[dict[str, Any], str]] = [
        ({"objective": lambda self: 0}, "must define solve"),
        ({"solve": lambda self: self}, "must define objective"),
        ({"solve": staticmethod(lambda: 0), "objective": lambda self: 0}, "solve is static"),
        ({"solve": lambda s: s, "optimality": classmethod(lambda c: 0)}, "optimality is a class"),
        ({"solve": 3, "objective": lambda self: 0}, "solve must be a method, got int: 3"),
    ]
    for body, text in bodies:
        with pytest.raises(TypeError, match=text):
            type("Net", (base,), body)
    with pytest.raises(TypeError, match=r"solve\(matvec, b\)"):
        type("Net", (base,), bodies[0][0], linear_solve=3)


@pytest.mark.parametrize("on_failure", ["warn", "raise"])
def test_a_linear_system_that_was_not_solved_is_told_of(on_failure: Any) -> None:
    x, y = data()

    class Hasty(IMAML, linear_solve=solve_cg(maxiter=1, on_failure=on_failure)):
        pass

    meta = net()
    loss = Hasty(meta, steps=20).solve(x, y)(x).square().mean()
    if on_failure == "raise":
        with pytest.raises(LinearSolveError, match="not solved by solve_cg"):
            loss.backward()
    else:
        with pytest.warns(LinearSolveWarning, match="not solved by solve_cg"):
            loss.backward()


def test_problems_that_cannot_be_solved() -> None:
    x, y = data()
    frozen = Frozen(net().eval().requires_grad_(False))
    with pytest.raises(RuntimeError, match=r"no meta-parameters.*eval"):
        frozen.solve(x, y)
    with pytest.raises(RuntimeError, match="no parameters to solve for"):
        Empty(torch.tensor(1.0, requires_grad=True)).solve()
    wide = IMAML(net())
    wide.objective = lambda x, y: wide(x)  # type: ignore[method-assign,assignment]
    wide.steps = 0
    with pytest.raises(ValueError, match=r"IMAML.objective must return one real number.*\(12, 2\)"):
        wide.solve(x, y)
    short = Ridge(torch.tensor(1.0, requires_grad=True))
    short.optimality = lambda x, y: (1, 2, 3)  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueError, match=r"one tensor for each of the 2 parameters.*got 3"):
        short.solve(x, y[:, 0])
    with pytest.raises(RuntimeError, match="enable_grad"):
        Forgetful(net()).solve(x, y)
    unsolved = Checked(net(), steps=1)
    with pytest.raises(ValueError, match=r"Checked.objective.*residual_check=1e-08"):
        unsolved.solve(x, y)


class Frozen(IMAML):
    def reset_parameters(self) -> None:
        self.net = nn.Linear(3, 2)


class Empty(Ridge):
    def __init__(self, strength: Tensor) -> None:
        super().__init__(strength)
        del self.w, self.same


class Forgetful(IMAML):
    def solve(self, x: Tensor, y: Tensor) -> None:  # type: ignore[override]
        torch.autograd.grad(self.objective(x, y), list(self.parameters()))


class Checked(IMAML, residual_check=1e-8):
    pass
