"""The training loop: from a folder of text to a model directory, with exact resume.

A run lives in one directory: ``tokenizer.json``, the packed tokens, ``checkpoints/`` (orbax), ``log.jsonl`` (one line
per logged step) and, at the end, ``model/`` (a Hugging Face directory that :func:`dyninf.models.load` reads). Starting
the same command again goes on from the last checkpoint and makes the same losses as a run that was never stopped.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tokenizers import Tokenizer

from dyninf.models import ModelConfig, save_hf, unstack_layers
from dyninf.training.corpus import Document, collect, deduplicate, split
from dyninf.training.data import TokenData, pack, train_tokenizer
from dyninf.training.recipe import Recipe
from dyninf.training.step import TrainState, eval_step, init_state, train_step

HELD_OUT = 0.05  # of the files
TOKENIZER_SAMPLE = 60_000_000  # characters; more changes a small vocabulary little

Report = Callable[[dict[str, Any]], None]


def prepare(folders: Sequence[str | os.PathLike], run: str | os.PathLike, *, vocab_size: int, report: Report) -> None:
    """Turn folders of text into a tokenizer, training tokens and held-out tokens in the run directory.

    Near-duplicates are removed and documents are held out by file. Nothing is done again for a run that has its data.

    Raises:
        ValueError: if the folders hold no text.
    """
    run = Path(run)
    if all((run / name).exists() for name in ("tokenizer.json", "train.tokens.json", "heldout.tokens.json")):
        return
    run.mkdir(parents=True, exist_ok=True)
    documents = collect(folders)
    report({"event": "collected", "documents": len(documents)})
    documents = deduplicate(documents)
    report({"event": "deduplicated", "documents": len(documents)})
    train, held_out = split(documents, HELD_OUT, seed=0)
    if not train or not held_out:
        raise ValueError(
            f"expected enough files to hold some out, got {len(train)} for training and {len(held_out)} held out; "
            "give more files"
        )
    tokenizer = train_tokenizer(_sample(train), vocab_size)
    tokenizer.save(str(run / "tokenizer.json"))
    for name, part in (("heldout", held_out), ("train", train)):
        data = pack(part, tokenizer, run / f"{name}.tokens")
        report({"event": "packed", "split": name, "tokens": int(data.tokens.size)})


def train(config: ModelConfig, recipe: Recipe, run: str | os.PathLike, *, report: Report) -> Path:
    """Train on the data of a run directory and return the model directory.

    Args:
        config: its vocabulary is replaced by the tokenizer's.
        report: called with what happens: ``{"event": "step", "step", "loss", ...}``, ``eval``, ``resumed``, ``saved``.

    Raises:
        ValueError: if the run directory lacks data, or was begun with another model or recipe.
    """
    run = Path(run)
    data, held_out = TokenData.open(run / "train.tokens"), TokenData.open(run / "heldout.tokens")
    for part in (data, held_out):
        part.num_windows(recipe.length)  # refuses text too short for one sequence before any work
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    config = dataclasses.replace(config, vocab_size=tokenizer.get_vocab_size(), eos_ids=(0,))
    _pin(run / "recipe.json", {"model": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe)})
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager((run / "checkpoints").absolute(), options=options) as manager:
        state = _restore(manager, init_state(config, recipe), report)
        log = _open_log(run / "log.jsonl", int(state.step))
        with log:
            state = _loop(state, data, held_out, recipe, manager, _tee(log, report))
    model = unstack_layers(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.model))
    save_hf(model, run / "model", tokenizer_file=run / "tokenizer.json", overwrite=True)
    return run / "model"


def _loop(state: TrainState, data: TokenData, held_out: TokenData, recipe: Recipe, manager, report) -> TrainState:
    shape = {"batch_size": recipe.batch_size, "length": recipe.length, "seed": recipe.seed}
    first, began = int(state.step), time.perf_counter()
    for step in range(first, recipe.steps):
        state, metrics = train_step(state, jnp.asarray(data.batch(step, **shape)), recipe)
        done = step + 1
        if done % 10 == 0 or done == recipe.steps:
            values = {name: float(value) for name, value in metrics.items()}
            speed = (done - first) * recipe.batch_size * recipe.length / (time.perf_counter() - began)
            report({"event": "step", "step": done, **values, "tokens_per_second": round(speed)})
        if done % recipe.eval_every == 0 or done == recipe.steps:
            batches = [jnp.asarray(held_out.batch(i, **shape)) for i in range(recipe.eval_batches)]
            losses_L = np.mean([np.asarray(eval_step(state.model, batch, recipe)) for batch in batches], axis=0)
            report({"event": "eval", "step": done, "exit_losses": [round(float(loss), 5) for loss in losses_L]})
        if done % recipe.save_every == 0 or done == recipe.steps:
            _save(manager, done, state)
            report({"event": "saved", "step": done})
    return state


def _save(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    try:
        manager.save(step, args=ocp.args.StandardSave(_arrays(state)))
        manager.wait_until_finished()
    except Exception as error:
        raise OSError(
            f"could not write the checkpoint of step {step} ({error}); free disk space and start the same command "
            "again: it goes on from the last complete checkpoint"
        ) from error


def _restore(manager: ocp.CheckpointManager, state: TrainState, report: Report) -> TrainState:
    step = manager.latest_step()
    if step is None:
        return state
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(state))
    arrays = manager.restore(step, args=ocp.args.StandardRestore(abstract))
    report({"event": "resumed", "step": step})
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, [arrays[_name(number)] for number in range(len(leaves))])


def _arrays(state: TrainState) -> dict[str, jax.Array]:
    """Return the leaves under plain names, so that a checkpoint does not depend on how classes are laid out."""
    return {_name(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}


def _name(number: int) -> str:
    return f"leaf_{number:04d}"


def _pin(path: Path, description: dict[str, Any]) -> None:
    """Refuse to go on with a run that was begun differently."""
    description = json.loads(json.dumps(description))
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(
            f"{part}.{key}: {begun.get(part, {}).get(key)!r} -> {value!r}"
            for part, fields in description.items()
            for key, value in fields.items()
            if begun.get(part, {}).get(key) != value
        )
        if changed:
            raise ValueError(
                f"expected the model and recipe that {str(path.parent)!r} was begun with, got {'; '.join(changed)}; "
                "use another run directory"
            )
        return
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _open_log(path: Path, step: int):
    """Open the log for appending, without the lines of steps that will be made again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # a line that a kill cut short
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
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
