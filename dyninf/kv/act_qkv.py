"""Read the pages that point where the query points, more of them in layers that cannot tell (Xiao et al. 2025,
"Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference", ActQKV).

A page is worth the cosine between the query and the mean of its keys. The paper's probe is a mean of the queries of a
chunk, weighted by how unusual each one's activations are; a decode step has one query, which is the probe.

Its cut-off by layer: where the scores of the pages are even, no few of them hold what is sought, and the layer reads
more. The paper follows each layer's entropy over the last hundred steps. :func:`entropy_budgets` divides a total in the
same way once, from entropies that were measured on some text (:func:`score_entropies`), as what a step reads has a
fixed size here: ``TopK(scorer=ActQKV(), budget=entropy_budgets(...))``.

Differences from the paper's code: keys are rotated, blocks are represented by the mean of all their keys (there by the
mean of four chosen ones), and every key/value head has pages of its own.
"""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.kv.base import PageScorer
from dyninf.model import CausalLM
from dyninf.pytree import pytree
from pallas_kernels import page_scores, prefill_attention, summarize_pages


@pytree(static=("page_size",))
class ActQKV(PageScorer):
    """Score a page by the largest cosine that a query of the group has with the mean of its keys.

    Reads the summaries twice, once for their lengths.

    Args:
        page_size: tokens of a page (at least 1).
    """

    kind: ClassVar[str] = "mean"

    page_size: int = 32

    def score(self, q_BTNH: jax.Array, summary_BPKX: jax.Array, num_pages_B: jax.Array) -> jax.Array:
        """Return the cosines."""
        lengths = jnp.linalg.norm(q_BTNH.astype(jnp.float32), axis=-1, keepdims=True)
        unit_BTNH = (q_BTNH / jnp.maximum(lengths, 1e-6)).astype(q_BTNH.dtype)
        along_BKP = page_scores(unit_BTNH, summary_BPKX, num_pages_B, reduce="max")
        norms_BPK = jnp.linalg.norm(summary_BPKX.astype(jnp.float32), axis=-1)
        live_BKP = along_BKP > -jnp.inf
        return jnp.where(live_BKP, along_BKP / jnp.maximum(jnp.moveaxis(norms_BPK, 1, 2), 1e-6), -jnp.inf)


def score_entropies(model: CausalLM, tokens_BT: jax.Array, scorer: PageScorer) -> np.ndarray:
    """Return how even the scores of the pages are in each layer, 0 to 1 ``[L]``, for the last token of each text.

    The entropy of a softmax of the scores over the logarithm of their number, a mean over heads and texts. Costs a
    dense pass.

    Args:
        tokens_BT: texts to measure on, int32, without padding.

    Raises:
        ValueError: if the texts have fewer than two whole pages.
    """
    batch, length = tokens_BT.shape
    pages = length // scorer.page_size
    if pages < 2:
        raise ValueError(f"expected texts of at least two pages of {scorer.page_size} tokens, got {length} tokens")
    lengths_B, positions_BT = jnp.full(batch, length), jnp.broadcast_to(jnp.arange(length), (batch, length))

    def attend(q_BTNH, k_BTKH, v_BTKH, *, window=None):
        about = {"page_size": scorer.page_size, "kind": scorer.kind}
        summary_BPKX = summarize_pages(k_BTKH[:, : pages * scorer.page_size], lengths_B, **about)
        scores_BKP = scorer.score(q_BTNH[:, -1:], summary_BPKX, jnp.full(batch, pages))
        entropies_BK = jnp.sum(jax.scipy.special.entr(jax.nn.softmax(scores_BKP, axis=-1)), axis=-1)
        return prefill_attention(q_BTNH, k_BTKH, v_BTKH, None, window=window), entropies_BK

    x_BTD, found = model.embed(tokens_BT), []
    for layer in model.layers:
        x_BTD, entropies_BK = layer(x_BTD, positions_BT, attend)
        found.append(float(jnp.mean(entropies_BK) / np.log(pages)))
    return np.asarray(found)


def entropy_budgets(
    entropies_L: Sequence[float], mean: int, *, page_size: int, least: int | None = None
) -> tuple[int, ...]:
    """Return a budget (tokens) for each layer, in proportion to its entropy, from the first layer to the last.

    Every layer takes its share of what the layers before it have left, between ``least`` and twice the mean, and leaves
    as much as those behind it need: the total is met exactly.

    Args:
        entropies_L: of each layer, at least 0.
        mean: tokens of a layer on average, a multiple of the page size.
        least: tokens of a layer at least, a multiple of the page size; ``None`` for 32 pages, or the mean if less.

    Raises:
        ValueError: if a number is out of its range or no multiple of the page size.
    """
    least = min(32 * page_size, mean) if least is None else least
    if mean % page_size or least % page_size or not 0 < least <= mean or min(entropies_L) < 0:
        raise ValueError(
            f"expected multiples of {page_size} tokens, 0 < least <= mean, and entropies of at least 0, got {mean=}, "
            f"{least=} and {list(entropies_L)}"
        )
    pages, left = [], mean // page_size * len(entropies_L)
    for layer, entropy in enumerate(entropies_L):
        rest = sum(entropies_L[layer:])
        share = left * entropy / rest if rest > 0 else left / (len(entropies_L) - layer)
        behind, few, many = len(entropies_L) - layer - 1, least // page_size, 2 * mean // page_size
        pages.append(int(np.clip(round(share), max(few, left - behind * many), min(many, left - behind * few))))
        left -= pages[-1]
    return tuple(page_size * count for count in pages)
