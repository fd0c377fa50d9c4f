"""Sparse prefill policies: which blocks of the prompt each block of queries attends."""

from dyninf.sparsity.base import Dense as Dense
