"""Threads, fork and interrupts: no torn state, no wrong numbers, no deadlock."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import nonzero
from fusing import copy_of, needs_library
from pointwise import user_optimizer
from tolerances import assert_close
from torch import Tensor, nn

import torchopt
from torchopt.kernels.backends import cpu as native


pytestmark = needs_library
PACKAGE = str(Path(torchopt.__file__).parent)

# Threads ------------------------------------------------------------------------------------------


@pytest.fixture(name="two_threads")
def two_threads_fixture() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_threads(functions: list[Callable[[], Any]]) -> list[Any]:
    """Run functions at the same time, and return what they return."""
    barrier, results = threading.Barrier(len(functions)), [None] * len(functions)

    def run(k: int) -> None:
        torch.set_num_threads(2)
        barrier.wait()
        try:
            results[k] = functions[k]()
        except BaseException as error:
            results[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "deadlock"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def stepped(make: Any, sizes: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    params = [nn.Parameter(torch.rand(size, generator=generator) + 0.5) for size in sizes]
    optimizer = make(params)
    for _ in range(count):
        for p in params:
            p.grad = torch.rand(p.shape, generator=generator) - 0.5
        optimizer.step()
    return [p.detach() for p in params]


def test_optimizers_in_threads(two_threads: None) -> None:
    """Each in its own thread, with the work of each spread over two more."""
    sizes = (300_000, 17, 100_000)
    makers = [
        torchopt.Adam,
        lambda p: torchopt.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torchopt.RMSprop(p, centered=True),
        lambda p: torchopt.AdamW(p, amsgrad=True),
    ]
    expected = [stepped(make, sizes, 6) for make in makers]
    actual = in_threads([lambda make=make: stepped(make, sizes, 6) for make in makers])
    for a, e in zip(actual, expected):
        assert all(map(torch.equal, a, e))


def guarded(k: int) -> Any:
    """A rule with a comparison, and a number that no other rule has."""

    def rule(g: Any, p: Any, t: Any, slots: Any, lr: float) -> Any:
        for bound in range(1, 6):
            if t > bound and lr < bound + k:
                g = g * (1.0 + 0.125 * k) + g * g.abs() * 0.0
        return g * -lr, slots

    return user_optimizer(rule, lr=0.5)()


def test_rules_traced_in_threads() -> None:
    """Tracing one rule does not see the comparisons and numbers of another one."""
    interval = sys.getswitchinterval()

    def run(k: int, setting: bool | None) -> list[Tensor]:
        tx = guarded(k).with_accelerated_op(setting)
        p = [torch.full((3,), 0.5)]
        state, values = tx.init(p), []
        for _ in range(7):
            (u,), state = tx.update([torch.full((3,), 0.25)], state, p, inplace=False)
            values.append(u)
        return values

    expected = [run(k, False) for k in range(6)]
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            actual = in_threads([lambda k=k: run(k, None) for k in range(6)])
            assert_close(actual, expected)
    finally:
        sys.setswitchinterval(interval)


def test_graphs_made_in_threads() -> None:
    """The same rule traced in several threads at once gives the same kernels, always fused."""
    interval = sys.getswitchinterval()

    def run() -> list[str]:
        import catalogue

        return [kernel.name for kernel in catalogue.kernels()]

    expected = run()
    sys.setswitchinterval(1e-6)
    try:
        assert in_threads([run] * 4) == [expected] * 4
    finally:
        sys.setswitchinterval(interval)


FORK = """
import os, sys, torch, torchopt
torch.set_num_threads(2)
def step(optimizer, p):
    p.grad = torch.full_like(p, 0.5)
    optimizer.step()
p = torch.nn.Parameter(torch.ones(400_000))
optimizer = torchopt.Adam([p])
for _ in range(3):
    step(optimizer, p)
shared = torch.zeros(400_000).share_memory_()
grad, twin = torch.full_like(p, 0.5), torch.nn.Parameter(p.detach().clone())
child = os.fork()
if child == 0:
    code = 1
    try:
        p.grad = grad  # an operator of torch may hang here, whose OpenMP does not survive fork
        optimizer.step()
        optimizer.step()
        torch.set_num_threads(1)
        shared.copy_(p.detach())
        code = 0
    finally:
        os._exit(code)
p.grad = grad
optimizer.step()  # the parent goes on at the same time
optimizer.step()
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(shared, p.detach())
assert (p != twin).all()
step(optimizer, p)
print("right")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="there is no fork")
def test_fork_after_threads_were_used() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "right", done.stderr


# Interrupts ---------------------------------------------------------------------------------------


class Interrupter:
    """Raises ``KeyboardInterrupt`` before one line of the package, counted from the start."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self

    def run(self, function: Callable[[], Any]) -> bool:
        """Run a function; return whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def moments(function: Callable[[], Any], last: int = 150) -> list[int]:
    """Run a function to choose lines of it: some of all, and all of the last ones."""
    counter = Interrupter()
    counter.run(function)
    total = counter.lines
    return sorted({*range(1, total, 29), *range(max(1, total - last), total + 1)})


def snapshot(optimizer: torchopt.Optimizer) -> list[Any]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy_of([[p, dict(optimizer.state.get(p, {}))] for p in params])


def equal(a: Any, b: Any) -> bool:
    left, right = map(torch.utils._pytree.tree_leaves, (a, b))
    return len(left) == len(right) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(left, right)
    )


TX = torchopt.adam(amsgrad=True)  # one for all, so that its rules are traced once


def make_optimizer(steps_before: int, groups: int, missing: bool) -> torchopt.Optimizer:
    torch.manual_seed(6)
    params = [nn.Parameter(nonzero(3)) for _ in range(4)]
    own = [{"params": params[k::groups], "lr": 0.1 + k} for k in range(groups)]
    optimizer = torchopt.Optimizer(own, TX)
    for step in range(steps_before + 1):
        if step:
            optimizer.step()
        for p in params:
            p.grad = nonzero(3)
    if missing:
        params[0].grad = None
    return optimizer


@pytest.mark.parametrize(
    ("steps_before", "groups", "missing"),
    [(3, 1, False), (1, 1, False), (3, 2, False), (0, 1, False), (3, 1, True), (3, 2, True)],
    ids=["in-place", "prepare", "groups", "first-step", "missing-gradient", "missing-in-groups"],
)
def test_an_interrupt_leaves_all_old_or_all_new(
    steps_before: int, groups: int, missing: bool
) -> None:
    """At any line: parameters, slots and counts are those before the step, or those after it."""
    optimizer = make_optimizer(steps_before, groups, missing)
    old = snapshot(optimizer)
    make_optimizer(steps_before, groups, missing).step()  # whatever happens only once
    at_lines = moments(optimizer.step)
    new = snapshot(optimizer)
    found = set()
    for at in at_lines:
        optimizer = make_optimizer(steps_before, groups, missing)
        Interrupter(at).run(optimizer.step)
        after = snapshot(optimizer)
        assert equal(after, old) or equal(after, new), f"torn at line {at}"
        found.add(equal(after, new))
    assert found == {False, True}, "the test has not looked at both sides"


def test_signal_while_a_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes while C is at work is seen after it: everything is new."""
    interrupted, undisturbed = make_optimizer(3, 2, False), make_optimizer(3, 2, False)
    original = native.KernelCall.run

    def run(self: Any, numbers: Any) -> None:
        original(self, numbers)
        if not seen:
            seen.append(1)
            signal.raise_signal(signal.SIGINT)

    seen: list[int] = []
    monkeypatch.setattr(native.KernelCall, "run", run)
    # what a shell starts in the background is deaf to this signal
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted.step()
    finally:
        signal.signal(signal.SIGINT, handler)
    undisturbed.step()
    assert equal(snapshot(interrupted), snapshot(undisturbed))
    interrupted.step()
    undisturbed.step()
    assert equal(snapshot(interrupted), snapshot(undisturbed))


def test_interrupt_before_the_kernel_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make_optimizer(3, 1, False)
    before = snapshot(optimizer)

    def run(self: Any, numbers: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(native.KernelCall, "run", run)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert equal(snapshot(optimizer), before)
    optimizer.step()
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 4


def test_an_interrupted_meta_step_leaves_all_old_or_all_new() -> None:
    def make() -> tuple[nn.ParameterList, torchopt.MetaOptimizer, Callable[[], None]]:
        torch.manual_seed(6)
        net = nn.ParameterList(nonzero(3) for _ in range(2))
        optimizer = torchopt.MetaOptimizer(net, TX)
        optimizer.step(sum((p**2).sum() for p in net))
        return net, optimizer, lambda: optimizer.step(sum((p**2).sum() for p in net))

    def look(net: nn.ParameterList, optimizer: torchopt.MetaOptimizer) -> list[Any]:
        return copy_of([list(net), optimizer.state_dict()["state"]])

    net, optimizer, step = make()
    old = look(net, optimizer)
    at_lines = moments(step)
    new = look(net, optimizer)
    for at in at_lines:
        net, optimizer, step = make()
        Interrupter(at).run(step)
        after = look(net, optimizer)
        assert equal(after, old) or equal(after, new), f"torn at line {at}"


def test_an_interrupt_while_tracing_is_forgotten() -> None:
    """Whatever is interrupted in the first update of a transformation, the next one is right."""
    g = [torch.ones(3)]
    expected = guarded(2).with_accelerated_op(False).update(g, guarded(2).init(g))[0]
    first = guarded(2)
    for at in moments(lambda: first.update(g, first.init(g), inplace=False), last=0)[::2]:
        tx = guarded(2)
        Interrupter(at).run(lambda tx=tx: tx.update(g, tx.init(g), inplace=False))
        for step in (0, 0, 3):
            state = tx.init(g)
            state.step = step
            actual, _ = tx.update(g, state, inplace=False)
            if step == 0:
                assert_close(actual, expected)
