"""When to say nothing: how well a classifier finds the tokens that no layer gets right, and what stopping there saves.

The classifier of :class:`dyninf.depth.StopExit` is trained beside a frozen model on the training tokens of a run
directory (as ``dyninf train --recipe stop`` does), then judged on held-out text in two ways, for pairs of thresholds:

- token by token on the states of the dense model: precision and recall of its stops, where "right" means that the
  token to find is one that no layer predicts;
- on completions as in the source (SEC: Sun et al. 2024, and its released code): 10 tokens, made greedily after 128 of
  held-out text, compared with the text by ROUGE-L over tokens. The first token of a completion comes from the prompt,
  before the classifier is asked.

A token of a completion is *useful* if it and all before it are those of the text: what a user could keep.

``python bench/stops.py --run RUN --set recipe.steps=300 --jsonl FILE`` prints one JSON object a pair of thresholds.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dyninf
from dyninf.cli.bench import describe_run, write_row
from dyninf.cli.common import Loaded, add_model_options, load, model_name
from dyninf.cli.heldout import read_documents, windows_of
from dyninf.cli.train import CONFIGS, configure
from dyninf.depth import StopExit
from dyninf.training.exits_file import load_exits
from dyninf.training.loop import train
from dyninf.training.stopping import classify_stops, judge_stops

PROMPT, MADE = 128, 10  # tokens; the source's
THRESHOLDS = "1,0.9,0.8,0.7,0.6,0.5,0"


def main() -> int:
    """Train the classifier, judge it, and print a row for each pair of thresholds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--run", type=Path, required=True, help="run directory with packed tokens, in which to train")
    parser.add_argument("--heldout", help="held-out text (default: that beside the model)")
    parser.add_argument("--config", choices=tuple(CONFIGS), default="pycode-13m", help="whose recipe to train by")
    parser.add_argument("--set", metavar="PATH=VALUE", dest="changes", action="append", default=[], help="as for train")
    parser.add_argument("--window", type=int, default=512, help="tokens of a held-out window")
    parser.add_argument("--tokens", type=int, default=65536, help="held-out tokens to judge one by one")
    parser.add_argument("--completions", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64, help="windows or completions at once")
    parser.add_argument("--exit-thresholds", default="1,0.9", help="separated by commas; 1 never exits")
    parser.add_argument("--stop-thresholds", default=THRESHOLDS, help="separated by commas; 1 never stops")
    parser.add_argument("--jsonl", type=Path, help="append the rows to this file, too")
    arguments = parser.parse_args()
    if min(arguments.window, arguments.tokens, arguments.completions, arguments.batch) < 1:
        parser.error("expected --window, --tokens, --completions and --batch of at least 1")
    config, recipe = configure(arguments.config, [*arguments.changes, "recipe.kind=stop"])
    loaded = load(arguments)
    documents = read_documents(loaded, arguments.heldout)
    train(config, recipe, arguments.run, report=report, init=model_name(arguments.model))
    policy = load_exits(arguments.run / "exits.safetensors")
    judged = Judged(loaded, policy, documents, arguments)
    about = {
        "bench": "stops",
        "model": loaded.name,
        "training_tokens": recipe.steps * recipe.batch_size * recipe.length,
    }
    for exit_threshold in map(float, arguments.exit_thresholds.split(",")):
        for stop_threshold in map(float, arguments.stop_thresholds.split(",")):
            thresholds = {"exit_threshold": exit_threshold, "stop_threshold": stop_threshold}
            row = about | thresholds | judged(dataclasses.replace(policy, **thresholds)) | describe_run(loaded.model)
            write_row(row, arguments.jsonl)
    return 0


def report(event: dict[str, Any]) -> None:
    """Show an event of the training."""
    sys.stderr.write(json.dumps(event) + "\n")


class Judged:
    """What the classifiers and the layers say of the held-out text, computed once for all thresholds."""

    def __init__(self, loaded: Loaded, policy: StopExit, documents: Any, arguments: argparse.Namespace):
        windows = windows_of(loaded, documents, length=arguments.window, max_tokens=arguments.tokens)
        self._model, self._batch = loaded.model, arguments.batch
        parts = [_classified(loaded.model, policy, rows) for rows in in_batches(windows.inputs, arguments.batch)]
        count = len(windows.inputs)
        self._said = [jnp.asarray(np.concatenate(values, axis=1)[:, :count]) for values in zip(*parts, strict=True)]
        self._windows = windows
        length = PROMPT + MADE
        texts = windows_of(loaded, documents, length=length, max_tokens=length * arguments.completions)
        texts = texts.inputs[texts.lengths == length]
        self._prompts, self._texts = texts[:, :PROMPT], texts[:, PROMPT:]
        self._dense = self._complete(dyninf.Plan())

    def __call__(self, policy: StopExit) -> dict[str, Any]:
        """Return what a pair of thresholds does, token by token and on completions."""
        num_layers = len(self._model.layers)
        depths = (*policy.decision_layers(num_layers), num_layers)
        live = jnp.asarray(self._windows.live)
        judged = _judge(policy, *self._said, jnp.asarray(self._windows.targets), live, depths)
        made, lengths, layers = self._complete(dyninf.Plan(depth=policy))
        dense, _, dense_layers = self._dense
        useful, dense_useful = (useful_tokens(tokens, self._texts) for tokens in (made, dense))
        rouge = [rouge_l(row[:size], text) for row, size, text in zip(made, lengths, self._texts, strict=True)]
        kept = np.minimum(useful, lengths)
        return {
            "heldout_tokens": int(self._windows.lengths.sum()),
            **{field.name: float(getattr(judged, field.name)) for field in dataclasses.fields(judged)},
            "completions": len(made),
            "stopped_completions": float(np.mean(lengths < MADE)),
            "tokens_saved": float(1 - lengths.sum() / (MADE * len(made))),
            "layers_saved": float(1 - layers / dense_layers),
            "useful": float(kept.sum() / lengths.sum()),
            "useful_of_dense": float(dense_useful.sum() / (MADE * len(made))),
            "useful_lost": float(1 - kept.sum() / max(1, dense_useful.sum())),
            "rouge_l": float(np.mean(rouge)),
        }

    def _complete(self, plan: dyninf.Plan) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the tokens made after each prompt ``[N, MADE]``, how many, and the layers they needed in all."""
        tokens, lengths, layers = [], [], 0
        for start in range(0, len(self._prompts), self._batch):
            made = dyninf.generate(self._model, self._prompts[start : start + self._batch], plan, max_new_tokens=MADE)
            tokens.append(np.asarray(made.tokens))
            lengths.append(np.asarray(made.lengths))
            layers += int(np.sum(made.stats.needed, where=np.asarray(made.stats.active)))
        return np.concatenate(tokens), np.concatenate(lengths), layers


def in_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Return the rows in batches of one size; the last one repeats its last row."""
    return [rows[np.minimum(np.arange(start, start + size), len(rows) - 1)] for start in range(0, len(rows), size)]


def useful_tokens(tokens: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return how many leading tokens of each completion ``[N, M]`` are those of its text."""
    return np.cumprod(tokens == texts, axis=1).sum(axis=1)


def rouge_l(made: np.ndarray, text: np.ndarray) -> float:
    """Return the F-measure of the longest common subsequence of two rows of tokens."""
    best = np.zeros(len(text) + 1, int)
    for token in made:
        before, best = best, best.copy()
        for place, other in enumerate(text, start=1):
            best[place] = before[place - 1] + 1 if token == other else max(before[place], best[place - 1])
    return float(2 * best[-1] / (len(made) + len(text)))


_classified = jax.jit(classify_stops)
_judge = jax.jit(judge_stops, static_argnums=5)


if __name__ == "__main__":
    sys.exit(main())
