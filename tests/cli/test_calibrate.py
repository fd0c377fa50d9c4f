"""``dyninf calibrate``: a budget, a guarantee, the file and the plan that is read from it, and what is refused."""

import json

import jax
import numpy as np
import pytest

import dyninf
from dyninf.cli import main
from dyninf.cli.calibrated import read_calibrated
from dyninf.cli.plan_options import read_plan
from dyninf.depth import ExitAt, FirstOf, Saturation


def test_a_budget_is_written_and_read_back(folder, loaded, tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = ["--model", folder, "--tokens", "0", "--mean", "0.6", "--peak", "3", "--rule", "saturation"]
    assert main(["calibrate", *arguments, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["layers"] == [1, 2] and written["peak"] == 3 and written["num_layers"] == 4
    assert abs(sum(written["shares"]) - 1) < 1e-9 and 1 <= written["held_out_layers"] <= 3
    plan = read_calibrated(file)
    dyninf.check(plan, loaded[0])
    exits, cap = plan.depth.policies
    assert isinstance(plan.depth, FirstOf) and cap == ExitAt(layer=3) and exits.policy == Saturation(threshold=1.0)
    np.testing.assert_array_equal(exits.thresholds, np.float32([t for t in written["thresholds"] if t is not None]))
    assert jax.tree.all(jax.tree.map(np.array_equal, read_plan(str(file), [], 4), plan))
    out = capsys.readouterr().out
    assert "all left" in out and f"{written['held_out_layers']:.2f} of 4 layers" in out


def test_a_guarantee_out_of_reach_is_said(folder, tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = ["--model", folder, "--tokens", "0", "--guarantee", "0.03", "--delta", "0.1", "--exits", "2,3"]
    assert main(["calibrate", *arguments, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["epsilon"] == 0.03 and written["peak"] == 4 and written["fill"] == "catch_up"
    assert ("guaranteed: " if written["reached"] else "not reached") in capsys.readouterr().out
    assert read_calibrated(file).fill == "catch_up"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of the arguments --mean --guarantee is required"),
        (["--mean", "0.5", "--guarantee", "0.1"], "not allowed with"),
        (["--mean", "0.1"], "between the first exit and the peak (1 to 4)"),
        (["--mean", "1.5"], "above 0 and up to 1, got 1.5"),
        (["--mean", "0.5", "--peak", "9"], "expected the peak to be an exit"),
        (["--mean", "0.5", "--memory", "10"], "for the 1 layers of the first exit"),
        (["--guarantee", "0.1", "--memory", "10"], "--memory beside --mean"),
        (["--mean", "0.5", "--exits", "2;3"], "layers joined by commas"),
        (["--mean", "0.5", "--tokens", "50"], "at least two windows"),
        (["--mean", "0.5", "--tokens", "-1"], "--tokens of at least 1"),
        (["--guarantee", "0.001"], "at least 2995 samples"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_status_2(arguments, said, folder, capsys):
    defaults = [] if "--tokens" in arguments else ["--tokens", "0"]
    try:
        status = main(["calibrate", "--model", folder, *defaults, *arguments])
    except SystemExit as stopped:
        status = stopped.code
    shown = capsys.readouterr().err
    assert status == 2 and said in shown and shown.count("\n") == 1


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "other.json"
    for text in ("{}", "[1]", "not json", '{"layers": 3}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="a file of 'dyninf calibrate --json'") as refused:
            read_calibrated(file)
        assert ("no field 'layers'" in str(refused.value)) == (text == "{}")
