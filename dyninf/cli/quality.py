"""What a plan predicts on held-out text, by teacher forcing: bits, accuracy and layers needed."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import dyninf
from dyninf.cli.common import bucket
from dyninf.cli.heldout import Windows
from dyninf.models import Transformer
from dyninf.models.processes import replicate

CPU_BYTES, DEVICE_BYTES = 1 << 28, 1 << 32  # room for the logits and scores of one batch


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Quality of one plan.

    Attributes:
        bits_per_byte: of the held-out text, separators included in the bits.
        accuracy: share of tokens whose most probable prediction is right.
        layers_needed: mean over the tokens that the plan decides for.
        choices: the most probable prediction at every position that is not padding ``[P]``.
    """

    bits_per_byte: float
    accuracy: float
    layers_needed: float
    choices: np.ndarray


def evaluate(
    model: Transformer, plan: dyninf.Plan, windows: Windows, *, step: Callable[[], None] = lambda: None
) -> Quality:
    """Predict every token of the windows under a plan; the first of each window counts as prompt.

    One compilation serves every threshold of a plan.

    Args:
        step: called after each batch.

    Raises:
        ValueError: if the plan does not fit the model.
    """
    dyninf.check(plan, model)
    results = []
    for rows in batches(model, windows):
        inputs, targets, lengths = windows.inputs[rows], windows.targets[rows], windows.lengths[rows]
        results.append(jax.device_get(_predict(model, plan, inputs, targets, lengths)))
        step()
    count = len(windows.lengths)
    nll, choices, needed = (np.concatenate(parts)[:count] for parts in zip(*results, strict=True))
    live = windows.live
    governed = live & (np.arange(live.shape[1]) > 0)
    return Quality(
        bits_per_byte=float(nll[live].sum(dtype=np.float64) / np.log(2) / max(1, windows.num_bytes.sum())),
        accuracy=float(np.mean(choices[live] == windows.targets[live])),
        layers_needed=float(needed[governed].mean()) if governed.any() else float(needed[live].mean()),
        choices=choices[live],
    )


def batches(model: Transformer, windows: Windows, *, copies: int = 1) -> list[np.ndarray]:
    """Return the rows of each batch ``[B]``, as many as memory allows; the last one repeats its last row.

    Args:
        copies: how many sets of logits are alive at once.
    """
    config, (count, length) = model.config, windows.inputs.shape
    room = CPU_BYTES if jax.default_backend() == "cpu" else DEVICE_BYTES
    size = max(1, min(count, room // (4 * length * (copies * config.vocab_size + config.num_heads * length))))
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]


def dense_agreement(model: Transformer, prompt: list[int], generated: list[int]) -> float:
    """Return the share of generated tokens that the dense model, fed the same text, finds most probable."""
    text = prompt + generated[:-1]
    padded = bucket(len(text), model.config.max_length)
    tokens = np.zeros((1, padded), np.int32)
    tokens[0, : len(text)] = text
    positions = len(prompt) - 1 + np.minimum(np.arange(bucket(len(generated), padded)), len(generated) - 1)
    choices = np.asarray(replicate(_dense_choices(model, tokens, np.asarray([len(text)], np.int32), positions)))
    return float(np.mean(choices[: len(generated)] == np.asarray(generated)))


@jax.jit
def _predict(model, plan, tokens_BT, targets_BT, lengths_B):
    out = dyninf.forward(model, tokens_BT, plan, lengths=lengths_B)
    log_total_BT = jax.nn.logsumexp(out.logits, axis=-1)
    nll_BT = log_total_BT - jnp.take_along_axis(out.logits, targets_BT[:, :, None], axis=-1)[:, :, 0]
    return nll_BT, jnp.argmax(out.logits, axis=-1), out.needed


@jax.jit
def _dense_choices(model, tokens_BT, lengths_B, positions_P):
    states_BPD = dyninf.layer_states(model, tokens_BT, lengths_B)[-1][:, positions_P]
    return jnp.argmax(model.unembed(states_BPD), axis=-1)[0]
