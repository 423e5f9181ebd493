"""The benchmarks' harness: how it takes ratios, measures in processes of their own, and reports."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import __main__ as command
from benchmarks import (
    adam_step,
    claims,
    gpu,
    machine,
    memory,
    pairing,
    picture,
    profile,
    registry,
    report,
    runner,
)
from benchmarks.meta_step import MLP
from benchmarks.rows import Row


ROOT = Path(__file__).parents[1]
TINY = dataclasses.replace(MLP, options={"network": "tiny", "tasks": 1})
ONCE = runner.Effort(rounds=2, restarts=1, warmup=0, threads=1)
GHOST = pairing.Side("higher", "floor", Path("/nonexistent/python"))


def test_a_ratio_does_not_see_the_machine_drift():
    speed = [[1.0, 3.0, 2.0], [8.0, 5.0, 6.0]]
    ratio = pairing.ratio_of_medians([[0.5 * s for s in part] for part in speed], speed)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_ratio_is_of_medians_times_its_factor():
    ratio = pairing.ratio_of_medians([[1.0, 2.0, 30.0]], [[4.0, 4.0, 4.0]], factor=3.0)
    assert ratio.value == pytest.approx(1.5)
    assert ratio.low == pytest.approx(0.75)
    assert ratio.high == pytest.approx(22.5)


def test_restarts_that_disagree_widen_the_interval():
    own = [[1.0] * 20, [2.0] * 20]
    ratio = pairing.ratio_of_medians(own, [[1.0] * 20, [1.0] * 20])
    assert (ratio.low, ratio.high) == (1.0, 2.0)


def test_sides_are_compared_and_timed_in_processes_of_their_own():
    sides = [registry.SIDES[name] for name in ("torchopt", "torchopt unfused", "floor")]
    figures = runner.measure(TINY, sides, ONCE)
    assert list(figures) == ["torchopt", "torchopt unfused", "floor"]
    for of_side in figures.values():
        for clock in pairing.CLOCKS:
            assert [len(restart) for restart in of_side[clock]["seconds"]] == [2]
            assert of_side[clock]["median_ms"] > 0
    differences = figures["torchopt unfused"]["relative_difference"]
    assert list(differences) == list(TINY.checks)
    assert differences["float64"] < 1e-12
    assert "relative_difference" not in figures["floor"]
    row = report.result_of(Row("tiny", TINY, "torchopt", "floor", 1e6, at_most=True), figures)
    assert row["wall"]["met"]
    assert row["wall"]["low"] <= row["wall"]["value"] <= row["wall"]["high"]


def test_a_limit_has_neither_target_nor_verdict():
    seconds = {"wall": {"seconds": [[2.0, 2.0]]}, "cpu": {"seconds": [[2.0, 2.0]]}}
    row = report.result_of(Row("tiny", TINY, "floor", "floor", None), {"floor": seconds})
    assert row["wall"]["value"] == 1.0
    assert row["wall"]["met"] is None
    line = report.table([row], "wall").splitlines()[-1]
    assert line.endswith("limit")


def test_a_profile_tells_where_the_time_goes(capsys):
    found = profile.profile(profile.prepared(TINY, "torchopt"), 2)
    milliseconds = [own for _, _, own in found]
    assert milliseconds == sorted(milliseconds, reverse=True)
    names = {name.partition(" ")[2] or name for name, _, _ in found}
    assert {"step", "differentiate"} < names
    (steps,) = [
        count
        for name, count, _ in found
        if name.startswith("torchopt/optim/meta_optimizer.py") and name.endswith(" step")
    ]
    assert steps == 5  # of one task
    profile.main(["adam-small", "--calls", "2", "--lines", "3", "--threads", "1"])
    head, faults, _, *lines = capsys.readouterr().out.splitlines()
    assert "Adam.step" in head
    assert faults.endswith(" page faults")
    assert len(lines) == 3


def test_an_absent_peer_is_said_with_the_command_that_installs_it():
    figures = runner.measure(TINY, [GHOST], ONCE)
    row = report.result_of(Row("tiny", TINY, "higher", "higher", 2.0), figures)
    line = report.table([row], "wall").splitlines()[-1]
    assert "higher is not installed: python -m benchmarks.install_peers higher" in line
    assert line.endswith("-")


def test_a_side_that_fails_is_left_out(capfd):
    failing = pairing.Side("failing", "no_such_side", registry.HERE)
    figures = runner.measure(memory.KEPT, [failing, registry.SIDES["torchopt"]], ONCE)
    assert "fails here" in figures["failing"]["absent"]
    assert figures["torchopt"]["numbers"]["saved"][0] >= 0
    assert "no_such_side" in capfd.readouterr().err


def test_rows_on_a_gpu_say_that_there_is_none(monkeypatch):
    monkeypatch.setattr(runner, "gpu_here", lambda: False)
    sides = [registry.SIDES[name] for name in gpu.ROWS[1].sides]
    row = report.result_of(gpu.ROWS[1], runner.measure(gpu.LARGE, sides, ONCE))
    assert "no GPU here" in report.table([row], "cpu")


def test_results_that_differ_are_told_and_those_that_agree_are_not():
    differences = {"float64": 1e-15, "float32": 1e-7, "float64, as timed": float("nan")}
    figures = {"case": {"peer": {"relative_difference": differences}}}
    assert report.differing(figures) == ["case: results of peer are nan (float64, as timed)."]


def test_every_side_of_every_row_exists_and_does_the_work():
    for row in claims.ROWS:
        for name in row.sides:
            source = ROOT / "benchmarks/sides" / f"{registry.SIDES[name].module}.py"
            text = source.read_text()
            assert f"def {row.case.workload}(" in text or f"\n{row.case.workload} = " in text


@pytest.mark.parametrize("workload", sorted({row.case.workload for row in claims.ROWS}))
def test_numbers_are_made_without_torch(workload):
    script = (
        "import sys; sys.modules['torch'] = None; sys.path.append(sys.argv[1])\n"
        "import importlib; importlib.import_module('benchmarks.' + sys.argv[2])"
    )
    subprocess.run([sys.executable, "-I", "-c", script, ROOT, workload], check=True)


def test_the_command_writes_the_part_that_was_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "ROWS", memory.ROWS)
    path = tmp_path / "figures.json"
    assert command.main(["--only", "memory", "--threads", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "kept per inner step" in printed
    assert "Picture" not in printed
    written = json.loads(path.read_text())
    assert written["threads"] == 1
    assert written["rows"][0]["against"] == "torchopt"


def test_a_busy_machine_is_told():
    assert "far off" in machine.busy({"load_average": [1.9, 0.0, 0.0]})
    assert machine.busy({"load_average": [0.1, 9.0, 9.0]}) == ""


def test_a_variant_gets_the_rows_of_this_library():
    options = command._parser().parse_args(
        ["--only", "adam-small", "--against", "optax", "--variant", f"trial={ROOT}"]
    )
    variants = [registry.variant(name, folder) for name, folder in options.variant]
    rows = command.chosen_rows(options, variants)
    assert [row.against for row in rows] == ["optax / torchopt", "optax / trial"]
    assert variants[0].path == str(ROOT)


def test_a_variant_is_a_folder_with_the_package_and_a_new_name(tmp_path, capsys):
    for text in (f"trial={tmp_path}", f"floor={ROOT}", str(ROOT)):
        with pytest.raises(SystemExit):
            command._parser().parse_args(["--variant", text])
    assert "another side" in capsys.readouterr().err


def test_the_picture_has_a_bar_for_each_ratio(tmp_path):
    pytest.importorskip("matplotlib")
    found = {"value": 2.0, "low": 1.5, "high": 2.5, "met": True}
    common = {"row": "work", "against": "a / b", "target": 1.8, "at_most": False}
    results = [
        {**common, "unit": "", "wall": found},
        {**common, "unit": " ms", "wall": found},
        {**common, "unit": "", "absent": "no GPU here"},
        {**common, "unit": "", "target": None, "wall": {**found, "met": None}},
    ]
    path = tmp_path / "images" / "picture.png"
    picture.draw(results, "wall", "a machine", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_copy_and_a_step_of_adam_are_related_by_the_words_they_move():
    assert gpu.ROWS[1].factor == pytest.approx(3.5)
    problem = adam_step.problem(tensors=2, shape=(3,))
    assert [p.shape for p in problem.params] == [(3,), (3,)]
