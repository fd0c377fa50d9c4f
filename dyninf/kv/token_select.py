"""Read what most heads of a layer vote for (Wu et al. 2024, "TokenSelect: Efficient Long-Context Inference and Length
Extrapolation for LLMs via Dynamic Token-Level KV Cache Selection").

Every query head spreads one vote over the pages by a softmax of its dot products with their means, without the scale of
attention; the votes of all heads of the layer are summed, and all of them read the same pages. A head that is sure thus
outweighs heads that are not.

With ``page_size=1`` pages are tokens, as in the paper, at the price of a summary as large as the keys and of reading it
whole in each step; larger pages cost ``1 / page_size`` of that. Differences from the paper's code: keys are rotated
(there not, and the query by its place in the local window), positions are those of the text, the vote is over all pages
(there those between the sinks and the recent tokens), and query heads ask the key/value head of their group (there
``head % num_kv_heads``). ``TopK(reuse=0.9)`` is the paper's reuse of the last choice while the query has hardly turned,
which its code switches off (:mod:`dyninf.kv.choice`).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from dyninf.kv.base import PageScorer
from dyninf.pytree import pytree


@pytree(static=("page_size",))
class TokenSelect(PageScorer):
    """Score a page by the soft votes of all heads of the layer.

    Args:
        page_size: tokens of a page (at least 1).
    """

    kind: ClassVar[str] = "mean"
    reduce: ClassVar[str] = "vote"

    page_size: int = 8

    def combine(self, scores_BKP: jax.Array) -> jax.Array:
        """Return the votes of all heads together, the same for every key/value head."""
        return jnp.broadcast_to(jnp.sum(scores_BKP, axis=1, keepdims=True), scores_BKP.shape)
