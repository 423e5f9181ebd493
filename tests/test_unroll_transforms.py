"""Loops under torch.func and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import loops
import pytest
import torch
import torch._dynamo.testing
from tolerances import relative_error
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torchopt.diff import Checkpointed, Unrolled, unroll


BY = ("w", "log_lr", "decay")


def of_three(adjoint: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    values = loops.inputs()
    function = loops.meta_loss(adjoint)

    def of(w: Tensor, log_lr: Tensor, decay: Tensor) -> Tensor:
        return function(w, values["exp_avg"], log_lr, decay, values["xs"])

    return of, [values[name] for name in BY]


def leaves_of(result: Any) -> Tensor:
    return loops.flat(tree_leaves(result))


ALL = (0, 1, 2)
TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: torch.func.grad(f, argnums=ALL),
    "vmap(grad)": lambda f: lambda w, lr, decay: torch.func.vmap(
        torch.func.grad(f, argnums=ALL), in_dims=(0, None, 0)
    )(torch.stack([w, -w, 2 * w]), lr, torch.stack([decay, decay, 2 * decay])),
    "grad(vmap)": lambda f: torch.func.grad(
        lambda w, lr, d: torch.func.vmap(f, (None, 0, None))(w, lr * torch.arange(3), d).sum(),
        argnums=ALL,
    ),
    "jacrev(jacrev)": lambda f: torch.func.jacrev(torch.func.jacrev(f, argnums=1), argnums=ALL),
    "jacfwd(jacrev)": lambda f: torch.func.jacfwd(torch.func.jacrev(f, argnums=ALL), argnums=1),
    "jacrev(jacfwd)": lambda f: torch.func.jacrev(torch.func.jacfwd(f, argnums=1), argnums=ALL),
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=ALL),
}  # fmt: skip


@pytest.mark.parametrize("adjoint", [Checkpointed(), Checkpointed("log")], ids=["every", "log"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name: str, adjoint: Any) -> None:
    """Tensors that the step closes over are wrapped by the levels, and exchanged below them."""
    results = []
    for each in (Unrolled(), adjoint):
        function, values = of_three(each)
        results.append(leaves_of(TRANSFORMS[name](function)(*values)))
    assert relative_error(results[1], results[0]) <= 1e-10


def sgd(lr: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        grads, loss = torch.func.grad_and_value(lambda w: (x @ w).tanh().square().mean())(w)
        return w - lr * grads, loss

    return step


def test_the_meta_gradient_compiles_in_one_graph() -> None:
    values = loops.inputs()

    def loss(w: Tensor, lr: Tensor) -> Tensor:
        w, ys = unroll(sgd(lr), w, values["xs"][:2])
        return w.square().sum() + ys.sum()

    meta_gradient = torch.func.grad(loss, argnums=(0, 1))
    given = values["w"], values["log_lr"]
    compiled = torch.compile(meta_gradient, fullgraph=True, backend="eager")
    assert relative_error(loops.flat(compiled(*given)), loops.flat(meta_gradient(*given))) <= 1e-12


@pytest.mark.parametrize("adjoint", [Unrolled(), Checkpointed("log")], ids=["plain", "log"])
def test_a_compiled_step_is_compiled_once_for_all_steps(adjoint: Any) -> None:
    """Once in each way it is run: from a leaf or a result, recorded or not; and not never."""
    values, counts = loops.inputs(), []
    w0, lr = values["w"].requires_grad_(), torch.tensor(0.1, dtype=torch.float64)
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(sgd(lr), backend=counter)
    for length in (3, 5):
        w, _ = unroll(step, w0, values["xs"][:length], adjoint=adjoint)
        grad = torch.autograd.grad(w.sum(), w0)[0]
        counts.append(counter.frame_count)
        plain = unroll(sgd(lr), w0, values["xs"][:length])[0]
        assert relative_error(grad, torch.autograd.grad(plain.sum(), w0)[0]) <= 1e-12
    assert 1 <= counts[0] == counts[1] <= 5


def test_replaying_is_not_compiled_as_a_whole() -> None:
    def loss(w: Tensor) -> Tensor:
        sine = lambda w, _: (w.sin(), None)  # noqa: E731
        return unroll(sine, w, length=2, adjoint=Checkpointed())[0].sum()

    with pytest.raises(Exception, match="Compile the step"):
        torch.compile(torch.func.grad(loss), fullgraph=True, backend="eager")(torch.ones(2))
