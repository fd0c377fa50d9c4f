"""Kernels for dynamic inference; depends on jax alone and can be used without dyninf.

Every operation is a public function with a reference in plain JAX and, where it pays, faster implementations that
:mod:`pallas_kernels.dispatch` chooses between.
"""

from pallas_kernels.add_devices import add_devices as add_devices
from pallas_kernels.append_and_score import append_and_score as append_and_score
from pallas_kernels.append_tokens import append_tokens as append_tokens
from pallas_kernels.attention import decode_attention as decode_attention
from pallas_kernels.attention import prefill_attention as prefill_attention
from pallas_kernels.block_sparse_attention import block_sparse_attention as block_sparse_attention
from pallas_kernels.choose_blocks import choose_blocks as choose_blocks
from pallas_kernels.compact_cache import compact_cache as compact_cache
from pallas_kernels.decoder_stack import DecoderWeights as DecoderWeights
from pallas_kernels.decoder_stack import Selection as Selection
from pallas_kernels.decoder_stack import decode_layers as decode_layers
from pallas_kernels.hamming_scores import hamming_scores as hamming_scores
from pallas_kernels.index import BlockIndex as BlockIndex
from pallas_kernels.index import KVIndex as KVIndex
from pallas_kernels.layer_products import norm_gate_up as norm_gate_up
from pallas_kernels.layer_products import norm_project as norm_project
from pallas_kernels.layer_products import project_add as project_add
from pallas_kernels.merge_tokens import merge_tokens as merge_tokens
from pallas_kernels.merge_tokens import merge_victims as merge_victims
from pallas_kernels.page_scores import page_scores as page_scores
from pallas_kernels.page_scores import summarize_page as summarize_page
from pallas_kernels.page_scores import summarize_pages as summarize_pages
from pallas_kernels.readout import Readout as Readout
from pallas_kernels.readout import exit_readout as exit_readout
from pallas_kernels.readout import read_logits as read_logits
from pallas_kernels.strided_scores import strided_scores as strided_scores
from pallas_kernels.topk_pages import topk_pages as topk_pages
