"""Optimizers on a GPU, or in the interpreter of Triton, against the rules."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest
import torch
from cases import Case, every_fused_kind
from tolerances import assert_close
from torch import Tensor

import torchopt
from torchopt.kernels.backends import cpu as native
from torchopt.kernels.backends import gpu as triton_backend
from torchopt.kernels.backends import launch


pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="triton is not installed (pip install 'torchopt[gpu]')",
    ),
    # the interpreter computes with numpy, which tells what a GPU does silently
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning"),
]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
on_gpu = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
)


@pytest.fixture(name="device", params=["cpu", on_gpu])
def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device whose fused updates Triton's kernels compute: on the CPU by its interpreter."""
    if request.param == "cpu":
        if isinstance(native.load(), native.UnavailableError):
            pytest.skip("nothing is fused on the CPU: its kernels are not loaded")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(launch, "run", triton_backend.run)
    return request.param


def parameters(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters so far from zero that no update cancels them: errors stay relative to them."""
    return [x + 8 * x.sign() for x in gradients(device, dtype, seed=0)[0]]


def gradients(device: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[list[Tensor]]:
    """Gradients of several shapes for three steps."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3,), (0,), (40, 60), (1025,), ()]
    return [
        [torch.randn(s, generator=generator).to(device, dtype) for s in shapes] for _ in range(3)
    ]


def steps(
    tx: torchopt.GradientTransformation, params: list[Tensor], grads: Sequence[list[Tensor]]
) -> list[Tensor]:
    """Return the parameters and the slots after pure steps."""
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return [*params, *(x for slot in state.slots.values() for x in slot if x is not None)]


@every_fused_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_against_the_rules(case: Case, dtype: torch.dtype, device: str) -> None:
    params, grads = parameters(device, dtype), gradients(device, dtype)
    fused, plain = (case.tx(use_accelerated_op=use) for use in (True, False))
    # each of three steps may round differently; slots follow the parameters' last digits
    assert_close(steps(fused, params, grads), steps(plain, params, grads), dtype, times=4)


@every_fused_kind
def test_derivatives_against_the_rules(case: Case, device: str) -> None:
    def meta_gradients(use: bool) -> tuple[Tensor, ...]:
        params = [p.requires_grad_() for p in parameters(device, torch.float64)]
        grads = gradients(device, torch.float64)
        inputs = [*params, *(g.requires_grad_() for step in grads for g in step)]
        outputs = steps(case.tx(use_accelerated_op=use), params, grads)
        loss = torch.stack([x.square().sum() for x in outputs]).sum()
        return torch.autograd.grad(loss, inputs)

    assert_close(meta_gradients(True), meta_gradients(False), times=100)


def test_differentiable_face_against_the_rules(device: str) -> None:
    def meta_gradients(use: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        net = torch.nn.Linear(30, 50, dtype=torch.float64).to(device)
        x = torch.randn(4, 30, dtype=torch.float64).to(device).requires_grad_()
        optimizer = torchopt.MetaAdam(net, lr=0.1, use_accelerated_op=use)
        start = list(net.parameters())
        for _ in range(3):
            optimizer.step(net(x).square().mean())
        return torch.autograd.grad(net(x).square().mean(), [x, *start])

    assert_close(meta_gradients(True), meta_gradients(False), times=100)


@pytest.mark.parametrize("device", [on_gpu])
@every_fused_kind
def test_captured(case: Case, device: str) -> None:
    """An inner loop of three steps is captured and replayed with other gradients."""
    tx = case.tx(use_accelerated_op=True)
    params, grads = parameters(device), gradients(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps(tx, params, grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = steps(tx, params, grads)
    for seed in (10, 20):
        new = gradients(device, seed=seed)
        for old, values in zip(grads, new):
            torch._foreach_copy_(old, values)
        expected = steps(tx, params, new)  # reuses the memory that calls outside of the graph have
        graph.replay()
        assert_close(outputs, expected)


@pytest.mark.parametrize("device", [on_gpu])
@every_fused_kind
def test_nothing_is_waited_for(case: Case, device: str) -> None:
    tx = case.tx(use_accelerated_op=True)
    params, grads = parameters(device), gradients(device)
    steps(tx, params, grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(tx, params, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
