"""What the examples print where output is not a terminal: whole lines, one every ten seconds."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest


pytest.importorskip("rich")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.usefixtures("examples_on_path")


class FakeTime:
    """A clock, and a wait that does not take time; what happens meanwhile is done by a function."""

    def __init__(self, meanwhile: Callable[[float], None], until: float) -> None:
        self.now, self.meanwhile, self.until = 1000.0, meanwhile, 1000.0 + until

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        assert seconds == 10.0
        self.now += seconds
        if self.now > self.until:
            return True
        self.meanwhile(self.now - 1000.0)
        return False


def lines_of(meanwhile: Callable[[Any, int, float], None], until: float, **task: Any) -> list[str]:
    """Return the lines of a task that goes on as a function says."""
    from common.progress import LineProgress

    lines: list[str] = []
    numbers: list[int] = []
    time = FakeTime(lambda seconds: meanwhile(progress, numbers[0], seconds), until)
    progress = LineProgress(lines.append, time.clock, time.wait)
    numbers.append(progress.add_task(**task))
    progress._heartbeat._run()  # as the thread does
    return lines


def test_a_line_every_ten_seconds() -> None:
    def train(progress: Any, task: int, seconds: float) -> None:
        progress.update(task, completed=30 * int(seconds), figures="squared error 0.61")

    lines = lines_of(train, 49, description="MAML        ", total=5000)
    assert lines == [
        "MAML 300/5000, squared error 0.61, 0:10 elapsed, 2:37 left",
        "MAML 600/5000, squared error 0.61, 0:20 elapsed, 2:27 left",
        "MAML 900/5000, squared error 0.61, 0:30 elapsed, 2:17 left",
        "MAML 1200/5000, squared error 0.61, 0:40 elapsed, 2:07 left",
    ]


def test_the_end_is_said_once_and_nothing_after_it() -> None:
    def finish(progress: Any, task: int, seconds: float) -> None:
        progress.update(task, advance=1, figures="loss 0.5  accuracy 60.0 %")

    lines = lines_of(finish, 60, description="jobs", total=2)
    assert lines == [
        "jobs 1/2, loss 0.5, accuracy 60.0 %, 0:10 elapsed, 0:10 left",
        "jobs 2/2, loss 0.5, accuracy 60.0 %, 0:20 elapsed",
    ]


def test_what_was_done_before_the_run_was_resumed_says_nothing_of_its_speed() -> None:
    advance = lambda progress, task, _: progress.advance(task, 10)  # noqa: E731
    lines = lines_of(advance, 10, description="a", total=1000, completed=970)
    assert lines == ["a 980/1000, 0:10 elapsed, 0:20 left"]
    idle = lambda *_: None  # noqa: E731
    lines = lines_of(idle, 20, description="a", total=9)
    assert lines == ["a 0/9, 0:10 elapsed", "a 0/9, 0:20 elapsed"]


def test_hours() -> None:
    lines = lines_of(lambda p, t, s: p.update(t, completed=s), 20, description="a", total=7200)
    assert lines[-1] == "a 20/7200, 0:20 elapsed, 1:59:40 left"


def test_the_thread_prints_while_the_program_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    from common import progress

    monkeypatch.setattr(progress, "EVERY", 0.001)
    lines: list[str] = []
    heard = progress.threading.Event()

    def show(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            heard.set()

    with progress.said_in_lines("testing", show):
        assert heard.wait(60)
    assert lines[:2] == ["testing", "testing, 0:00 elapsed"]
    count = len(lines)
    assert progress.threading.active_count() == 1 or count == len(lines)


@pytest.fixture(name="piped")
def piped_fixture(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Let the examples print into a file, whatever the tests do."""
    from common.reporting import console

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    file = io.StringIO()
    monkeypatch.setattr(console, "_file", file)
    return file


def test_long_lines_stay_whole(piped: io.StringIO) -> None:
    from common.reporting import console, print_claims, results_table

    measured = ", ".join(f"{k} steps: {k / 7:.10f} MiB" for k in range(20)) + " [a, b] [bold]"
    print_claims([{"claim": "c" * 130, "measured": measured, "holds": True}])
    console.print("word " * 50)
    console.print(results_table("title", [("learner " * 8, "50 ± 1 %", "how " * 10)] * 2))
    lines = piped.getvalue().splitlines()
    assert lines[:2] == [f"holds: {'c' * 130}", f"  {measured}"]
    assert lines[2].split() == ["word"] * 50
    assert sum("how " * 10 in line and "learner " * 8 in line for line in lines) == 2


def test_verdicts(piped: io.StringIO) -> None:
    from common.reporting import print_claims

    claims = [{"claim": "a", "measured": "b", "holds": holds} for holds in (True, False, None)]
    assert print_claims(claims) == claims
    assert piped.getvalue().splitlines()[::2] == [
        "holds: a",
        "does not hold: a",
        "too small to judge: a",
    ]
    assert [claim["holds"] for claim in print_claims(claims, quick=True)] == [None] * 3
    assert claims[0]["holds"]
    assert "its figures mean nothing" in piped.getvalue().splitlines()[-1]


def test_bars_and_states_become_lines(piped: io.StringIO) -> None:
    from common.reporting import console, progress_bar

    with progress_bar() as bar:
        task = bar.add_task("training", total=2, figures="")
        bar.advance(task)
        bar.update(task, completed=2, description="trained", figures="loss 1")
    with console.status("testing"):
        pass
    assert piped.getvalue().splitlines() == ["trained 2/2, loss 1, 0:00 elapsed", "testing"]


def test_a_terminal_has_bars_and_its_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.reporting import ExampleConsole, console, progress_bar
    from rich.progress import Progress

    monkeypatch.setenv("COLUMNS", "93")
    assert ExampleConsole(force_terminal=True, file=io.StringIO()).width == 93
    assert ExampleConsole(file=io.StringIO()).width == 1000
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress_bar(), Progress)
    monkeypatch.setenv("TERM", "dumb")
    assert not isinstance(progress_bar(), Progress)
