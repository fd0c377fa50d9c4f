"""Sparse prefill policies: which blocks of keys each block of a prompt's queries attends to, or which tokens stay."""

from dyninf.sparsity.a_shape import AShape as AShape
from dyninf.sparsity.a_shape import TriShape as TriShape
from dyninf.sparsity.base import Dense as Dense
from dyninf.sparsity.base import PromptObs as PromptObs
from dyninf.sparsity.base import Selected as Selected
from dyninf.sparsity.base import SparsityPolicy as SparsityPolicy
from dyninf.sparsity.density import Density as Density
from dyninf.sparsity.density import density as density
from dyninf.sparsity.flex_prefill import FlexPrefill as FlexPrefill
from dyninf.sparsity.lazy_llm import LazyLLM as LazyLLM
from dyninf.sparsity.modality import ByModality as ByModality
from dyninf.sparsity.modality import Grid as Grid
from dyninf.sparsity.pattern_search import default_candidates as default_candidates
from dyninf.sparsity.pattern_search import kept_mass as kept_mass
from dyninf.sparsity.pattern_search import search_patterns as search_patterns
from dyninf.sparsity.per_head import PerHead as PerHead
from dyninf.sparsity.pooled_blocks import PooledBlocks as PooledBlocks
from dyninf.sparsity.power_attention import PowerAttention as PowerAttention
from dyninf.sparsity.seer_attention import SeerAttention as SeerAttention
from dyninf.sparsity.vertical_slash import VerticalSlash as VerticalSlash
from dyninf.sparsity.x_attention import XAttention as XAttention
from dyninf.sparsity.zip_vl import ZipVL as ZipVL
