"""Steps that go wrong later than at once, and arguments of adjoints: the same error everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchopt
from torchopt.diff import (
    Auto,
    Checkpointed,
    FirstOrder,
    Forward,
    Offloaded,
    Truncated,
    Unrolled,
    unroll,
)


W = torch.tensor([0.1, 0.2], requires_grad=True)
NAN = float("nan")
ADJOINTS = [
    *(Unrolled(), Checkpointed(), Checkpointed("sqrt"), Checkpointed("revolve", slots=2)),
    *(Forward(), Truncated(2), FirstOrder(), Offloaded(), Auto("1GiB"), Auto("64B")),
]

#: What the second step makes of the first leaf of the carry, and what is said of it.
LATER: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "shape": (lambda w: w[:1], ValueError, r"leaf '0' of the carry: it was float32\[2\]"),
    "dtype": (lambda w: w.double(), ValueError, r"and is float64\[2\]"),
    "device": (lambda w: w.to("meta"), ValueError, r"on cpu and is float32\[2\].* on meta"),
    "None": (lambda w: None, TypeError, "kind of leaf '0' of the carry.* is None"),
    "number": (lambda w: 0.5, TypeError, "kind of leaf '0' of the carry.* is float: 0.5"),
    "tuple": (lambda w: (w, w), ValueError, "structure that it was given: '0' is missing"),
}


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_a_later_step_that_changes_the_carry(adjoint: Any) -> None:
    for what, (change, error, text) in LATER.items():

        def step(carry: Any, _: None, change: Any = change) -> Any:
            w, n = carry
            return (change(w) if n == 1 else 1.0 * w, n + 1), None

        with pytest.raises(error, match=text):
            unroll(step, (W, 0), length=4, adjoint=adjoint)
        assert what


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_lengths_and_nan(adjoint: Any) -> None:
    step = lambda w, x: (w * 1.0, None)  # noqa: E731
    given: list[tuple[dict[str, Any], str]] = [
        ({"xs": torch.zeros(0)}, "at least one step, got 0"),
        ({"xs": {}}, "How many steps"),
        ({"length": 0}, "at least one step, got 0"),
        ({"length": -1}, "at least one step, got -1"),
        ({"xs": torch.ones(3), "length": 2}, "length: 2, xs: 3"),
        ({"xs": [torch.ones(3), torch.ones(2)]}, "'0' of xs: 3, leaf '1' of xs: 2"),
    ]
    for arguments, text in given:
        with pytest.raises(ValueError, match=text):
            unroll(step, W, adjoint=adjoint, **arguments)
    (w, _), ys = unroll(
        lambda c, _: ((c[0] * (NAN if c[1] == 1 else 2.0), c[1] + 1), c[0].sum()),
        (W, 0), length=3, adjoint=adjoint,
    )  # fmt: skip
    assert w.isnan().all()
    assert ys[:2].isfinite().all()
    assert ys[2].isnan()


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "progress": (lambda: Checkpointed(progress=3), TypeError, "a function.*got int: 3"),  # pyright: ignore
    "report": (lambda: Auto("1GiB", report=3), TypeError, "function of a Choice, got int: 3"),  # pyright: ignore
    "pin_memory": (lambda: Offloaded("yes"), TypeError, "True or False, got str: 'yes'"),  # pyright: ignore
    "memory": (lambda: Auto("1.2.3GiB"), ValueError, "got '1.2.3GiB'"),
    "plan of text": (lambda: Checkpointed().plan(3, "a"), TypeError, "bytes.*got str: 'a'"),
    "plan of nan": (lambda: Checkpointed().plan(3, NAN), TypeError, "got float: nan"),
    "plan of -1": (lambda: Checkpointed().plan(3, -1), ValueError, "carry_bytes must be >= 0"),
    "every nan": (lambda: Checkpointed(NAN), TypeError, "every must be.*nan"),  # pyright: ignore
    "every True": (lambda: Checkpointed(True), TypeError, "got bool: True"),
    "last nan": (lambda: Truncated(NAN), TypeError, "last must be an integer"),  # pyright: ignore
    "class": (
        lambda: unroll(lambda w, _: (w, None), W, length=2, adjoint=Checkpointed),  # pyright: ignore
        TypeError, "got the class Checkpointed",
    ),
    "no adjoint": (
        lambda: unroll(lambda w, _: (w, None), W, length=2, adjoint=None),  # pyright: ignore
        TypeError, r"such as torchopt.diff.Checkpointed\(\), got None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_cannot_be_meant(name: str) -> None:
    call, error, text = BAD[name]
    with pytest.raises(error, match=text):
        call()


# Modules of frameworks ---------------------------------------------------------------------------


class Lit(nn.Module):
    """What a LightningModule is to a block: a step that logs, and a part that is checkpointed."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        # no BatchNorm in what is checkpointed: torch would count each batch twice
        self.first, self.last = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), nn.Linear(5, 1)
        self.middle = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.2))
        self.reentrant, self.logged = reentrant, {}

    def log(self, name: str, value: Tensor) -> None:
        self.logged.setdefault(name, []).append(value.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.reentrant is None:
            return self.last(self.middle(hidden))
        return self.last(checkpoint(self.middle, hidden, use_reentrant=self.reentrant))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self(x)[:, 0] - y).square().mean()
        self.log("train_loss", loss)
        return loss


def lit(adjoint: Any, reentrant: bool | None) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    net = Lit(reentrant).double()
    weights = list(net.parameters())
    x = torch.randn(4, 6, 3).double()
    with torchopt.inner_loop(net, torchopt.adam(0.05), adjoint=adjoint) as inner:
        for t, batch in enumerate(zip(x, x[..., 0].sin())):
            inner.step(lambda: net.training_step(batch, t))  # noqa: B023
        net.eval()
        outer = net.training_step((x[0], x[0, :, 0]), 0)
        grads = torch.autograd.grad(outer, weights)
    return list(grads), net.logged["train_loss"]


@pytest.mark.parametrize("adjoint", [Checkpointed(), Checkpointed("log"), Truncated(9)], ids=repr)
def test_lightning_style_modules_with_checkpointed_blocks(adjoint: Any) -> None:
    expected, logged = lit(None, None)
    found, told = lit(adjoint, False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert {float(x) for x in logged} <= {float(x) for x in told}  # replays log again


@pytest.mark.parametrize("adjoint", [None, Checkpointed()], ids=repr)
def test_a_reentrant_checkpoint_is_refused_by_torch(adjoint: Any) -> None:
    """It knows ``backward()`` only, and an inner gradient is one by certain inputs."""
    with pytest.raises(RuntimeError, match=r"use_reentrant=False"):
        lit(adjoint, True)
