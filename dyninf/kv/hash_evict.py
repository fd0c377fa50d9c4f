"""Forget the key that is least like the newest one, by their hashes (Liu et al. 2024, "HashEvict: A Pre-Attention KV
Cache Eviction Strategy using Locality-Sensitive Hashing", also called LSH-E).

A key is hashed to the signs of its products with random directions, once, when it comes; where two hashes differ in few
bits the keys point the same way. The slot whose hash differs most from that of the new key is overwritten, before
attention, which needs no attention and no second pass over the keys: a step compares one number for each slot.

As in the paper's code it is the new *key* that is compared (the abstract says the query). Directions are drawn once for
all layers here, there for each layer. The paper's code fills the cache with the prompt; where the prompt is longer,
those tokens stay here that are most like its last one.
"""

import jax
import jax.numpy as jnp

from dyninf.kv.base import KVScorer, PromptKV
from dyninf.pytree import pytree
from pallas_kernels import hamming_scores


@pytree(static=("bits", "seed"))
class HashEvict(KVScorer):
    """Score a token by the bits that its key's hash has in common with that of the newest key.

    Args:
        bits: of a hash (1 to 24: as many as a float32 holds).
        seed: of the random directions.
    """

    bits: int = 16
    seed: int = 0

    def prompt(self, obs: PromptKV) -> jax.Array:
        """Return the hashes, as numbers."""
        return self._hash(obs.k_BTKH)

    def arrive(self, k_BKH: jax.Array, position_B: jax.Array) -> jax.Array:
        """Return the hash, as a number."""
        return self._hash(k_BKH)

    def rank(self, scores_BSK: jax.Array, k_BKH: jax.Array) -> jax.Array:
        """Return minus the number of bits in which the hashes differ from that of the new key."""
        batch, slots, _ = scores_BSK.shape
        held_BSK, new_BK = (jnp.maximum(codes, 0.0).astype(jnp.int32) for codes in (scores_BSK, self._hash(k_BKH)))
        codes_B1KS = jnp.moveaxis(held_BSK, 1, 2)[:, None]
        # Hashes lie among the scores, as numbers: XLA takes them from there in the fusion that seeks the lowest rank,
        # a kernel would need them as words, which takes a pass over them of its own.
        ranks_BKS = hamming_scores(codes_B1KS, new_BK[..., None], jnp.full(batch, slots), implementation="xla")
        return jnp.moveaxis(ranks_BKS, 2, 1)

    def validate(self) -> None:
        """Raise ValueError if a parameter is out of its range."""
        if not (isinstance(self.bits, int) and 1 <= self.bits <= 24):
            raise ValueError(f"expected 1 to 24 bits for HashEvict, got {self.bits!r}")

    def directions(self, head_dim: int) -> jax.Array:
        """Return the random directions ``[H, bits]``."""
        return jax.random.normal(jax.random.key(self.seed), (head_dim, self.bits), jnp.float32)

    def _hash(self, keys: jax.Array) -> jax.Array:
        signs = jnp.einsum("...h,hp->...p", keys.astype(jnp.float32), self.directions(keys.shape[-1])) >= 0
        return jnp.einsum("...p,p->...", signs.astype(jnp.float32), 2.0 ** jnp.arange(self.bits))
