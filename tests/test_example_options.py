"""Command lines of the examples: what --help says, --quick, and what a user mistypes."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("gymnasium")
pytest.importorskip("joblib")

pytestmark = pytest.mark.usefixtures("examples_on_path")

EXAMPLES = {
    "functional": ("functional",),
    "few_shot": ("few_shot",),
    "sinusoid": ("few_shot", "--data", "sinusoid"),
    "reweight": ("reweight",),
    "hyper_cleaning": ("hyper_cleaning",),
    "imaml_few_shot": ("imaml_few_shot",),
    "maml_rl": ("maml_rl",),
    "mgrl": ("mgrl",),
    "lola": ("lola",),
    "data_attribution": ("data_attribution",),
}
CLASSES = ("few_shot", "imaml_few_shot")
DIGITS = ("reweight", "hyper_cleaning")


def main(name: str, *options: str) -> Any:
    module, *given = EXAMPLES[name]
    return importlib.import_module(module).main([*given, *options])


class SeenError(Exception):
    """Ends an example when its command line has been read."""


def read(name: str, patch: pytest.MonkeyPatch, *options: str) -> Any:
    """Return what an example's parser makes of options, and the parser."""
    from common.options import Parser

    kept: list[Any] = []
    parse_args = Parser.parse_args

    def parse_and_end(self: Any, args: Any = None, namespace: Any = None) -> Any:
        kept.extend([parse_args(self, args, namespace), self])
        raise SeenError

    with patch.context() as inner:
        inner.setattr(Parser, "parse_args", parse_and_end)
        with pytest.raises(SeenError):
            main(name, *options)
    return kept


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_says_what_each_option_means_and_is(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100000")
    with pytest.raises(SystemExit) as ended:
        main(name, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert not re.search(r"depends on|\bNone\b|\bFalse\b|SUPPRESS|\['|\[\d", text)
    _, parser = read(name, monkeypatch)
    for action in parser._actions:
        assert action.help, action.dest
        if action.nargs != 0 and action.dest not in ("root", "help"):
            (line,) = re.findall(
                rf"^  {action.option_strings[-1]} \S.*(?:\n {{20}}.*)?", text, re.M
            )
            assert "(default" in line, line


def test_help_has_the_value_for_each_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100000")
    for name, option, meaning in (
        ("few_shot", "--ways N", "classes of a task (default digits 4, omniglot 5)"),
        ("few_shot", "--channels N", "channels of each convolution (default 32)"),
        ("maml_rl", "--horizon N", "steps of a trajectory (default tabular 10, navigation 20)"),
        ("reweight", "--batch N", "images of a minibatch (default imbalance 100, flip 50)"),
        ("reweight", "--tasks {imbalance,flip} [{imbalance,flip} ...]", "imbalance: one of two "
         "digits is rare; flip: ten digits, wrong labels (default imbalance flip)"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(name, "--help")
        pattern = rf"^  {re.escape(option)}\s+{re.escape(meaning)}$"
        assert re.search(pattern, capsys.readouterr().out, re.MULTILINE), option


# --quick ------------------------------------------------------------------------------------------

QUICK = list(EXAMPLES)


@pytest.mark.parametrize("name", QUICK)
def test_quick_is_small_where_the_user_has_not_said(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, parser = read(name, monkeypatch)
    quick, _ = read(name, monkeypatch, "--quick")
    assert usual.threads == 1  # two of two busy cores were slower in every example
    for option, value in parser._quick.items():
        assert getattr(quick, option) == value
        assert getattr(usual, option, None) != value or option == "steps"
    folder = usual.output
    assert quick.output == folder.with_name(f"{folder.name}-quick")
    assert quick.overwrite
    given, _ = read(name, monkeypatch, "--quick", "--seed", "7", "--output", str(folder))
    assert given.seed == 7
    assert given.output == folder
    assert not given.overwrite  # the run that may be there is not a quick one
    assert not read(name, monkeypatch, "--quick", "--resume")[0].overwrite
    option = next(k for k, v in parser._quick.items() if type(v) is int)
    typed = read(name, monkeypatch, "--quick", f"--{option.replace('_', '-')}", "3")[0]
    assert getattr(typed, option) == 3


@pytest.mark.usefixtures("no_figures")
def test_a_quick_run_judges_nothing_and_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import reproduce

    tiny = ("--gradients", "exact", "--iterations", "2", "--exact-pairs", "1")
    folder = tmp_path / "runs" / "lola"
    results = main("lola", "--quick", *tiny, "--output", str(folder))
    assert {claim["holds"] for claim in results["claims"]} == {None}
    check_quick_output(capsys.readouterr().out, results["claims"])
    (tmp_path / "lola.py").write_text("")
    monkeypatch.setattr(reproduce, "FOLDER", tmp_path)
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    example = next(e for e in reproduce.EXAMPLES if e.name == "lola")
    with pytest.raises(ValueError, match="too small to judge"):
        reproduce.run(example, folder)
    assert not list(tmp_path.glob("*.json"))


def check_quick_output(text: str, claims: list[dict[str, Any]]) -> None:
    """Check that no claim is judged, all lines are whole, and the end says what it was."""
    lines = text.splitlines()
    assert claims
    for claim in claims:
        assert f"too small to judge: {claim['claim']}" in lines
        assert f"  {claim['measured']}" in lines
    assert any("its figures mean nothing" in line for line in lines)
    assert "does not hold" not in text
    assert "nan" not in re.findall(r"\w+", text)


@pytest.mark.thorough
@pytest.mark.parametrize("name", QUICK)
def test_a_quick_run_of_each_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(name, "--quick")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == f"{name}-quick"
    claims = json.loads((folder / "results.json").read_text())["claims"]
    check_quick_output(capsys.readouterr().out, claims)
    if name == "functional":
        main(name, "--quick")  # in the place of the one before


def test_a_single_value_has_no_interval() -> None:
    from common.command import counted, estimate
    from common.maml import Accuracy
    from torch import tensor

    one, two = estimate([3.0]), estimate([2.0, 4.0])
    assert (str(one), f"{one:.1f}") == ("3", "3.0")
    assert (str(two), f"{two:.1f}") == ("3 ± 13", "3.0 ± 12.7")
    assert (one.above(0), one.below(9)) == (None, None)
    assert (two.above(-10), two.above(0), two.below(16), two.below(15)) == (
        True,
        False,
        True,
        False,
    )
    assert str(Accuracy(tensor([50.0]))) == "50.0 %"
    assert (counted(1, "seed"), counted(2, "seed")) == ("1 seed", "2 seeds")


# Mistyped -----------------------------------------------------------------------------------------


def refused(run: Callable[[], Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a run ends with one line that says why, and exit code 2."""
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err), printed.err
    assert printed.err.count("\n") == 1


MISTYPED = {
    "--threads -1": "--threads: must be at least 1, got -1",
    "--threads two": "--threads: must be a whole number, got 'two'",
    "--seed -3": "--seed: must be at least 0, got -3",
    "--device gpu7": "--device: 'gpu7' cannot be used here: ",
    "--nonsense": "unrecognized arguments: --nonsense",
    "--output FILE": r"Cannot write to the output folder .*file: there is a file in its place\.$",
    "--output FILE/runs": "Cannot write to the output folder .*file",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_mistyped_is_said_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    for options, message in MISTYPED.items():
        given = options.replace("FILE", str(tmp_path / "file")).split()
        refused(lambda given=given: main(name, *given), message, capsys)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("name", [*CLASSES, *DIGITS])
def test_wrong_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = "omniglot" if name in CLASSES else "mnist", ("--output", str(tmp_path / "out"))
    refused(lambda: main(name, "--data", "cifar", *out), "--data: invalid choice: 'cifar'", capsys)
    refused(lambda: main(name, "--data", data, *out), f"--data {data} needs --root DIR", capsys)
    nowhere = str(tmp_path / "nowhere")
    wrong = ("--data", data, "--root", nowhere)
    refused(lambda: main(name, *wrong, *out), f"^{name}: .*nowhere", capsys)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("few_shot", "--inner-lr -0.1", "--inner-lr: must be > 0, got -0.1"),
        ("few_shot", "--ways 1", "--ways: must be at least 2, got 1"),
        ("few_shot", "--augment -1", "--augment: must be >= 0, got -1"),
        ("few_shot", "--outer-lr nan", "--outer-lr: must be finite, got nan"),
        ("sinusoid", "--ways 5", "unrecognized arguments: --ways 5"),
        ("functional", "--compared-steps 1", "--compared-steps must be at least 2"),
        ("functional", "--members 2", "4 --rates need as many --members, got 2"),
        ("reweight", "--flip-rate 1", "--flip-rate: must be strictly between 0 and 1, got 1"),
        ("reweight", "--digits 4 4", "expected two different digits"),
        ("reweight", "--digits 4 10", "--digits: must be a digit, got 10"),
        ("hyper_cleaning", "--methods guess", "--methods: invalid choice: 'guess'"),
        ("maml_rl", "--discount 2", "--discount must be at most 1, got 2"),
        ("maml_rl", "--largest-count 3", "--largest-count must be at least 20, got 3"),
        ("mgrl", "--start 1.5", "--start: must be strictly between 0 and 1, got 1.5"),
        ("lola", "--discount 0.4", "--discount: must be between 0.5 and 1, got 0.4"),
        ("data_attribution", "--every never", "--every: must be log, sqrt, revolve or a number"),
        ("data_attribution", "--device meta", "--device must be cpu"),
    ],
)
def test_values_that_cannot_be(
    name: str, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(lambda: main(name, *options.split()), message, capsys)


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("rich", ("common.reporting", "common.lola_report", "common.reweight_report")),
        ("matplotlib", ("common.reporting", "common.cleaning_report", "maml_rl", "mgrl")),
        ("gymnasium", ("maml_rl", "mgrl")),
        ("numpy", ("common.digit_data", "common.datasets", "reweight")),
    ],
)
def test_a_missing_extra_is_said_in_one_line(
    package: str,
    modules: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As it is when the example is imported, before its command line is read."""
    for module in modules:
        with monkeypatch.context() as patch:
            for name in list(sys.modules):
                if name.split(".")[0] in ("common", module):
                    patch.delitem(sys.modules, name)
                if name.split(".")[0] == package:
                    patch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
            patch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
            message = r'need.*: pip install "torchopt\[examples\]"'
            refused(lambda module=module: importlib.import_module(module), message, capsys)
            for name in [n for n in sys.modules if n.split(".")[0] in ("common", module)]:
                del sys.modules[name]
