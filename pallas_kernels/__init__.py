"""Attention kernels for dynamic inference; depends on jax alone and can be used without dyninf.

Every operation is a public function with a reference in plain JAX and, where it pays, faster implementations that
:mod:`pallas_kernels.dispatch` chooses between.
"""

from pallas_kernels.attention import decode_attention as decode_attention
from pallas_kernels.attention import prefill_attention as prefill_attention
