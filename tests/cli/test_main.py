"""The entry point: versions, help, and one line for every error that a user can cause."""

import subprocess
import sys

import pytest

import dyninf
from dyninf.cli import COMMANDS, doctor, main


def test_python_m_dyninf_says_its_version():
    result = subprocess.run([sys.executable, "-m", "dyninf", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"dyninf {dyninf.__version__}\n"


@pytest.mark.parametrize("command", [module.__name__.rpartition(".")[2] for module in COMMANDS])
def test_every_command_has_help_with_an_example(command, capsys):
    name = {"evaluate": "eval"}.get(command, command)
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"dyninf {name}" in capsys.readouterr().out.partition("example")[2]


def test_without_a_command_help_is_shown(capsys):
    assert main([]) == 2
    assert "dyninf generate --prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bogus"], "invalid choice: 'bogus'"),
        (["generate", "--prompt", "x", "--model", "nowhere"], "nowhere"),
        (["generate", "--prompt", "", "--model", "MODEL"], "at least one token"),
        (["generate", "--file", "nowhere.txt", "--model", "MODEL"], "nowhere.txt"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--plan", "fast"], "expected a plan among dense, exit_half"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--set", "depth.treshold=1"], "depth.threshold=0.9"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--set", "depth.threshold=1.5"], "between 0 and 1"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--set", "depth.threshold=x"], "expected a number"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--max-new-tokens", "96"], "context of 96"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--max-new-tokens", "0"], "--max-new-tokens of at least 1"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--top-p", "2"], "between 0 and 1"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--stop", ""], "empty"),
        (["compare", "--model", "MODEL", "--data", "nowhere"], "nowhere"),
        (["compare", "--model", "MODEL", "--plans", "dense,,exit_half"], "joined by commas"),
        (["compare", "--model", "MODEL", "--json", "no/such/folder/file.json"], "folder that exists"),
        (["eval", "--model", "MODEL", "--set", "depth.patience=1"], "--plan"),
        (["bench", "--shape", "huge"], "expected a shape among tiny"),
        (["bench", "--shape", "llama-8b"], "got 'llama-8b'; did you mean llama3-8b?"),
        (["generate", "--prompt", "x", "--model", "MODEL", "--plan", "exit_hlf"], "did you mean exit_half?"),
        (["bench", "--shape", "tiny", "--context", "32"], "--context above --steps"),
        (["plans", "--layers", "2"], "at least 4 layers"),
    ],
    ids=lambda value: "-".join(value)[:60] if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_status_2(arguments, said, folder, capsys):
    arguments = [folder if argument == "MODEL" else argument for argument in arguments]
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    shown = capsys.readouterr().err
    assert status == 2
    assert shown.startswith("dyninf: error: ") and shown.count("\n") == 1
    assert said in shown


def test_debug_shows_where_an_error_was_raised():
    with pytest.raises(ValueError, match="at least 4 layers"):
        main(["plans", "--layers", "2", "--debug"])


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "\n"


def test_a_missing_shipped_model_is_said(monkeypatch, capsys):
    monkeypatch.setattr("dyninf.models.available", lambda: ())
    assert main(["generate", "--prompt", "x"]) == 2
    assert "--model" in capsys.readouterr().err
