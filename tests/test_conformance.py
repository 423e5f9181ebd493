"""The conformance grid: meta-gradients of every algorithm against central differences in float64.

Every row of the table x {initial parameters, every hyperparameter as a tensor, one tensor per
group} x {1, 3, 8} inner steps x {a polynomial loss, a loss with a feature that is always zero},
through the differentiable face, through the functional face, and through the functional face in
forward mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest
import torch
from cases import F64, Case, every_case, every_meta_case
from conftest import nonzero
from tolerances import META_GRADIENT, assert_close
from torch import Tensor, nn

import torchopt


pytestmark = pytest.mark.complete


Inputs = dict[str, Tensor]

PARTS = {"a": 3, "b": 2}  # the parameters: one vector per part of the network, and per group
LOSSES = ("polynomial", "zero-feature")
STEPS = (1, 3, 8)


# The inner and the outer problem ------------------------------------------------------------------


class Part(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())


@functools.cache
def problem(kind: str) -> dict[str, Tensor]:
    """Return the data of both losses and the initial parameters."""
    torch.manual_seed(7)
    data = {"x": nonzero(6, 3), "y": nonzero(6), "x_outer": nonzero(5, 3), "y_outer": nonzero(5)}
    if kind == "zero-feature":
        data["x"][:, 1] = 0.0  # so a[1] has no gradient inside, but matters to the outer loss
    return data | {part: nonzero(size) for part, size in PARTS.items()}


def loss_of(x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """A polynomial of degree 8 in the parameters."""
    hidden, (b0, b1) = x @ weights["a"], weights["b"]
    return ((b0 * hidden + b1 * hidden**3 - y) ** 2).mean()


def inner_loss(kind: str, weights: Mapping[str, Tensor]) -> Tensor:
    return loss_of(problem(kind)["x"], problem(kind)["y"], weights)


def outer_loss(kind: str, weights: Mapping[str, Tensor]) -> Tensor:
    return loss_of(problem(kind)["x_outer"], problem(kind)["y_outer"], weights)


# What the outer loss is a function of -------------------------------------------------------------


def make_inputs(case: Case, kind: str, wrt: str) -> Inputs:
    if wrt == "parameters":
        return {part: problem(kind)[part].clone() for part in PARTS}
    if wrt == "hyperparameters":
        return case.tensors()
    return {
        f"{part}/{name}": value * factor
        for part, factor in (("a", 1.0), ("b", 0.9))
        for name, value in case.tensors().items()
    }


def read_inputs(kind: str, wrt: str, inputs: Inputs) -> tuple[Inputs, list[Inputs]]:
    """Return the initial parameters, and the hyperparameters: one dict for all, or one a part."""
    if wrt == "parameters":
        return inputs, [{}]
    initial = {part: problem(kind)[part] for part in PARTS}
    if wrt == "hyperparameters":
        return initial, [inputs]
    return initial, [
        {name[2:]: value for name, value in inputs.items() if name[0] == part} for part in PARTS
    ]


def by_name(groups: list[Inputs]) -> dict[str, object]:
    """Return the hyperparameters of parts as trees: ``{"lr": {"a": tensor, "b": tensor}}``."""
    if len(groups) == 1:
        return dict(groups[0])
    return {name: {part: g[name] for part, g in zip(PARTS, groups)} for name in groups[0]}


# The faces ----------------------------------------------------------------------------------------


def functional(case: Case, kind: str, wrt: str, steps: int, inputs: Inputs) -> Tensor:
    params, groups = read_inputs(kind, wrt, inputs)
    tx = case.tx(by_name(groups))
    state = tx.init(params)
    for _ in range(steps):
        grads = torch.func.grad(functools.partial(inner_loss, kind))(params)
        updates, state = tx.update(grads, state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return outer_loss(kind, params)


def differentiable(
    case: Case, kind: str, wrt: str, steps: int, inputs: Inputs, as_groups: bool
) -> Tensor:
    initial, groups = read_inputs(kind, wrt, inputs)
    net = nn.ModuleDict({part: Part(w) for part, w in initial.items()})
    if wrt == "parameters":
        for part in PARTS:
            net[part]._parameters["w"] = inputs[part]
    if as_groups and len(groups) > 1:
        pairs = zip(net.values(), groups)
        optimizer = torchopt.MetaOptimizer(
            [{"params": part, **case.arguments(group)} for part, group in pairs], case.tx()
        )
    else:
        optimizer = case.meta(net, **case.arguments(by_name(groups)))
    weights = lambda: {part: net[part].w for part in PARTS}  # noqa: E731
    for _ in range(steps):
        optimizer.step(inner_loss(kind, weights()))
    return outer_loss(kind, weights())


# The oracle ---------------------------------------------------------------------------------------


def central_differences(
    function: Callable[[Inputs], Tensor], inputs: Inputs
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Return the value, and for each input the derivatives and the errors to allow.

    Central differences of order 6, at multiples of 1e-3 of the value (of 0.03 at least), all
    points in one ``vmap``. The differences of order 4 at the same points must agree with them, or
    they are no oracle: they do not if the data lie beside a kink. The error to allow is 1e-6
    relative, or the rounding error of the differences where that is larger (some derivatives are
    exactly zero: Adam's first step does not depend on beta1).
    """
    flat = torch.cat([value.reshape(-1) for value in inputs.values()])
    distance = 1e-3 * flat.abs().clamp(min=0.03)
    offsets = torch.cat([k * torch.diag(distance) for k in (1, 2, 3, -1, -2, -3)])
    sizes = [value.numel() for value in inputs.values()]

    def at(point: Tensor) -> Tensor:
        pieces = zip(inputs.items(), point.split(sizes))
        return function({name: piece.reshape(value.shape) for (name, value), piece in pieces})

    with torch.no_grad():
        value = at(flat)
        values = torch.vmap(at)(torch.cat([flat[None], flat + offsets]))
    assert_close(values[0], value, what="value under vmap")
    up, down = values[1:].view(2, 3, len(flat))
    c1, c2, c3 = (up - down) / distance
    order_4, order_6 = (8 * c1 - c2) / 12, (45 * c1 - 9 * c2 + c3) / 60
    rounding = 8 * torch.finfo(flat.dtype).eps * value.abs() / distance
    allowed = torch.maximum(META_GRADIENT * order_6.abs(), rounding)
    agree = (order_6 - order_4).abs() <= allowed
    names = [name for name, size in zip(inputs, sizes) for _ in range(size)]
    assert agree.all(), f"no oracle: {[name for name, ok in zip(names, agree) if not ok]}"
    columns = zip(order_6.split(sizes), allowed.split(sizes))
    return value, {
        name: (derivative.reshape(inputs[name].shape), error.reshape(inputs[name].shape))
        for name, (derivative, error) in zip(inputs, columns)
    }


@functools.cache
def oracle(
    case: Case, kind: str, wrt: str, steps: int
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    function = functools.partial(functional, case, kind, wrt, steps)
    return central_differences(function, make_inputs(case, kind, wrt))


def assert_meta_gradient(gradient: Tensor, expected: tuple[Tensor, Tensor], what: str) -> None:
    wanted, allowed = expected
    assert gradient.dtype == torch.float64
    assert ((gradient - wanted).abs() <= allowed).all(), (
        f"{what}: {gradient.tolist()} instead of {wanted.tolist()} +- {allowed.tolist()}"
    )


# The grid -----------------------------------------------------------------------------------------

WRT_AND_FACE = [
    (wrt, face)
    for wrt in ("parameters", "hyperparameters", "per-group")
    for face in ("differentiable", "differentiable-by-name", "functional", "forward")
    if wrt == "per-group" or face != "differentiable-by-name"
]


@pytest.mark.sampled(7, each=2)
@pytest.mark.parametrize(("wrt", "face"), WRT_AND_FACE, ids=lambda value: value)
@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: f"{steps}-steps")
@pytest.mark.parametrize("kind", LOSSES)
@every_meta_case
def test_meta_gradient(case: Case, kind: str, steps: int, wrt: str, face: str) -> None:
    loss, expected = oracle(case, kind, wrt, steps)
    inputs = make_inputs(case, kind, wrt)

    if face == "forward":
        direction = {name: nonzero(*value.shape) for name, value in inputs.items()}
        function = functools.partial(functional, case, kind, wrt, steps)
        value, slope = torch.func.jvp(function, (inputs,), (direction,))
        assert_close(value, loss)
        wanted = sum((expected[name][0] * direction[name]).sum() for name in inputs)
        allowed = sum((expected[name][1] * direction[name].abs()).sum() for name in inputs)
        assert (slope - wanted).abs() <= allowed, f"{slope} instead of {wanted} +- {allowed}"
        return

    for value in inputs.values():
        value.requires_grad_()
    if face == "functional":
        actual_loss = functional(case, kind, wrt, steps, inputs)
    else:
        as_groups = face == "differentiable"
        actual_loss = differentiable(case, kind, wrt, steps, inputs, as_groups)
    assert_close(actual_loss.detach(), loss)
    # at the first step the momentum buffer is the gradient; later every input is connected, but
    # for what only the average of the weights depends on
    early = steps < case.algorithm.settled or case.algorithm.flat
    unused = {"allow_unused": True, "materialize_grads": True} if early else {}
    gradients = torch.autograd.grad(actual_loss, list(inputs.values()), **unused)
    for name, gradient in zip(inputs, gradients):
        assert_meta_gradient(gradient, expected[name], name)


@pytest.mark.parametrize("kind", LOSSES)
@every_case
def test_grid_is_not_trivial(case: Case, kind: str) -> None:
    """After some steps every number that is not flat matters to the outer loss, above rounding."""
    steps = case.algorithm.settled + case.algorithm.rests
    _, derivatives = oracle(case, kind, "hyperparameters", steps)
    for name, (derivative, _) in derivatives.items():
        if case.flat(name):
            assert derivative.abs() < 1e-12, f"{name} is not flat: {derivative}"
        else:
            assert derivative.abs() > 1e-4, f"{name} is not tested: {derivative}"


def test_zero_feature_is_exactly_zero() -> None:
    """One entry of the gradient is exactly zero inside, and not zero outside."""
    weights = {part: problem("zero-feature")[part] for part in PARTS}
    inner = torch.func.grad(functools.partial(inner_loss, "zero-feature"))(weights)
    outer = torch.func.grad(functools.partial(outer_loss, "zero-feature"))(weights)
    assert (inner["a"] == 0).tolist() == [False, True, False]
    assert (inner["b"] != 0).all()
    assert all((gradient.abs() > 1e-2).all() for gradient in outer.values())


@every_case
def test_one_hyperparameter_per_element(case: Case) -> None:
    """A tensor with one value per element receives its meta-gradient element by element."""

    def final_loss(values: Inputs) -> Tensor:
        params = {part: problem("polynomial")[part] for part in PARTS}
        tx = case.tx({name: {"a": v, "b": case.value(name)} for name, v in values.items()})
        state = tx.init(params)
        for _ in range(case.algorithm.settled + case.algorithm.rests):
            grads = torch.func.grad(functools.partial(inner_loss, "polynomial"))(params)
            updates, state = tx.update(grads, state, params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return outer_loss("polynomial", params)

    factors = torch.tensor([1.0, 0.95, 0.9], **F64)
    values = {name: case.value(name) * factors for name in case.tunable_by_entry}
    _, expected = central_differences(final_loss, values)
    gradients = torch.func.grad(final_loss)(values)
    for name, gradient in gradients.items():
        assert_meta_gradient(gradient, expected[name], name)
        everywhere = torch.any if name.partition(".")[0] in case.algorithm.in_places else torch.all
        assert everywhere((gradient == 0) == case.flat(name)), f"{name} is not tested: {gradient}"
