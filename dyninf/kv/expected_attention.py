"""Keep what later queries can be expected to attend to (Devoto et al. 2025, "Expected Attention: KV Cache Compression
by Estimating Attention from Future Queries Distribution"; the code of kvpress).

Queries before their rotation are taken to be normal, with the mean ``m`` and the covariance ``C`` of the prompt's; the
rotations of the next ``future`` positions are averaged to one matrix ``R``. A key is then worth, relative to the other
keys, ``E[exp(q k / sqrt(H))] = exp(Rm k / sqrt(H) + k RCR' k / 2H)``, times the norm of its value, averaged over the
group. No attention is computed: each key meets an ``[H, H]`` matrix for each query head.

The scorer takes the rotation back, so it has to know it: ``theta`` must be the model's, halves paired as in
``dyninf.models``, without scaling. A model whose rotation differs, or that has none, gets other scores than the
paper's. As the paper evicts after the prompt only, generated tokens are dealt with as in :mod:`dyninf.kv.snap_kv`.
"""

import jax
import jax.numpy as jnp

from dyninf.kv.base import KVScorer, PromptKV
from dyninf.kv.rotary import angles, frequencies, turn
from dyninf.kv.snap_kv import GENERATED
from dyninf.pytree import pytree


@pytree(static=("future", "sinks"))
class ExpectedAttention(KVScorer):
    """Score the tokens of a prompt by the attention that queries like those so far would pay them later on.

    Args:
        theta: base of the rotary frequencies.
        future: positions after the prompt over which rotations are averaged (at least 1).
        sinks: first tokens, which are left out of the statistics and kept (at least 0).
    """

    theta: float = 10000.0
    future: int = 512
    sinks: int = 4

    def prompt(self, obs: PromptKV) -> jax.Array:
        """Return the expected attention times the norms of the values."""
        (batch, length, _, dim), num_kv = obs.q_BTNH.shape, obs.k_BTKH.shape[2]
        slot_T = jnp.arange(length)
        real_BT = (slot_T[None] >= self.sinks) & (slot_T[None] < obs.lengths_B[:, None])
        mean_BNH, cov_BNHH = self._statistics(obs.q_BTNH, real_BT)
        angle_BFH = angles(obs.lengths_B[:, None] + jnp.arange(self.future)[None], frequencies(dim, self.theta))
        cos_BH, sin_BH = jnp.mean(jnp.cos(angle_BFH), axis=1), jnp.mean(jnp.sin(angle_BFH), axis=1)
        mean_BNH = turn(mean_BNH, cos_BH[:, None], sin_BH[:, None])
        for _ in range(2):
            cov_BNHH = jnp.swapaxes(turn(cov_BNHH, cos_BH[:, None, None], sin_BH[:, None, None]), 2, 3)
        keys = obs.k_BTKH.astype(jnp.float32)
        mean_BKGH = mean_BNH.reshape(batch, num_kv, -1, dim)
        cov_BKGHH = cov_BNHH.reshape(batch, num_kv, -1, dim, dim)
        logits_BKGT = jnp.einsum("bkgh,btkh->bkgt", mean_BKGH, keys) * dim**-0.5
        logits_BKGT += jnp.einsum("btki,bkgij,btkj->bkgt", keys, cov_BKGHH, keys) / (2 * dim)
        logits_BKGT = jnp.where(real_BT[:, None, None], logits_BKGT, jnp.finfo(jnp.float32).min)
        share_BTK = jnp.moveaxis(jnp.mean(jax.nn.softmax(logits_BKGT, axis=-1), axis=2), 1, 2)
        scores_BTK = share_BTK * jnp.linalg.norm(obs.v_BTKH.astype(jnp.float32), axis=-1)
        return jnp.where((slot_T < self.sinks)[None, :, None], GENERATED, scores_BTK)

    def arrive(self, k_BKH: jax.Array, position_B: jax.Array) -> jax.Array:
        """Return a score above those of the prompt, higher for later tokens."""
        return jnp.broadcast_to(GENERATED + position_B.astype(jnp.float32)[:, None], k_BKH.shape[:2])

    def validate(self) -> None:
        """Raise ValueError if a parameter is out of its range."""
        for name, least in (("future", 1), ("sinks", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"expected {name} of at least {least} for ExpectedAttention, got {value!r}")

    def _statistics(self, q_BTNH: jax.Array, real_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return mean and covariance of the queries before their rotation, over the tokens that count."""
        angle_TH = angles(jnp.arange(q_BTNH.shape[1]), frequencies(q_BTNH.shape[3], self.theta))
        cos_TH, sin_TH = jnp.cos(angle_TH)[None, :, None], jnp.sin(angle_TH)[None, :, None]
        real_BTNH = real_BT[:, :, None, None]
        flat_BTNH = jnp.where(real_BTNH, turn(q_BTNH.astype(jnp.float32), cos_TH, -sin_TH), 0.0)
        count_B = jnp.maximum(jnp.sum(real_BT, axis=1), 1)
        mean_BNH = jnp.sum(flat_BTNH, axis=1) / count_B[:, None, None]
        rest_BTNH = jnp.where(real_BTNH, flat_BTNH - mean_BNH[:, None], 0.0)
        return mean_BNH, jnp.einsum("btni,btnj->bnij", rest_BTNH, rest_BTNH) / count_B[:, None, None, None]
