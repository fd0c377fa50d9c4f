"""Read the pages whose mean key matches best, with their keys made from low-rank factors (Sun et al. 2024, "ShadowKV:
KV Cache in Shadows for High-Throughput Long-Context LLM Inference", arXiv 2410.21465; the authors' ``ShadowKVCache``).

What the keys of a prompt are before their rotation has a low rank over all heads together, so that factors take the
place of the keys (:mod:`dyninf.kv.low_rank`). A page's landmark is the mean of its rotated keys. Pages with a key that
points elsewhere (the smallest cosine with the mean) are outliers: each head keeps ``outliers`` of them exactly, and
reads them at every step. A step weighs the other pages by ``softmax(q . landmark / sqrt(H))``, the largest of a group,
reads ``budget`` tokens of the best, and beside them the outliers, the pages of ``TopK.recent`` before the end of the
prompt, and every generated token, all of these with exact keys. ``recent`` of 26 to 33 tokens are the paper's four
pages of 8; ``sinks`` are read as well, through the factors, and the paper has none.

Cost. Held for each token of a prompt: its value, ``R / (K * H)`` of a key and ``1 / page_size`` of a landmark; for each
head ``outliers`` pages of keys, and ``sv``, which is as much as R keys. A prompt takes ``2 T (K * H)**2`` FLOPs for the
Gram matrix and one ``eigh`` of ``[K * H, K * H]`` a layer and sequence. A step reads all landmarks, ``sv``, and for
each chosen token and head R numbers instead of the H of its key, from which ``2 R H`` FLOPs make the key: the gain is
memory, and the time of what is not chosen. All of it is plain JAX: one sort of the scores, gathers that copy keys and
values, and attention over the copies.

The factors are exact where ``rank`` is at least ``K * H``, whatever the rotation: one that is not the model's costs
accuracy only. Layers stay dense where the budget covers the whole cache. Only prompts are approximated: a text that is
fed token by token (:func:`dyninf.forward` without ``prompt_lengths``, the quality of ``dyninf compare``) is exact.

Differences from the authors' code: prompts of any lengths share a batch; what is a prompt is known, not guessed from
the number of queries; the scale is ``sqrt(H)``, not ``sqrt(128)``; singular values are kept with ``u``; a prompt of few
pages is read whole. Values stay on the device: a program can gather
from pinned host memory only where the indices are there too, and XLA announces such operations on a GPU as work of the
host's processor, which is not what the paper's kernel does, so that there is no option for it.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dyninf.cache import CacheSpec
from dyninf.kv.base import PageScorer
from dyninf.kv.low_rank import LowRankCache, empty_low_rank
from dyninf.kv.rotary import frequencies
from dyninf.pytree import pytree


@pytree(static=("rank", "outliers", "page_size"))
class ShadowKV(PageScorer):
    """Score a page by the attention its mean key would get, and hold prompt keys as low-rank factors.

    Args:
        rank: directions of the factors, of all key/value heads together (at least 1).
        outliers: pages of each head that are kept exactly (at least 0).
        page_size: tokens of a page (at least 1).
        theta: base of the model's rotary frequencies.
        frequencies: the frequencies themselves ``[H / 2]`` (radians per token), for models that scale them, such as
            ``dyninf.models.layers.rope_frequencies`` returns; ``None`` for those of ``theta``.
    """

    kind: ClassVar[str] = "mean"
    owns_cache: ClassVar[bool] = True

    rank: int = 160
    outliers: int = 48
    page_size: int = 8
    theta: float = 10000.0
    frequencies: jax.Array | None = None

    def score(
        self,
        q_BTNH: jax.Array,
        summary_BPKX: jax.Array,
        num_pages_B: jax.Array,
        choosable_BKP: jax.Array | None = None,
    ) -> jax.Array:
        """Return the largest probability of each page in its group; pages that are not choosable get none of it."""
        batch, pages, num_kv, dim = summary_BPKX.shape
        q_BKGH = q_BTNH[:, 0].reshape(batch, num_kv, -1, dim)
        logits_BKGP = jnp.einsum("bkgh,bpkh->bkgp", q_BKGH, summary_BPKX, preferred_element_type=jnp.float32)
        used_BKP = (jnp.arange(pages)[None] < num_pages_B[:, None])[:, None]
        used_BKP = used_BKP if choosable_BKP is None else used_BKP & choosable_BKP
        logits_BKGP = jnp.where(used_BKP[:, :, None], logits_BKGP * dim**-0.5, jnp.finfo(jnp.float32).min)
        return jnp.max(jax.nn.softmax(logits_BKGP, axis=-1), axis=2)

    def own_cache(
        self, select: Any, entry: jax.ShapeDtypeStruct, batch: int, length: int, spec: CacheSpec
    ) -> LowRankCache:
        """Return an empty cache of factors, with exact slots for the tokens that may follow a prompt."""
        return empty_low_rank(
            (batch, spec.capacity, *entry.shape[2:]),
            entry.dtype if spec.dtype is None else spec.dtype,
            length=length,
            generated=spec.capacity - length if spec.generated is None else spec.generated,
            rank=self.rank,
            outliers=self.outliers,
            page_size=self.page_size,
            last_pages=select.recent_pages - 1,
        )

    def rates(self, dim: int) -> jax.Array:
        """Return the frequencies of the rotation that is taken back ``[H / 2]``."""
        return frequencies(dim, self.theta) if self.frequencies is None else jnp.asarray(self.frequencies, jnp.float32)

    def validate(self) -> None:
        """Raise ValueError if a parameter is out of its range."""
        for name, least in (("rank", 1), ("outliers", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"expected {name} of at least {least} for ShadowKV, got {value!r}")
