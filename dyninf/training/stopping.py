"""Train and judge the three-way classifier of :class:`dyninf.depth.StopExit`: stop, exit or continue.

Labels come from the predictions of all layers of a model that can be read out early (train it with
:mod:`dyninf.training.soft` or :mod:`dyninf.training.weighted_exits` first); the model is frozen.

Source: Sun et al., "When Neural Code Completion Models Size up the Situation", 2024 (SEC), and its released code.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dyninf.depth.stopping import CONTINUE, LEAVE, STOP, StopExit
from dyninf.model import CausalLM
from dyninf.pytree import pytree
from dyninf.training.states import CHUNK, count_layers, exit_predictions, exit_states, masked_mean


@pytree()
class StopReport:
    """How a policy's decisions over a text compare with the truth; float32 scalars, 0 where nothing is to be counted.

    Attributes:
        precision: share of the stops where the last layer is wrong.
        recall: share of the tokens that the last layer gets wrong at which the policy stops before it.
        stopped: share of the tokens at which it stops.
        exited: share of the tokens that exit early without stopping.
        depth: mean number of layers that ran.
        accuracy: share of the tokens it does not stop at that are right at the depth where they ended.
        full_accuracy: share of all tokens that the last layer gets right.
        hopeless: share of all tokens that no depth gets right.
        hopeless_precision: share of the stops at these.
        hopeless_recall: share of these at which the policy stops.
    """

    precision: jax.Array
    recall: jax.Array
    stopped: jax.Array
    exited: jax.Array
    depth: jax.Array
    accuracy: jax.Array
    full_accuracy: jax.Array
    hopeless: jax.Array
    hopeless_precision: jax.Array
    hopeless_recall: jax.Array


def stop_labels(predictions_EBT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return the class of every depth but the last, int32 ``[E-1, B, T]``: 0 stop, 1 exit, 2 continue.

    Stop where no depth, the last included, predicts the target; exit from the first depth on that does; continue
    before. A depth above the first right one is labelled exit even where its own prediction is wrong, as in the source:
    the token should not have come that far. For "exit where this equals the last layer" hand over the last layer's
    predictions as targets; nothing is then labelled stop.
    """
    right_EBT = predictions_EBT == targets_BT[None]
    passed_EBT = jnp.cumsum(right_EBT, axis=0) > 0
    labels_EBT = jnp.where(passed_EBT, LEAVE, CONTINUE)
    return jnp.where(passed_EBT[-1:], labels_EBT, STOP)[:-1].astype(jnp.int32)


def three_way_loss(
    logits_KBT3: jax.Array, labels_KBT: jax.Array, mask_BT: jax.Array, *, balanced: bool = True
) -> jax.Array:
    """Return ``sum_l (l+1) CE_l / sum_l (l+1)`` over the classifiers of the exits, counted from 0.

    Balanced, each class that occurs at an exit has the same weight there: a token counts ``1 / (C n_c)`` with C such
    classes, n_c tokens of its own. Otherwise ``CE_l`` is the mean over tokens.

    Source: SEC's classifier loss; balancing the classes is this library's, since few tokens are hopeless.
    """
    mask_KBT = jnp.broadcast_to(mask_BT[None], labels_KBT.shape)
    is_class_KBT3 = (labels_KBT[..., None] == jnp.arange(3)[None, None, None]) & mask_KBT[..., None]
    count_K113 = jnp.sum(is_class_KBT3, axis=(1, 2), keepdims=True)
    if balanced:
        share_K113 = 1.0 / (jnp.maximum(count_K113, 1) * jnp.maximum(jnp.sum(count_K113 > 0, -1, keepdims=True), 1))
    else:
        share_K113 = jnp.broadcast_to(1.0 / jnp.maximum(jnp.sum(count_K113, -1, keepdims=True), 1), count_K113.shape)
    log_probs_KBT3 = jax.nn.log_softmax(logits_KBT3.astype(jnp.float32), axis=-1)
    ce_K = -jnp.sum(jnp.where(is_class_KBT3, share_K113 * log_probs_KBT3, 0.0), axis=(1, 2, 3))
    rank_K = jnp.arange(1, ce_K.shape[0] + 1, dtype=jnp.float32)
    return jnp.sum(rank_K * ce_K) / jnp.sum(rank_K)


def stop_loss(
    model: CausalLM,
    policy: StopExit,
    tokens_BT1: jax.Array,
    *,
    balanced: bool = True,
    mask_BT: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Return the loss of the policy's classifiers at all of its decision layers, and how often each is right.

    One pass of the dense model, a readout at each decision layer and the last, and gradients of the classifiers alone.

    Args:
        tokens_BT1: texts ``[B, T+1]``, right-padded.
        mask_BT: bool, True where the prediction counts; ``None`` for everywhere.
        chunk: states whose logits are held at once.

    Returns:
        The loss, a float32 scalar, and the share of tokens whose likeliest class is the label, float32 ``[K]``.

    Raises:
        ValueError: if the policy does not fit the model.
    """
    logits_KBT3, predictions_EBT = classify_stops(model, policy, tokens_BT1[:, :-1], chunk=chunk)
    labels_KBT = stop_labels(predictions_EBT, tokens_BT1[:, 1:])
    mask_BT = jnp.ones(tokens_BT1[:, 1:].shape, bool) if mask_BT is None else mask_BT
    right_KBT = (jnp.argmax(logits_KBT3, axis=-1) == labels_KBT).astype(jnp.float32)
    mask_KBT = jnp.broadcast_to(mask_BT[None], right_KBT.shape)
    loss = three_way_loss(logits_KBT3, labels_KBT, mask_BT, balanced=balanced)
    return loss, masked_mean(right_KBT, mask_KBT, axis=(1, 2))


def evaluate_stops(
    model: CausalLM,
    policy: StopExit,
    tokens_BT1: jax.Array,
    *,
    mask_BT: jax.Array | None = None,
    chunk: int = CHUNK,
) -> StopReport:
    """Return how the policy decides at every token of a text, against what the layers predict there.

    On the states of the dense model, so that decisions are judged one by one; while decoding, keys of tokens that
    exited earlier differ a little.

    Args:
        tokens_BT1: texts ``[B, T+1]``, right-padded.
        mask_BT: bool, True where the prediction counts; ``None`` for everywhere.
        chunk: states whose logits are held at once.

    Raises:
        ValueError: if the policy does not fit the model.
    """
    num_layers = count_layers(model)
    logits_KBT3, predictions_EBT = classify_stops(model, policy, tokens_BT1[:, :-1], chunk=chunk)
    mask_BT = jnp.ones(tokens_BT1[:, 1:].shape, bool) if mask_BT is None else mask_BT
    depths = (*policy.decision_layers(num_layers), num_layers)
    return judge_stops(policy, logits_KBT3, predictions_EBT, tokens_BT1[:, 1:], mask_BT, depths)


def classify_stops(
    model: CausalLM, policy: StopExit, tokens_BT: jax.Array, *, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """Return the logits of the classifiers ``[K, B, T, 3]`` and what each depth predicts ``[K+1, B, T]``.

    On the states of the dense model, through which no gradient goes.

    Raises:
        ValueError: if the policy does not fit the model.
    """
    num_layers = count_layers(model)
    policy.validate(num_layers)
    layers = policy.decision_layers(num_layers)
    states_EBTD = jax.lax.stop_gradient(exit_states(model, tokens_BT, (*layers, num_layers)))
    logits = [policy.logits(layer, x_BTD) for layer, x_BTD in zip(layers, states_EBTD[:-1], strict=True)]
    return jnp.stack(logits), exit_predictions(model, states_EBTD, chunk=chunk)


def judge_stops(
    policy: StopExit,
    logits_KBT3: jax.Array,
    predictions_EBT: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    depths: Sequence[int],
) -> StopReport:
    """Return the report of decisions by the classifiers' logits; see :func:`evaluate_stops`.

    Args:
        depths: layers run at each exit and at the end, ``[E]``.
    """
    exits_KBT, stops_KBT = policy.choose(logits_KBT3)
    decides_KBT = exits_KBT | stops_KBT
    decided_EBT = jnp.concatenate([decides_KBT, jnp.ones_like(decides_KBT[:1])])
    index_1BT = jnp.argmax(decided_EBT, axis=0)[None]
    stops_EBT = jnp.concatenate([stops_KBT, jnp.zeros_like(stops_KBT[:1])])
    stopped_BT = jnp.take_along_axis(stops_EBT, index_1BT, axis=0)[0]
    right_EBT = predictions_EBT == targets_BT[None]
    full_right_BT, hopeless_BT = right_EBT[-1], ~jnp.any(right_EBT, axis=0)
    right_BT = jnp.take_along_axis(right_EBT, index_1BT, axis=0)[0]
    early_BT = index_1BT[0] < logits_KBT3.shape[0]

    def share(values_BT: jax.Array, among_BT: jax.Array) -> jax.Array:
        return masked_mean(values_BT.astype(jnp.float32), mask_BT & among_BT)

    return StopReport(
        precision=share(~full_right_BT, stopped_BT),
        recall=share(stopped_BT, ~full_right_BT),
        stopped=share(stopped_BT, mask_BT),
        exited=share(early_BT & ~stopped_BT, mask_BT),
        depth=share(jnp.asarray(depths)[index_1BT[0]], mask_BT),
        accuracy=share(right_BT, ~stopped_BT),
        full_accuracy=share(full_right_BT, mask_BT),
        hopeless=share(hopeless_BT, mask_BT),
        hopeless_precision=share(hopeless_BT, stopped_BT),
        hopeless_recall=share(stopped_BT, hopeless_BT),
    )
