"""The training loop: from a folder of text to a model directory, with exact resume.

A run lives in one directory: ``tokenizer.json``, the packed tokens, ``corpus.json`` (what they were made from),
``recipe.json``, ``checkpoints/`` (orbax), ``log.jsonl`` (one line per logged step) and, at the end, ``model/`` (a
Hugging Face directory that :func:`dyninf.models.load` reads). Starting the same command again goes on from the last
checkpoint and makes the same losses as a run that was never stopped, on hardware whose sums have a fixed order (CPU
and TPU have). Nothing is ever unpickled.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from dyninf.models import ModelConfig, load, load_tokenizer, save_hf, unstack_layers
from dyninf.training import checkpoints
from dyninf.training.corpus import Document, collect, deduplicate, split
from dyninf.training.data import TokenData, fingerprint, pack, train_tokenizer
from dyninf.training.recipe import Recipe
from dyninf.training.step import TrainState, eval_step, init_state, train_step

HELD_OUT = (0.05, 0.1, 0.2, 0.4)  # of the files; the first that leaves some on both sides
LOG_EVERY = 10  # steps; reading a loss waits for the device
TOKENIZER_SAMPLE = 60_000_000  # characters; more changes a small vocabulary little

Report = Callable[[dict[str, Any]], None]


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
        ValueError: if the folders hold too little text, or the run's data was made from others, or another process
            is at work in the run directory.
        OSError: if the run directory cannot be written.
    """
    run = Path(run)
    names = [Path(folder).resolve().name for folder in folders]
    made_from = {"corpus": {"folders": names, "suffixes": list(suffixes), "vocab_size": vocab_size, "init": init}}
    files = ("tokenizer.json", "train.tokens.json", "heldout.tokens.json", "corpus.json")
    if all((run / name).exists() for name in files):
        _refuse_changes(run / "corpus.json", made_from)
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
    tokenizer = train_tokenizer(_sample(train), vocab_size) if init is None else load_tokenizer(init)
    run.mkdir(parents=True, exist_ok=True)
    with _alone(run):
        (run / "corpus.json").unlink(missing_ok=True)
        _write(run / "tokenizer.json", tokenizer.to_str(pretty=True))
        for name, part in (("heldout", held_out), ("train", train)):
            data = pack(part, tokenizer, run / f"{name}.tokens")
            report({"event": "packed", "split": name, "tokens": int(data.tokens.size)})
        _write(run / "corpus.json", json.dumps(made_from, indent=1) + "\n")


def train(
    config: ModelConfig, recipe: Recipe, run: str | os.PathLike, *, report: Report, init: str | None = None
) -> Path:
    """Train on the data of a run directory and return the model directory.

    Args:
        config: its vocabulary is replaced by the tokenizer's.
        init: a model to go on from, by name or folder, as given to :func:`prepare`; its config replaces ``config``.
        report: called with what happens: ``{"event": "step", "step", "loss", ...}``, ``eval``, ``resumed``, ``saved``.

    Raises:
        ValueError: if the run directory lacks data or holds too little, was begun with another model, recipe or data,
            holds a damaged checkpoint, is in use by another process, or the loss is no longer finite.
        OSError: if a checkpoint cannot be written; those before it are as they were.
    """
    run = Path(run)
    data, held_out, tokenizer = _open_data(run, recipe)
    start = None if init is None else load(init, dtype=jnp.float32)
    config = config if start is None else start.config
    if recipe.length > config.max_length:
        raise ValueError(
            f"expected length at most the model's max_length={config.max_length}, got {recipe.length}; change one"
        )
    config = dataclasses.replace(config, vocab_size=tokenizer.get_vocab_size(), eos_ids=(0,))
    begun_with = {
        "model": dataclasses.asdict(config),
        "recipe": dataclasses.asdict(recipe),
        "init": {"model": init},
        "data": {"tokens": int(data.tokens.size), "tokenizer": fingerprint(tokenizer)},
    }
    saved = run / "checkpoints"
    with _alone(run):
        if checkpoints.latest(saved) is None:  # nothing to go on from, so a begun run may still be changed
            _write(run / "recipe.json", json.dumps(begun_with, indent=1) + "\n")
        _refuse_changes(run / "recipe.json", begun_with)
        state = init_state(config, recipe, start)
        if checkpoints.latest(saved) is not None:
            state = checkpoints.restore(saved, state)
            report({"event": "resumed", "step": int(state.step)})
        with _open_log(run / "log.jsonl", int(state.step)) as log:
            state = _loop(state, data, held_out, recipe, saved, _tee(log, report))
    model = unstack_layers(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.model))
    save_hf(model, run / "model", tokenizer_file=run / "tokenizer.json", overwrite=True)
    return run / "model"


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


def _loop(state: TrainState, data: TokenData, held_out: TokenData, recipe: Recipe, saved, report) -> TrainState:
    shape = {"batch_size": recipe.batch_size, "length": recipe.length, "seed": recipe.seed}
    logged, began = int(state.step), time.perf_counter()
    for step in range(int(state.step), recipe.steps):
        state, metrics = train_step(state, jnp.asarray(data.batch(step, **shape)), recipe)
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
            batches = [jnp.asarray(held_out.batch(i, **shape)) for i in range(recipe.eval_batches)]
            losses_L = np.mean([np.asarray(eval_step(state.model, batch, recipe)) for batch in batches], axis=0)
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


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Hold the run directory; the operating system lets go of it when the process ends, however it ends."""
    with (run / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"expected no other process in {str(run)!r}, got one that is at work there; wait for it or stop it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def _refuse_changes(path: Path, description: dict[str, dict[str, Any]]) -> None:
    """Refuse to go on with a run that was begun differently."""
    try:
        begun = json.loads(path.read_bytes())
        found = {(part, key): value for part, fields in begun.items() for key, value in fields.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"expected how the run was begun in {str(path)!r}, got {type(error).__name__}; use another run directory"
        ) from error
    wanted = {
        (part, key): value
        for part, fields in json.loads(json.dumps(description)).items()
        for key, value in fields.items()
    }
    changed = [
        f"{part}.{key}: {found.get((part, key))!r} -> {wanted.get((part, key))!r}"
        for part, key in sorted(found.keys() | wanted.keys())
        if found.get((part, key)) != wanted.get((part, key))
    ]
    if changed:
        raise ValueError(
            f"expected what {str(path.parent)!r} was begun with, got {'; '.join(changed)}; use another run directory"
        )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _open_log(path: Path, step: int):
    """Open the log for appending, without the lines of steps that will be made again."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.decode("utf-8"))
        except (ValueError, KeyError, TypeError):  # a line that a kill cut short
            continue
    _write(path, "".join(line + "\n" for line in kept))
    return path.open("a", encoding="utf-8")


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
