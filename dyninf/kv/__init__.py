"""Cache policies: what the KV cache keeps, and what a decode step reads of it."""

from dyninf.kv.base import KeepAll as KeepAll
from dyninf.kv.base import ReadAll as ReadAll
