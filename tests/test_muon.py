"""Muon, which takes matrices only: values, derivatives, states and refusals on every face."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from adapting import adapted_loss, assert_derivative, batch, mse
from algorithms import Case
from cases import MATRIX_ALGORITHMS
from conftest import nonzero
from fusing import differentiable, functional, functional_at_once, object_oriented
from refusing import refused
from tolerances import assert_close
from torch import Tensor, nn

import torchopt


(MUON,) = MATRIX_ALGORITHMS
CASES = list(MUON.cases())
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
needs_twin = pytest.mark.skipif(MUON.torch_cls is None, reason="this torch has no Muon")
FACES = (functional, functional_at_once, differentiable, object_oriented)
SHAPES = ((3, 4), (4, 2), (2, 2), (1, 3))
F64: Any = {"ns_dtype": torch.float64}


def exact(case: Case, changed: Any = None) -> torchopt.GradientTransformation:
    """Return the transformation with its iteration in float64."""
    return case.recipe(**case.arguments(changed), **F64)


def net() -> Any:
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))


def values(network: nn.Module) -> list[Tensor]:
    return [p.detach() for p in network.parameters()]


def whole_net() -> Any:
    return nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


# Values -------------------------------------------------------------------------------------------


def by_the_paper(case: Case, p: Tensor, grads: list[Tensor]) -> Tensor:
    """The algorithm, written out: X <- a X + (b A + c A^2) X for A = X X'."""
    k = {**MUON.defaults(), **case.kwargs}
    a, b, c = k["ns_coefficients"]
    m = torch.zeros_like(p)
    for g in grads:
        m = k["momentum"] * m + (1 - k["momentum"]) * g
        x = k["momentum"] * m + (1 - k["momentum"]) * g if k["nesterov"] else m
        x = x / max(x.square().sum().sqrt().item(), k["eps"])
        for _ in range(k["ns_steps"]):
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        rows, columns = p.shape
        scale = max(1.0, rows / columns) ** 0.5
        if k["adjust_lr_fn"] == "match_rms_adamw":
            scale = 0.2 * max(rows, columns) ** 0.5
        p = p - k["lr"] * (scale * x + k["weight_decay"] * p)
    return p


def problem(dtype: torch.dtype = torch.float64, steps: int = 4) -> tuple[list[Tensor], Any]:
    params = [nonzero(*shape, dtype=dtype) for shape in SHAPES]
    return params, [[nonzero(*s, dtype=dtype) for s in SHAPES] for _ in range(steps)]


@pytest.mark.parametrize(
    "face",
    [functional, functional_at_once, differentiable, object_oriented],
    ids=lambda f: f.__name__,
)
@every_case
def test_values_are_those_of_the_paper(case: Case, face: Any) -> None:
    params, grads = problem()
    found = face(exact(case), params, grads)[: len(params)]
    expected = [by_the_paper(case, p, [g[k] for g in grads]) for k, p in enumerate(params)]
    assert_close(found, expected, times=100)


@needs_twin
@every_case
def test_values_are_those_of_torch(case: Case) -> None:
    """In bfloat16 too: the iteration adds and rounds in the same order."""
    params, grads = problem(torch.float32)
    ours, theirs = ([nn.Parameter(p.clone()) for p in params] for _ in range(2))
    optimizers = [case.cls(ours, **case.kwargs), case.torch_cls(theirs, **case.kwargs)]
    for own in grads:
        for optimizer, group in zip(optimizers, (ours, theirs)):
            for p, g in zip(group, own):
                p.grad = g.clone()
            optimizer.step()
    assert_close([p.detach() for p in ours], [p.detach() for p in theirs], times=2)
    assert not torch.equal(ours[0], params[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_case
def test_no_dtype_drifts(case: Case, dtype: torch.dtype) -> None:
    params, grads = problem(dtype, steps=2)
    slot = dtype if dtype.itemsize > 2 else torch.float32
    for face in FACES:
        found = face(case.tx(), params, grads)
        n = len(params)
        assert {x.dtype for x in found[:n]} == {dtype}
        assert {x.dtype for x in found[n:]} == {slot}
        assert all(x.isfinite().all() for x in found)


# Derivatives --------------------------------------------------------------------------------------


def meta_gradients() -> list[Any]:
    """Return each configuration with each number that a loss depends on, and the parameters."""
    return [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in CASES
        for name in ("parameters", *case.tunable)
        if name != "eps"
    ]


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize(("case", "name"), meta_gradients())
def test_meta_gradients(case: Case, name: str) -> None:
    inner, support, query = net(), batch(), batch()
    if name == "parameters":
        tx, tensors = exact(case), list(inner.parameters())
    else:
        tensors = [torch.tensor(case.value(name), requires_grad=True)]
        tx = exact(case, {name: tensors[0]})
    assert_derivative(adapted_loss(inner, tx, support, query), tensors)


@every_case
def test_the_least_norm_matters_below_it(case: Case) -> None:
    g, weights = nonzero(3, 2), nonzero(3, 2)

    def function(eps: Tensor, size: float) -> Tensor:
        tx = exact(case, {"eps": eps})
        update, _ = tx.update(size * g, tx.init(g), torch.zeros_like(g), inplace=False)
        return (update * weights).sum()

    for size in (0.01, 10.0):
        eps = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(function(eps, size), eps, materialize_grads=True)
        up, down = (function(eps.detach() + h, size) for h in (1e-5, -1e-5))
        assert (slope - (up - down) / 2e-5).abs() <= 1e-6 * slope.abs()
        assert (slope != 0) == (size < 1)


@every_case
def test_a_gradient_of_zeros_passes_no_derivative(case: Case) -> None:
    tx, p = exact(case), nonzero(3, 2)
    state = tx.init(p)
    g = torch.zeros(3, 2, dtype=torch.float64)
    decay = -case.kwargs["lr"] * case.kwargs["weight_decay"]
    update, _ = tx.update(g, state, p, inplace=False)
    assert_close(update, decay * p)
    function = lambda g: tx.update(g, state, p, inplace=False)[0]  # noqa: E731
    assert torch.func.jacrev(function)(g).abs().max() == 0
    assert torch.func.jacfwd(function)(g).abs().max() == 0


# States -------------------------------------------------------------------------------------------


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(
    cls: Any, case: Case, params: list[Tensor], steps: int = 2, optimizer: Any = None
) -> Any:
    own = [p if isinstance(p, nn.Parameter) else nn.Parameter(p.clone()) for p in params]
    optimizer = cls(own, **case.kwargs) if optimizer is None else optimizer
    torch.manual_seed(3)
    for _ in range(steps):
        for p in own:
            p.grad = nonzero(*p.shape, dtype=p.dtype)
        optimizer.step()
    return own, optimizer


@needs_twin
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
@every_case
def test_checkpoints_go_both_ways(case: Case, direction: str) -> None:
    classes = (
        [case.torch_cls, case.cls] if direction == "from torch" else [case.cls, case.torch_cls]
    )
    params, _ = problem(torch.float32)
    p, donor = trained(classes[0], case, params)
    q = [nn.Parameter(x.detach().clone()) for x in p]
    other = classes[1](q, lr=0.5)
    other.load_state_dict(saved(donor.state_dict()))
    assert other.param_groups[0]["lr"] == case.kwargs["lr"]
    trained(None, case, p, optimizer=donor)
    trained(None, case, q, optimizer=other)
    assert_close([x.detach() for x in q], [x.detach() for x in p], times=4)


@every_case
def test_a_differentiable_run_goes_on_from_a_saved_one(case: Case) -> None:
    start, data = net(), batch()
    optimizer = case.cls(start.parameters(), **case.kwargs)
    inner_net = copy.deepcopy(start)
    inner = case.meta(inner_net, **case.kwargs)
    for _ in range(3):
        optimizer.zero_grad()
        mse(start, data).backward()
        optimizer.step()
        inner.step(mse(inner_net, data))
        assert_close(values(inner_net), values(start))
        inner = case.meta(inner_net)
        inner.load_state_dict(saved(optimizer.state_dict()))


# Refusals -----------------------------------------------------------------------------------------

ADVICE = r"shape \(.*\), and Muon takes matrices only.*partition\(.*adamw.*matrices_and_rest"


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4), (2, 1, 3, 3)], ids=str)
def test_what_is_no_matrix_is_refused_at_once(shape: tuple[int, ...]) -> None:
    params = {"w": nonzero(2, 3), "other": nonzero(*shape)}
    tx = torchopt.muon()
    with refused(ValueError, f"'other' has the {ADVICE}", params):
        tx.init(params)
    own = {name: nn.Parameter(p) for name, p in params.items()}
    with refused(ValueError, f"'other' has the {ADVICE}", own):
        torchopt.Muon(own.items())
    optimizer = torchopt.Muon([own["w"]])
    with refused(ValueError, ADVICE, optimizer, own):
        optimizer.add_param_group({"params": [own["other"]]})
    assert len(optimizer.param_groups) == 1
    network = nn.ParameterDict(own)
    with refused(ValueError, f"'other' has the {ADVICE}", own):
        torchopt.MetaMuon(network)
    with refused(ValueError, ADVICE, own), torchopt.inner_loop(network, tx):
        pass


def test_a_vector_in_a_state_of_matrices_is_refused() -> None:
    tx = torchopt.scale_by_muon()
    p = {"w": nonzero(2, 3)}
    with refused(ValueError, "matrices only", p):
        tx.update({"w": nonzero(3)}, torchopt.OptState(0, {"momentum_buffer": {"w": nonzero(3)}}))


# With another optimizer for the rest --------------------------------------------------------------


def both(lr: Any = 0.02) -> torchopt.GradientTransformation:
    return torchopt.partition(
        {"matrix": torchopt.muon(lr=lr, **F64), "rest": torchopt.adamw(lr=0.01, eps=1e-3)},
        torchopt.matrices_and_rest,
    )


def token_loss(network: Any, data: Any) -> Tensor:
    return (network(data[0]) - data[1]).square().mean()


def token_data() -> Any:
    return torch.randint(5, (8,)), torch.randn(8, 2)


def test_labels() -> None:
    params = {"0.weight": nonzero(5, 3), "0.bias": nonzero(3), "embed.weight": nonzero(5, 3)}
    params |= {"scale": nonzero(), "conv": nonzero(2, 2, 3)}
    labels = torchopt.matrices_and_rest(params)
    assert labels == dict.fromkeys(params, "rest") | {"0.weight": "matrix"}


@pytest.mark.usefixtures("float64_by_default")
def test_a_whole_network_on_every_face() -> None:
    network, data = whole_net(), token_data()
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    twin, tx = copy.deepcopy(network), both()
    optimizer = torchopt.Optimizer(network.named_parameters(), tx)
    assert [g["label"] for g in optimizer.param_groups] == ["matrix", "rest"]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    inner = torchopt.MetaOptimizer(twin, both(lambda count: 0.02 * 0.5**count))
    labels = torchopt.matrices_and_rest(start)
    for step in range(3):
        assert [g["lr"] for g in optimizer.param_groups] == [0.02 * 0.5**step, 0.01 * 0.5**step]
        for (name, p), (_, q) in zip(network.named_parameters(), twin.named_parameters()):
            with torch.no_grad():  # the rest has another rate than its twin after the first step
                p.copy_(q) if labels[name] == "rest" else assert_close(p, q)
        optimizer.zero_grad()
        token_loss(network, data).backward()
        optimizer.step()
        scheduler.step()
        inner.step(token_loss(twin, data))
        if step == 0:
            assert_close(values(network), values(twin))
    assert all(not torch.equal(p, start[name]) for name, p in network.named_parameters())


@pytest.mark.usefixtures("float64_by_default")
def test_functional_partition_is_each_by_itself() -> None:
    params = {"w": nonzero(3, 2), "b": nonzero(3)}
    tx = both()
    state, alone = tx.init(params), {}
    parts = {"w": torchopt.muon(lr=0.02, **F64), "b": torchopt.adamw(lr=0.01, eps=1e-3)}
    states = {name: part.init(params[name]) for name, part in parts.items()}
    for _ in range(3):
        grads = {name: nonzero(*p.shape) for name, p in params.items()}
        for name, part in parts.items():
            alone[name], states[name] = part.apply_gradients(
                grads[name], states[name], params[name], inplace=False
            )
        params, state = tx.apply_gradients(grads, state, params, inplace=False)
        assert_close(params, alone)


@pytest.mark.usefixtures("float64_by_default")
def test_meta_gradients_of_a_whole_network() -> None:
    network, support, query = whole_net(), token_data(), token_data()
    lr = torch.tensor(0.05, requires_grad=True)

    def outer() -> Tensor:
        with torchopt.inner_loop(network, both(lr)) as inner:
            for _ in range(3):
                inner.step(token_loss(network, support))
            return token_loss(network, query)

    assert_derivative(outer, [lr, *network.parameters()])
