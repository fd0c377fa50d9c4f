"""Sparse prefill policies: which blocks of keys each block of a prompt's queries attends to."""

from dyninf.sparsity.base import Dense as Dense
from dyninf.sparsity.base import PromptObs as PromptObs
from dyninf.sparsity.base import Selected as Selected
from dyninf.sparsity.base import SparsityPolicy as SparsityPolicy
from dyninf.sparsity.flex_prefill import FlexPrefill as FlexPrefill
from dyninf.sparsity.seer_attention import SeerAttention as SeerAttention
from dyninf.sparsity.x_attention import XAttention as XAttention
