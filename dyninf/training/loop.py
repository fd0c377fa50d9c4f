"""The training loop: from a folder of text to a model directory, with exact resume.

A run lives in one directory: ``tokenizer.json``, the packed tokens, ``corpus.json`` (what they were made from),
``recipe.json``, ``checkpoints/`` (orbax), ``log.jsonl`` (one line per logged step) and, at the end, ``model/`` (a
Hugging Face directory that :func:`dyninf.models.load` reads), with ``exits.safetensors`` beside it where the recipe
trains exits (:func:`dyninf.training.exits_file.load_exits`). Starting the same command again goes on from the last
checkpoint and makes the same losses as a run that was never stopped, on hardware whose sums have a fixed order (CPU
and TPU have). Nothing is ever unpickled.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from dyninf.models import ModelConfig, load, load_tokenizer, save_hf, unstack_layers
from dyninf.training import checkpoints
from dyninf.training.corpus import Document, collect, deduplicate, split
from dyninf.training.data import TokenData, fingerprint, pack, train_tokenizer
from dyninf.training.exits_file import save_exits
from dyninf.training.heads import policy_of
from dyninf.training.meshes import init_state_on, put_batch, steps_on, training_placement
from dyninf.training.recipe import HEADS, Recipe
from dyninf.training.run_files import alone, open_log, refuse_changes, refuse_tasks, refuse_text, write
from dyninf.training.step import TrainState, check_exits
from dyninf.training.task_data import TaskData

HELD_OUT = (0.05, 0.1, 0.2, 0.4)  # of the files; the first that leaves some on both sides
LOG_EVERY = 10  # steps; reading a loss waits for the device
TOKENIZER_SAMPLE = 60_000_000  # characters; more changes a small vocabulary little

Report = Callable[[dict[str, Any]], None]
Data = TokenData | TaskData


def prepare(
    folders: Sequence[str | os.PathLike],
    run: str | os.PathLike,
    *,
    vocab_size: int,
    report: Report,
    suffixes: Sequence[str] = (".py",),
    init: str | None = None,
) -> None:
    """Turn folders of text into a tokenizer, training tokens and held-out tokens in the run directory.

    Near-duplicates are removed and documents are held out by file. Nothing is done again for a run that has its data;
    the folders may be gone by then.

    Args:
        vocab_size: of the tokenizer; it learns fewer entries where the text has no more to offer.
        report: called with ``{"event": "collected" | "deduplicated", "documents"}`` and ``{"event": "packed", ...}``.
        suffixes: endings of the files to read.
        init: a model that dyninf trained, by name or folder, whose tokenizer is taken instead of training one.

    Raises:
        ValueError: if the folders hold too little text, or the run's data was made from others or is that of tasks, or
            another process is at work in the run directory.
        OSError: if the run directory cannot be written.
    """
    run = Path(run)
    refuse_tasks(run)
    tokenizer = None if init is None else load_tokenizer(init)
    names = [Path(folder).resolve().name for folder in folders]
    made_from = {"corpus": {"folders": names, "suffixes": list(suffixes), "vocab_size": vocab_size, "init": init}}
    files = ("tokenizer.json", "train.tokens.json", "heldout.tokens.json", "corpus.json")
    if all((run / name).exists() for name in files):
        refuse_changes(run / "corpus.json", made_from)
        return
    documents = collect(folders, suffixes=suffixes)
    report({"event": "collected", "documents": len(documents)})
    documents = deduplicate(documents)
    report({"event": "deduplicated", "documents": len(documents)})
    for fraction in HELD_OUT:
        train, held_out = split(documents, fraction, seed=0)
        if train and held_out:
            break
    else:
        raise ValueError(
            f"expected enough files to hold some out, got {len(documents)} that differ; give more files, or split them"
        )
    tokenizer = train_tokenizer(_sample(train), vocab_size) if tokenizer is None else tokenizer
    run.mkdir(parents=True, exist_ok=True)
    with alone(run):
        (run / "corpus.json").unlink(missing_ok=True)
        write(run / "tokenizer.json", tokenizer.to_str(pretty=True))
        for name, part in (("heldout", held_out), ("train", train)):
            data = pack(part, tokenizer, run / f"{name}.tokens")
            report({"event": "packed", "split": name, "tokens": int(data.tokens.size)})
        write(run / "corpus.json", json.dumps(made_from, indent=1) + "\n")


def check_start(recipe: Recipe, init: str | None) -> None:
    """Raise ValueError if the recipe trains exits beside a model, and none is given."""
    if recipe.kind in HEADS and init is None:
        raise ValueError(
            f"expected a trained model to put exits on for the recipe {recipe.kind!r}, got none; name one: --from"
        )


def train(
    config: ModelConfig,
    recipe: Recipe,
    run: str | os.PathLike,
    *,
    report: Report,
    init: str | None = None,
    mesh: Mesh | None = None,
) -> Path:
    """Train on the data of a run directory and return the model directory.

    Args:
        config: its vocabulary is replaced by the tokenizer's.
        init: a model to go on from, by name or folder, as given to :func:`prepare`; its config replaces ``config``.
        report: called with what happens: ``{"event": "step", "step", "loss", ...}``, ``eval``, ``resumed``, ``saved``.
        mesh: of ``data`` and ``fsdp``, to split batch and weights over (:mod:`dyninf.training.meshes`); ``None`` for
            one device. A run may go on on another one.

    Raises:
        ValueError: if the run directory lacks data or holds too little, was begun with another model, recipe or data,
            holds a damaged checkpoint, is in use by another process, the recipe needs a model to go on from, the
            mesh does not fit, or the loss is no longer finite.
        OSError: if a checkpoint cannot be written; those before it are as they were.
    """
    run = Path(run)
    data, held_out, tokenizer = _open_data(run, recipe)
    about = {"tokens": int(data.tokens.size), "tokenizer": fingerprint(tokenizer)}
    vocabulary = {"vocab_size": tokenizer.get_vocab_size(), "eos_ids": (0,)}
    return _train(config, vocabulary, recipe, run, data, held_out, about, report=report, init=init, mesh=mesh)


def train_tasks(
    config: ModelConfig,
    recipe: Recipe,
    run: str | os.PathLike,
    *,
    tasks: dict[str, float],
    report: Report,
    questions: int = 1,
    init: str | None = None,
    mesh: Mesh | None = None,
) -> Path:
    """Train on token tasks (:data:`dyninf.tasks.TOKEN_TASKS`) in a run directory and return the model directory.

    Rows are drawn while training; only answers are predicted. Their lengths are between a quarter of the recipe's and
    all of it, so that a model that begins with short ones (``init``) meets them again.

    Args:
        config: its vocabulary is replaced by that of the tasks.
        tasks: weight of each task by name.
        questions: the most that are asked about one context; see :func:`dyninf.tasks.mixture`.
        init, report, mesh: as for :func:`train`.

    Raises:
        ValueError: as :func:`train`, and if a task is unknown or the length too short for it, or the run directory
            holds text.
    """
    run, data = Path(run), TaskData(tasks=tuple(tasks.items()), questions=questions)
    data.check(recipe.length)
    refuse_text(run)
    about = {"tasks": tasks, "questions": questions, "vocabulary": dataclasses.asdict(data.vocabulary)}
    vocabulary = {"vocab_size": data.vocabulary.size, "eos_ids": ()}
    return _train(config, vocabulary, recipe, run, data, data.held_out(), about, report=report, init=init, mesh=mesh)


def _train(config, vocabulary, recipe, run: Path, data, held_out, about, *, report: Report, init, mesh) -> Path:
    check_start(recipe, init)
    start = None if init is None else load(init, dtype=jnp.float32, mesh=mesh)
    config = config if start is None else start.config
    if recipe.length > config.max_length:
        raise ValueError(
            f"expected length at most the model's max_length={config.max_length}, got {recipe.length}; change one"
        )
    if start is not None and start.config.vocab_size != vocabulary["vocab_size"]:
        raise ValueError(
            f"expected a model with the vocabulary of this data, {vocabulary['vocab_size']} ids, got "
            f"{start.config.vocab_size}; go on from a model that was trained on such data"
        )
    config = dataclasses.replace(config, **vocabulary)
    where = None if mesh is None else training_placement(mesh, config, recipe)
    begun_with = {
        "model": dataclasses.asdict(config),
        "recipe": dataclasses.asdict(recipe),
        "init": {"model": init},
        "data": about,
    }
    saved = run / "checkpoints"
    check_exits(config.num_layers, recipe)
    run.mkdir(parents=True, exist_ok=True)
    with alone(run):
        if checkpoints.latest(saved) is None:  # nothing to go on from, so a begun run may still be changed
            write(run / "recipe.json", json.dumps(begun_with, indent=1) + "\n")
        refuse_changes(run / "recipe.json", begun_with)
        if isinstance(data, TaskData):
            write(run / "tokenizer.json", data.tokenizer().to_str(pretty=True))
        state = init_state_on(where, config, recipe, start)
        if state.exits is not None:
            added = _size((state.model, state.exits)) - _size(start)
            report({"event": "added", "policy": type(state.exits).__name__, "parameters": added, "to": _size(start)})
        if checkpoints.latest(saved) is not None:
            state = checkpoints.restore(saved, state)
            report({"event": "resumed", "step": int(state.step)})
        with open_log(run / "log.jsonl", int(state.step)) as log:
            state = _loop(state, data, held_out, recipe, saved, _tee(log, report), where)
    model = unstack_layers(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.model))
    save_hf(model, run / "model", tokenizer_file=run / "tokenizer.json", overwrite=True)
    if state.exits is not None:
        save_exits(policy_of(state.exits, config.num_layers, recipe), run / "exits.safetensors")
    return run / "model"


def _size(tree: Any) -> int:
    return sum(np.size(leaf) for leaf in jax.tree.leaves(tree) if np.ndim(leaf))


def _open_data(run: Path, recipe: Recipe) -> tuple[TokenData, TokenData, Tokenizer]:
    if not (run / "tokenizer.json").is_file():
        raise ValueError(f"expected the data of a run in {str(run)!r}, got none; prepare it first")
    tokenizer = load_tokenizer(run)
    parts = [TokenData.open(run / f"{name}.tokens") for name in ("train", "heldout")]
    for name, part in zip(("training", "held-out"), parts, strict=True):
        if part.tokens.size < 2 * recipe.length:
            raise ValueError(
                f"expected at least {2 * recipe.length} tokens of {name} text for length={recipe.length}, got "
                f"{part.tokens.size}; use a shorter length, or more text in another run directory"
            )
        if part.tokenizer_sha256 != fingerprint(tokenizer):
            raise ValueError(
                f"expected {name} tokens made by {str(run / 'tokenizer.json')!r}, got tokens of another tokenizer; "
                "prepare the data again in another run directory"
            )
    return *parts, tokenizer


def _loop(state: TrainState, data: Data, held_out: Data, recipe: Recipe, saved, report, where) -> TrainState:
    take_step, evaluate = steps_on(where, state)
    shape = {"batch_size": recipe.batch_size, "length": recipe.length, "seed": recipe.seed}
    logged, began = int(state.step), time.perf_counter()
    for step in range(int(state.step), recipe.steps):
        tokens, mask = put_batch(data.batch(step, **shape), where)
        state, metrics = take_step(state, tokens, recipe, mask)
        done = step + 1
        last = done == recipe.steps
        logs, saves = done % LOG_EVERY == 0 or last, done % recipe.save_every == 0 or last
        if logs or saves:
            values = {name: float(value) for name, value in metrics.items()}
            _check_finite(done, values)
        if logs:
            now = time.perf_counter()
            speed = (done - logged) * recipe.batch_size * recipe.length / (now - began)
            logged, began = done, now
            report({"event": "step", "step": done, **values, "tokens_per_second": round(speed)})
        if done % recipe.eval_every == 0 or last:
            batches = [put_batch(held_out.batch(i, **shape), where) for i in range(recipe.eval_batches)]
            losses_KL = [
                np.asarray(evaluate(state.model, tokens, recipe, mask, state.exits)) for tokens, mask in batches
            ]
            losses_L = np.mean(losses_KL, axis=0)
            report({"event": "eval", "step": done, "exit_losses": [round(float(loss), 5) for loss in losses_L]})
        if saves:
            checkpoints.save(saved, state)
            report({"event": "saved", "step": done})
    return state


def _check_finite(step: int, values: dict[str, float]) -> None:
    if not all(map(math.isfinite, values.values())):
        raise ValueError(
            f"expected a finite loss and gradient at step {step}, got {values}; start another run with a lower "
            "learning rate (the checkpoints in this one are from before)"
        )


def _tee(log, report: Report) -> Report:
    def both(event: dict[str, Any]) -> None:
        if event["event"] in ("step", "eval"):
            log.write(json.dumps(event) + "\n")
            log.flush()
        report(event)

    return both


def _sample(documents: Sequence[Document]):
    """Yield documents up to the size a tokenizer needs, spread over all of them."""
    total = sum(len(document.text) for document in documents)
    stride = max(1, -(-total // TOKENIZER_SAMPLE))
    return (document.text for document in documents[::stride])
