"""The command generate, against the library."""

import io
import re

import jax
import numpy as np
import pytest

import dyninf
from dyninf.cli import main
from dyninf.configs.plans import plans

PROMPT = "def add(a"
COUNT = 12


def generate(folder, capsys, *arguments):
    status = main(["generate", "--model", folder, "--max-new-tokens", str(COUNT), *arguments])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def expected(loaded, plan, key=0):
    model, tokenizer = loaded
    ids = tokenizer.encode(PROMPT).ids
    made = dyninf.generate(model, np.asarray(ids), plan, max_new_tokens=COUNT, key=jax.random.key(key), stop=[0])
    return ids, [int(token) for token in made.tokens[0] if token > 0], made


@pytest.mark.parametrize("plan", [pytest.param("dense", marks=pytest.mark.slow), "exit_half"])
def test_text_and_numbers_are_those_of_the_library(plan, folder, loaded, capsys):
    ids, tokens, made = expected(loaded, plans(4)[plan])
    status, out, err = generate(folder, capsys, "--prompt", PROMPT, "--plan", plan)
    text = loaded[1].decode(ids + tokens)
    assert status == 0
    assert out == text.rstrip("\ufffd") + "\n"  # an unfinished character is not shown
    means = dyninf.summarize(made.stats)
    assert f"{len(tokens)} tokens; " in err and "tokens/s after the first step" in err
    assert f"layers needed {means['layers_needed']:.1f}, run {means['layers_run']:.1f} of 4" in err
    assert err.count("\n") == 1


def test_a_mesh_changes_no_text(folder, capsys):
    want = generate(folder, capsys, "--prompt", PROMPT, "--plan", "exit_half")[1]
    asked = ("--prompt", PROMPT, "--plan", "exit_half", "--mesh", "tensor=2,data=2")
    assert generate(folder, capsys, *asked)[1] == want
    assert generate(folder, capsys, *asked, "--stacked")[1] == want


def test_stacked_layers_select(folder, capsys):
    asked = ["--prompt", PROMPT, "--plan", "select_quest"]
    for change in ("scorer.page_size=2", "sinks=2", "recent=2", "budget=8"):
        asked += ["--set", f"select.{change}"]
    want, got = generate(folder, capsys, *asked), generate(folder, capsys, *asked, "--stacked")
    assert got[:2] == want[:2] and got[0] == 0


def test_a_plan_that_stacked_layers_cannot_run_is_one_line(folder, capsys):
    status, _, err = generate(folder, capsys, "--prompt", PROMPT, "--plan", "select_shared", "--stacked")
    assert status != 0 and "which share=2 does not; drop --stacked" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor", "expected a mesh as NAME=SIZE,... with each of data, fsdp, sequence, tensor at most once"),
        ("tensor=16", "expected a mesh of 1 to 8 devices, got tensor=16 = 16; JAX_NUM_CPU_DEVICES=N simulates N"),
        ("tensor=4", "expected the axis 'vocab' of embedding to divide by tensor=4, got 290"),
    ],
    ids=["format", "devices", "vocabulary"],
)
def test_a_mesh_that_cannot_be_had_is_one_line(mesh, message, folder, capsys):
    status, _, err = generate(folder, capsys, "--prompt", PROMPT, "--mesh", mesh)
    assert status != 0 and message in err and err.count("\n") == 1


def test_agreement_is_that_of_a_forced_dense_model(folder, loaded, capsys):
    ids, tokens, _ = expected(loaded, plans(4)["exit_half"])
    logits = jax.jit(dyninf.forward)(loaded[0], np.asarray([ids + tokens])).logits[0]
    share = np.mean(np.argmax(logits, axis=-1)[len(ids) - 1 : -1] == np.asarray(tokens))
    assert 0 < share < 1  # else this test would not tell dense and exit apart
    err = generate(folder, capsys, "--prompt", PROMPT, "--plan", "exit_half")[2]
    assert f"agreement with dense {100 * share:.1f} %" in err
    err = generate(folder, capsys, "--prompt", PROMPT, "--plan", "dense")[2]
    assert "agreement with dense 100.0 %" in err


def test_drawn_tokens_follow_the_seed(folder, loaded, capsys):
    sampler = dyninf.chain(dyninf.Temperature(temperature=0.9), dyninf.TopK(k=40))
    ids, tokens, _ = expected(loaded, dyninf.Plan(sampler=sampler), key=3)
    arguments = ("--prompt", PROMPT, "--plan", "dense", "--temperature", "0.9", "--top-k", "40", "--seed", "3")
    _, out, err = generate(folder, capsys, *arguments)
    assert out == loaded[1].decode(ids + tokens).rstrip("\ufffd") + "\n"
    assert "not measured (tokens were drawn)" in err


def test_temperature_0_is_greedy(folder, capsys):
    greedy = generate(folder, capsys, "--prompt", PROMPT, "--plan", "dense")[1]
    assert generate(folder, capsys, "--prompt", PROMPT, "--plan", "dense", "--temperature", "0")[1] == greedy


def test_a_prompt_read_in_chunks_is_continued_alike(folder, capsys):
    sparse = ("--plan", "sparse_a_shape", "--set", "sparsity.block_size=4", "--set", "sparsity.window=2")
    sparse += ("--set", "sparsity.sinks=1")
    whole = generate(folder, capsys, "--prompt", PROMPT, *sparse)[1]
    assert generate(folder, capsys, "--prompt", PROMPT, *sparse, "--prefill-chunk", "4")[1] == whole


def test_output_ends_before_a_stop_text(folder, capsys):
    whole = generate(folder, capsys, "--prompt", PROMPT, "--plan", "dense", "--no-echo")[1]
    middle = len(whole) // 2
    stop = whole[middle : middle + 2]
    out = generate(folder, capsys, "--prompt", PROMPT, "--plan", "dense", "--no-echo", "--stop", stop)[1]
    assert out == whole[: whole.index(stop)] + "\n"


def test_the_prompt_comes_from_a_file_or_standard_input(folder, capsys, tmp_path, monkeypatch):
    wanted = generate(folder, capsys, "--prompt", PROMPT, "--plan", "dense")[1]
    (tmp_path / "prompt.py").write_text(PROMPT, encoding="utf-8")
    assert generate(folder, capsys, "--file", str(tmp_path / "prompt.py"), "--plan", "dense")[1] == wanted
    for arguments in (["--prompt", "-"], ["--file", "-"], []):
        monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
        assert generate(folder, capsys, *arguments, "--plan", "dense")[1] == wanted


@pytest.mark.parametrize("temperature", ["-1", "nan"])
def test_a_temperature_below_0_is_one_line(temperature, folder, capsys):
    status, _, err = generate(folder, capsys, "--prompt", PROMPT, "--temperature", temperature)
    assert status == 2 and "--temperature of at least 0 (greedy)" in err and err.count("\n") == 1


def test_a_file_that_is_not_text_is_refused(folder, capsys, tmp_path):
    (tmp_path / "binary").write_bytes(b"ab\xff")
    status, _, err = generate(folder, capsys, "--file", str(tmp_path / "binary"))
    assert status == 2 and "expected UTF-8 text" in err and "byte 2" in err


def test_ctrl_c_keeps_what_was_made(folder, capsys, monkeypatch):
    stream = dyninf.stream

    def interrupted(*arguments, **options):
        for number, item in enumerate(stream(*arguments, **options)):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(dyninf, "stream", interrupted)
    status, out, err = generate(folder, capsys, "--prompt", PROMPT, "--plan", "dense")
    assert status == 130
    assert out.startswith(PROMPT) and len(out) > len(PROMPT) + 1
    assert re.match(r"5 tokens \(interrupted\); .*layers needed 4.0", err)


def test_one_compilation_serves_prompts_and_thresholds(folder, capsys, monkeypatch):
    traces = []
    validate = dyninf.depth.Restricted.update

    def counting(self, state, obs):
        traces.append(obs.layer)
        return validate(self, state, obs)

    monkeypatch.setattr(dyninf.depth.Restricted, "update", counting)
    step = ("--set", "depth.step=3")  # a structure that no other test has compiled
    generate(folder, capsys, "--prompt", "x", *step, "--set", "depth.threshold=0.9")
    first = len(traces)
    generate(folder, capsys, "--prompt", "x = 1", *step, "--set", "depth.threshold=0.2")
    assert first > 0 and len(traces) == first
