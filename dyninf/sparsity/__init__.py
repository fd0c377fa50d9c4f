"""Sparse prefill policies: which blocks of keys each block of a prompt's queries attends to."""

from dyninf.sparsity.a_shape import AShape as AShape
from dyninf.sparsity.a_shape import TriShape as TriShape
from dyninf.sparsity.base import Dense as Dense
from dyninf.sparsity.base import PromptObs as PromptObs
from dyninf.sparsity.base import Selected as Selected
from dyninf.sparsity.base import SparsityPolicy as SparsityPolicy
from dyninf.sparsity.density import Density as Density
from dyninf.sparsity.density import density as density
from dyninf.sparsity.power_attention import PowerAttention as PowerAttention
