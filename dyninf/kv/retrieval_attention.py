"""Read pages of keys that the same queries want (Liu et al. 2024, "RetrievalAttention: Accelerating Long-Context LLM
Inference via Vector Retrieval"), with an index of fixed sizes.

After the prompt each key/value head arranges its tokens so that keys wanted by the same queries are neighbours, which
is what an inverted-file index does. Queries and keys of a head lie apart, so that the centroids are those of queries:
k-means by cosine over a sample of the prompt's own queries, those of all heads of a group together. A key goes to the
centroid with which it has the largest dot product. Tokens are sorted by centroid, in the order of the text within one;
sinks, recent tokens and padding stay where they are. Pages are then pieces of clusters, the summary of one is the mean
of its keys, and a step reads the pages of the largest ``q . mean`` of any query of the group. With ``page_size=1`` this
is exact retrieval of the best keys, the variant without an index that the paper compares itself with.

Differences: the paper walks a graph on the CPU whose edges follow the prompt's queries, from which a step reads single
keys and which holds the prompt only. RetroInfer (Chen et al. 2025), which succeeds it, clusters keys by their own
k-means in segments, estimates the attention of clusters that it does not read by their centroids, and takes new tokens
in as they come. Here shares of pages are fixed and nothing is estimated; new tokens lie behind the prompt in the order
of the text, where pages are plain means. Slots of the prompt no longer say where a token stood, so that layers with
windows are refused.

Cost: once after the prompt, ``iterations * samples * centroids`` products of a query head and ``T * centroids`` of a
key/value head, and a copy of its keys and values; ``T * centroids`` numbers of working memory a sequence. A step reads
means, ``1 / (2 page_size)`` of the cache, and the budget. :func:`dyninf.kv.page_recall` says what they catch.
"""

import jax
import jax.numpy as jnp

from dyninf.kv.base import PromptKV
from dyninf.kv.page_mean import PageMean
from dyninf.pytree import pytree


@pytree(static=("page_size", "centroids", "samples", "iterations"))
class RetrievalAttention(PageMean):
    """Score a page by the dot product of the query with the mean of its keys, which the same queries want.

    Args:
        page_size: tokens of a page (at least 1).
        centroids: clusters of each key/value head (at least 1).
        samples: tokens of the prompt, evenly spaced, whose queries are clustered (at least ``centroids``).
        iterations: of k-means (at least 0: the centroids are queries).
    """

    page_size: int = 8
    centroids: int = 64
    samples: int = 512
    iterations: int = 4

    def arrange(self, obs: PromptKV, sinks: int, recent: int) -> jax.Array:
        """Return the tokens of the prompt in the order of their centroids ``[B, T, K]``."""
        batch, length, num_kv, dim = obs.k_BTKH.shape
        at_BS = jnp.arange(self.samples)[None] * obs.lengths_B[:, None] // self.samples
        q_BSNH = jnp.take_along_axis(obs.q_BTNH, at_BS[:, :, None, None], axis=1).astype(jnp.float32)
        q_KBRH = jnp.moveaxis(q_BSNH.reshape(batch, self.samples, num_kv, -1, dim), 2, 0)
        q_KBRH = q_KBRH.reshape(num_kv, batch, -1, dim)
        slot_1T, end_B1 = jnp.arange(length)[None], obs.lengths_B[:, None]
        moved_BT = (slot_1T >= sinks) & (slot_1T < end_B1 - recent)
        k_KBTH = jnp.moveaxis(obs.k_BTKH.astype(jnp.float32), 2, 0)
        # One head after another: the products of all with all centroids need not exist at once.
        cluster_KBT = jax.lax.map(lambda head: jax.vmap(self._nearest)(*head), (q_KBRH, k_KBTH))
        stays_BT = jnp.where(slot_1T < jnp.minimum(sinks, end_B1), -1, self.centroids + (slot_1T >= end_B1))
        rank_BTK = jnp.where(moved_BT[:, :, None], jnp.moveaxis(cluster_KBT, 0, 2), stays_BT[:, :, None])
        return jnp.argsort(rank_BTK, axis=1, stable=True)

    def validate(self) -> None:
        """Raise ValueError if a parameter is out of its range."""
        for name, least in (("centroids", 1), ("samples", self.centroids), ("iterations", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"expected {name} of at least {least} for RetrievalAttention, got {value!r}")

    def _nearest(self, q_RH: jax.Array, k_TH: jax.Array) -> jax.Array:
        """Return the number of each key's centroid ``[T]``."""
        unit_RH = _unit(q_RH)

        def refine(_, center_CH: jax.Array) -> jax.Array:
            nearest_R = jnp.argmax(unit_RH @ center_CH.T, axis=1)
            sum_CH = jax.ops.segment_sum(unit_RH, nearest_R, self.centroids)
            taken_C = jax.ops.segment_sum(jnp.ones_like(nearest_R), nearest_R, self.centroids) > 0
            return jnp.where(taken_C[:, None], _unit(sum_CH), center_CH)

        first_C = jnp.arange(self.centroids) * len(q_RH) // self.centroids
        center_CH = jax.lax.fori_loop(0, self.iterations, refine, unit_RH[first_C])
        return jnp.argmax(k_TH @ center_CH.T, axis=1)


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-20)
