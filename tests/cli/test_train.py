"""The command train; the loop itself has tests of its own."""

import itertools
import signal
import subprocess
import sys

import pytest

from dyninf.cli import main, train
from dyninf.configs.training import TINY, TINY_RECIPE
from dyninf.training import checkpoints


def test_changes_reach_model_and_recipe():
    changes = ["model.num_layers=5", "recipe.learning_rate=1e-4", "recipe.compute_dtype=bfloat16"]
    model, recipe = train.configure("tiny", changes)
    assert (model.num_layers, model.d_model) == (5, TINY.d_model)
    assert (recipe.learning_rate, recipe.compute_dtype, recipe.steps) == (1e-4, "bfloat16", TINY_RECIPE.steps)


@pytest.mark.parametrize("change", ["recipe.stepz=1", "steps=1", "recipe.steps=a", "recipe.steps=0", "model.d_ff"])
def test_a_wrong_change_is_refused(change):
    with pytest.raises(ValueError, match="expected"):
        train.configure("tiny", [change])


def test_the_command_prepares_trains_and_names_the_model(monkeypatch, folder, tmp_path, capsys):
    calls = []

    def prepare(folders, run, *, vocab_size, report, suffixes, init):
        calls.append((folders, run, vocab_size, suffixes, init))
        report({"event": "collected", "documents": 3})

    def loop(config, recipe, run, *, report, init, mesh):
        calls.append((config.vocab_size, recipe.steps, init, dict(mesh.shape)))
        report({"event": "resumed", "step": 5})
        report({"event": "step", "step": 10, "loss": 4.25, "tokens_per_second": 77})
        report({"event": "eval", "step": 10, "exit_losses": [5.5, 4.5]})
        return run / "model"

    monkeypatch.setattr(train, "prepare", prepare)
    monkeypatch.setattr(train, "train", loop)
    arguments = ["src", "--run", str(tmp_path), "--set", "recipe.steps=40", "--set", "model.vocab_size=300"]
    arguments += ["--set", "recipe.length=64"]
    assert main(["train", *arguments, "--from", folder, "--mesh", "fsdp=2,data=1"]) == 0
    assert calls == [(["src"], tmp_path, 300, (".py",), folder), (300, 40, folder, {"data": 1, "fsdp": 2})]
    shown = capsys.readouterr()
    assert f"dyninf generate --model {tmp_path / 'model'}" in shown.out
    assert shown.err.splitlines() == [
        "collected: documents 3",
        "resumed: step 5",
        "step 10: loss 4.2500, 77 tokens/s",
        "step 10: held-out loss by exit layer: 5.500 4.500",
    ]


@pytest.mark.parametrize(
    ("kind", "command"), [("soft", "generate --model {}/model"), ("jei", "compare --model {0}/model --plans dense,{0}")]
)
def test_a_recipe_reaches_the_loop_and_says_what_to_do_next(kind, command, monkeypatch, folder, tmp_path, capsys):
    kinds = []
    monkeypatch.setattr(train, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(train, "train", lambda _, recipe, run, **__: kinds.append(recipe.kind) or run / "model")
    changes = ["--set", "recipe.length=64", "--set", "recipe.exit_period=2"]
    assert main(["train", "src", "--run", str(tmp_path), "--recipe", kind, "--from", folder, *changes]) == 0
    assert kinds == [kind]
    assert f"try: dyninf {command.format(tmp_path)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["EMPTY"], "expected text files ending in ('.py',)"),
        (["EMPTY", "--suffix", ".md", "--suffix", ".txt"], "expected text files ending in ('.md', '.txt')"),
        (["nowhere"], "expected an existing folder"),
        (["nowhere", "--recipe", "jei", "--from", "neither"], "expected a folder or one of the shipped models"),
        (["EMPTY", "--recipe", "soft", "--set", "recipe.exit_period=9"], "up to the model's 8 layers, got 9"),
        (["EMPTY", "--recipe", "frozen"], "expected a trained model to put exits on for the recipe 'frozen', got none"),
        (["EMPTY", "--set", "recipe.steps=9"], "expected warmup to be a whole number below steps=9, got 30"),
        (["EMPTY", "--set", "recipe.length=513"], "expected recipe.length at most model.max_length=512, got 513"),
        (["EMPTY", "--from", "MODEL", "--set", "recipe.length=97"], "max_length=96, got 97; set it"),
        (
            ["EMPTY", "--recipe", "jei", "--from", "MODEL", "--set", "recipe.length=64"],
            "exit_period below the model's 4 layers, got 4",
        ),
        (["EMPTY", "--from", "BEGUN"], "got the run directory"),
        (["EMPTY", "--run", "FILE"], "expected a folder for --run, got the file"),
        (["EMPTY", "--set", "recipe.exit_curriculum=spiral"], "expected exit_curriculum among rotational, gradual"),
        (["EMPTY", "--mesh", "tensor=2"], "expected a mesh of data and fsdp for training, got tensor; use data=N"),
        (["EMPTY", "--mesh", "data=9"], "expected a mesh of 1 to 8 devices, got data=9 = 9"),
        (["EMPTY", "--mesh", "data=3"], "expected recipe.batch_size to divide by data=3, got 8; use 9"),
        (["EMPTY", "--set", "recipe.stepz=9"], "expected PATH=VALUE with a path among model.vocab_size"),
    ],
)
def test_an_error_is_one_line_and_leaves_no_run(arguments, said, folder, tmp_path, capsys):
    places = {name: str(tmp_path / name.lower()) for name in ("EMPTY", "FILE", "BEGUN")} | {"MODEL": folder}
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "model").symlink_to(folder)
    arguments = [places.get(argument, argument) for argument in arguments]
    assert main(["train", "--run", str(tmp_path / "run"), *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("dyninf: error: ") and shown.count("\n") == 1
    assert said in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("step", "place"), [(None, "the beginning"), (30, "the checkpoint of step 30")])
def test_ctrl_c_says_where_the_run_goes_on(step, place, monkeypatch, tmp_path, capsys):
    def loop(*_, **__):
        raise KeyboardInterrupt

    if step is not None:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    monkeypatch.setattr(train, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(train, "train", loop)
    assert main(["train", "src", "--run", str(tmp_path)]) == 130
    assert capsys.readouterr().err == f"\nstopped; the same command goes on from {place}\n"


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert f"recipe.steps={TINY_RECIPE.steps}," in shown and f"model.d_ff={TINY.d_ff}, " in shown


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    for number in range(12):
        words = [f"name_{number * i * i % 97}" for i in range(90)]
        (source / f"file_{number}.py").write_text("\n".join(f"{a} = {b}" for a, b in itertools.pairwise(words)))
    tiny = "model.vocab_size=260 model.num_layers=2 model.d_model=8 model.d_ff=12 model.num_heads=1 model.head_dim=4"
    short = "recipe.steps=10000 recipe.warmup=1 recipe.batch_size=1 recipe.length=8 recipe.chunk=8 recipe.save_every=2"
    changes = [argument for change in (tiny + " " + short).split() for argument in ("--set", change)]
    # A process started under nohup ignores SIGINT, and so would its children.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from dyninf.cli import main; raise SystemExit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", program, "train", str(source), "--run", str(run), *changes],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr:
            if line == "saved: step 4\n":
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    last = checkpoints.latest(run / "checkpoints")
    assert last >= 4
    assert rest.endswith(f"\nstopped; the same command goes on from the checkpoint of step {last}\n")
    assert "Traceback" not in rest
