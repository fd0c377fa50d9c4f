"""Programs that a command line names are there, or it is refused before any of them runs."""

import pytest

from bench import depth, prefill, selection


@pytest.mark.parametrize(
    ("script", "arguments", "known"),
    [
        (depth, ["--steps", "3"], "dense_list"),
        (depth, ["--study", "decisions"], "indexed_none"),
        (prefill, ["--study", "dense", "--case", "256"], "cudnn"),
        (prefill, ["--study", "policies"], "zip_vl_attend"),
        (selection, ["--study", "topk", "--case", "8x64x8"], "lax_top_k"),
        (selection, ["--study", "topk", "--case", "8x64x8", "--torch"], "torch_topk"),
    ],
)
def test_names_that_do_not_exist_are_refused(capsys, script, arguments, known):
    with pytest.raises(SystemExit):
        script.main([*arguments, "--only", f"{known},no_such_program"])
    captured = capsys.readouterr()
    assert known in captured.err and captured.err.endswith("got no_such_program\n") and not captured.out


def test_a_script_runs_what_is_named(capsys):
    assert selection.main(["--study", "topk", "--case", "8x64x8", "--layers", "1", "--only", "lax_top_k"]) == 0
    assert capsys.readouterr().out.count('"program": "lax_top_k"') == 1
