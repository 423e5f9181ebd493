"""torch.compile of steps whose hyperparameters are learned, and of ``step()`` of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import nonzero
from tolerances import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import torchopt
from torchopt import schedules


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


#: Numbers raised to the power of a count, or of a fraction that changes with it.
LEARNED: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "betas": (lambda a, b: torchopt.adam(0.1, betas=(a, b)), (0.8, 0.9)),
    "base": (
        lambda a: torchopt.sgd(
            schedules.exponential_decay(0.1, transition_steps=2, decay_rate=a), momentum=0.9
        ),
        (0.8,),
    ),
    "exponent": (lambda a: torchopt.sgd(schedules.polynomial(0.1, 0.01, a, 6)), (2.0,)),
}


@pytest.mark.parametrize(
    ("make", "values"),
    [
        pytest.param(*row, id=name, marks=[] if name == "betas" else pytest.mark.thorough)
        for name, row in LEARNED.items()
    ],
)
def test_learned_numbers_compile_at_every_step(make: Any, values: tuple[float, ...]) -> None:
    """The twin is eager, without kernels."""
    results = []
    for compiles in (False, True):
        learned = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]
        tx = make(*learned)

        def step(x: Tensor, state: Any, tx: Any = tx) -> Any:
            (new,), state = tx.apply_gradients([x**2 + 0.3], state, [x], inplace=False)
            return new, state

        take = torch.compile(step, fullgraph=True, backend="aot_eager") if compiles else step
        x = torch.tensor([2.0, -1.0], dtype=torch.float64)
        state = tx.init([x])
        for _ in range(3):
            x, state = take(x, state)
        results.append([x.detach(), *torch.autograd.grad(x.sum(), learned)])
    expected, found = results
    assert_close(found, expected, times=10)
    assert all(derivative.abs() > 1e-6 for derivative in expected[1:])


def test_a_step_compiles_in_full_graph() -> None:
    """Beside ``torch.optim``; later steps take the graph of the third one."""
    start = [nonzero(3), nonzero(2, 2)]
    own, twins = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizer, twin = torchopt.Adam(own, lr=0.1), torch.optim.Adam(twins, lr=0.1)
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    graphs = []
    for _ in range(6):
        for p, q in zip(own, twins):
            q.grad = nonzero(*p.shape)
            p.grad = q.grad.clone()
        step()
        twin.step()
        graphs.append(counter.frame_count)
    assert_close([p.detach() for p in own], [q.detach() for q in twins], times=10)
    assert [int(optimizer.state[p]["step"]) for p in own] == [6, 6]
    assert graphs[2:] == [graphs[2]] * 4
    assert graphs[-1] <= 3
