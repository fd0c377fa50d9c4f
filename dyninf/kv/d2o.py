"""Merge what is evicted into its nearest key, and give layers of even attention more (Wan et al. 2024, "D2O: Dynamic
Discriminative Operations for Efficient Long-Context Inference of Large Language Models").

Tokens: scores are those of :class:`dyninf.kv.H2O`; an evicted token is merged into the most similar key that is kept if
it is as similar as evicted tokens have been so far (:mod:`dyninf.kv.merging`; the paper's factors of the threshold are
both a half). The paper keeps four sinks and as many recent tokens as others.

Layers: :func:`variance_budgets` divides a total among the layers by how evenly the tokens of some text are attended to.
The paper does so for each prompt and leaves the first two layers and the last one whole; a cache's size is fixed here
before the prompt is known, so budgets are measured once and given to every text, and layers stay whole with a budget
of the whole context.

The paper's code evicts after a step has attended, from the first decoded token on, here a token takes its place before
it attends, and the prompt is compressed at once. Heads of a group share a cache here, there each query head has one.
"""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.kv.h2o import H2O
from dyninf.kv.mass import prompt_mass
from dyninf.model import CausalLM
from dyninf.pytree import pytree
from pallas_kernels import prefill_attention


@pytree()
class D2O(H2O):
    """Score a token by the attention it has received, and merge tokens that are evicted.

    Args:
        momentum: how much of the threshold each evicted token leaves (0 to 1).
    """

    merges: ClassVar[bool] = True

    momentum: float = 0.5


def variance_budgets(
    model: CausalLM, tokens_BT: jax.Array, mean: int, *, least: int, whole: Sequence[int] = (), capacity: int = 0
) -> tuple[int, ...]:
    """Return a budget (tokens) for each layer: the less, the more unevenly its tokens are attended to.

    Shares are a softmax of minus the variance, over tokens, of the attention that each received from all others, which
    is brought to 0 to 1 over the heads of a layer and then averaged. Costs a dense pass over the text with attention
    that is written out in parts.

    Args:
        tokens_BT: text to measure on, int32, without padding.
        mean: tokens of a layer on average.
        least: tokens of a layer at least, such as ``sinks + recent``.
        whole: layers that get ``capacity`` instead; negative numbers count from the last one.

    Returns:
        Budgets of whole tokens, rounded down.
    """
    batch, length = tokens_BT.shape
    lengths_B, positions_BT = jnp.full(batch, length), jnp.broadcast_to(jnp.arange(length), (batch, length))

    def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None):
        mass_BTK = prompt_mass(q_BTNH, k_BTKH, lengths_B)
        return prefill_attention(q_BTNH, k_BTKH, v_BTKH, None, window=window), mass_BTK

    x_BTD, spreads = model.embed(tokens_BT), []
    for layer in model.layers:
        x_BTD, mass_BTK = layer(x_BTD, positions_BT, attend)
        spreads.append(head_spread(np.asarray(mass_BTK)))
    return shares_of(spreads, mean, least=least, most=max(length, mean), whole=whole, capacity=capacity)


def head_spread(mass_BTK: np.ndarray) -> float:
    """Return how uneven attention is in a layer, 0 to 1, relative to its most uneven head."""
    variance_K = mass_BTK.var(axis=1, ddof=1).mean(axis=0)
    return float(np.mean((variance_K - variance_K.min()) / (variance_K.max() - variance_K.min() + 1e-6)))


def shares_of(
    spreads: Sequence[float], mean: int, *, least: int, most: int, whole: Sequence[int] = (), capacity: int = 0
) -> tuple[int, ...]:
    """Return the budgets for layers of these spreads; arguments are those of :func:`variance_budgets`."""
    weights = np.exp(-np.asarray(spreads, np.float64))
    tokens = np.clip(weights / weights.sum() * len(weights) * mean, least, most).astype(int)
    tokens[list(whole)] = capacity
    return tuple(tokens.tolist())
