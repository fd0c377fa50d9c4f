"""The three studies of ``bench/budgets.py``: each makes its texts once and returns what measures a plan on them."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dyninf
from bench.attention_mass import attended, most_attended
from dyninf.cli.common import Loaded
from dyninf.cli.heldout import FILE, Windows, read_documents, windows_of
from dyninf.cli.task_eval import make
from dyninf.tasks import Sample, evaluate_task

TASKS = ("needle", "multikey_all", "multivalue", "multiquery")
Measure = Callable[..., dict[str, Any]]


def prepare_tasks(loaded: Loaded, arguments: argparse.Namespace) -> Measure:
    """Return what answers the tasks: the share of answers that are right token for token, and the mean score."""
    samples = task_samples(loaded, arguments)

    def measure(plan: dyninf.Plan, *, query: str, best: None) -> dict[str, Any]:
        stop = loaded.model.config.eos_ids
        options = {"query": query, "batch_size": arguments.batch, "stop": stop}
        # All tasks at once have the shapes of the longest, and share a program.
        results = evaluate_task(loaded.model, plan, samples, **options).results
        return {
            name: {task: _mean(getattr(result, name) for result in results if result.task == task) for task in TASKS}
            for name in ("exact", "score")
        }

    return measure


def prepare_nll(loaded: Loaded, arguments: argparse.Namespace) -> Measure:
    """Return what predicts the second half of windows: nats a token, bits a byte and the share of right tokens."""
    if arguments.length < 2:
        raise ValueError(f"expected --length of at least 2 for halves of a window, got {arguments.length}")
    windows = text_windows(loaded, arguments)
    half = arguments.length // 2

    def measure(plan: dyninf.Plan, *, query: None, best: None) -> dict[str, Any]:
        parts = [
            jax.device_get(_second_half(loaded.model, plan, windows.inputs[rows], windows.targets[rows], half=half))
            for rows in _batches(len(windows.inputs), arguments.batch)
        ]
        nll, right = (np.concatenate(part)[: len(windows.inputs)] for part in zip(*parts, strict=True))
        bits = nll.sum(dtype=np.float64) / np.log(2)
        return {
            "nll": round(float(nll.mean(dtype=np.float64)), 5),
            "bits_per_byte": round(float(bits / windows.num_bytes[:, half:].sum()), 5),
            "accuracy": round(float(right.mean()), 5),
            "tokens": int(nll.size),
        }

    return measure


def prepare_mass(loaded: Loaded, arguments: argparse.Namespace) -> Measure:
    """Return what judges attention: recall, error and tokens read, means over layers, heads and texts.

    Texts are windows where held-out text lies beside the model, else prompts of the tasks, whose last token asks.
    """
    if arguments.length < 2:
        raise ValueError(f"expected --length of at least 2 for a prompt and a token, got {arguments.length}")
    if (loaded.folder / FILE).is_file():
        windows = text_windows(loaded, arguments)
        tokens, lengths = windows.inputs, windows.lengths
    else:
        prompts = [sample.prompt_ids for sample in task_samples(loaded, arguments)]
        tokens = np.zeros((len(prompts), arguments.length), np.int32)
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt

    def measure(plan: dyninf.Plan, *, query: None, best: int | None) -> dict[str, Any]:
        parts = []
        for rows in _batches(len(tokens), arguments.batch):
            judge = attended if best is None else most_attended
            found = judge(loaded.model, tokens[rows], lengths[rows], plan if best is None else best)
            parts.append(jax.device_get((found.recall, found.error, found.tokens)))
        whole = [np.concatenate(part, axis=1)[:, : len(tokens)] for part in zip(*parts, strict=True)]
        recall, error, read = (round(float(part.mean(dtype=np.float64)), 6) for part in whole)
        recall = None if np.isnan(recall) else recall
        return {"recall": recall, "error": error, "tokens_read": read, "texts": len(tokens)}

    return measure


def task_samples(loaded: Loaded, arguments: argparse.Namespace) -> list[Sample]:
    """Return the samples of every task, one task after the other."""
    return [sample for task in TASKS for sample in make(loaded, task, arguments.length, arguments)]


def text_windows(loaded: Loaded, arguments: argparse.Namespace) -> Windows:
    """Return whole windows of the held-out text beside the model, spread over it.

    Raises:
        ValueError: if the text has not as many.
    """
    length, wanted = arguments.length, arguments.samples
    windows = windows_of(loaded, read_documents(loaded, None), length=length, max_tokens=wanted * length)
    whole = windows.lengths == length
    if whole.sum() < wanted:
        raise ValueError(f"expected --samples up to {whole.sum()}, the windows of {length} tokens, got {wanted}")
    return Windows(
        inputs=windows.inputs[whole],
        targets=windows.targets[whole],
        lengths=windows.lengths[whole],
        num_bytes=windows.num_bytes[whole],
    )


@functools.partial(jax.jit, static_argnames=("half",))
def _second_half(model, plan, tokens_BT, targets_BT, *, half):
    """Return what the tokens from ``half`` on predict: negative log-likelihoods, and whether they are right."""
    prompts_B = jnp.full(len(tokens_BT), half)
    # Only the states are used: the compiler drops the logits of the whole text.
    states_BTD = dyninf.forward(model, tokens_BT, plan, prompt_lengths=prompts_B).states[:, half:]
    logits_BTV = model.unembed(states_BTD).astype(jnp.float32)
    targets_BT = targets_BT[:, half:]
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=-1)[:, :, 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT, jnp.argmax(logits_BTV, axis=-1) == targets_BT


def _mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 5)


def _batches(count: int, size: int) -> list[np.ndarray]:
    """Return the rows of each batch, all of one size: the last one repeats its last row."""
    size = min(size, count)
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]
