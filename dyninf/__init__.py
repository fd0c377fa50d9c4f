"""dyninf: make a transformer spend less per token without changing its weights' meaning."""

from dyninf import depth as depth
from dyninf.cache import CacheSpec as CacheSpec
from dyninf.cache import KVCache as KVCache
from dyninf.compaction import Compact as Compact
from dyninf.decode_state import DecodeState as DecodeState
from dyninf.decode_state import Generation as Generation
from dyninf.forward import Forward as Forward
from dyninf.forward import forward as forward
from dyninf.forward import layer_states as layer_states
from dyninf.generate import decode_step as decode_step
from dyninf.generate import generate as generate
from dyninf.generate import prefill as prefill
from dyninf.generate import stream as stream
from dyninf.plan import Plan as Plan
from dyninf.plan import check as check
from dyninf.plan import describe as describe
from dyninf.pytree import pytree as pytree
from dyninf.sampling import Greedy as Greedy
from dyninf.sampling import MinP as MinP
from dyninf.sampling import Temperature as Temperature
from dyninf.sampling import TopK as TopK
from dyninf.sampling import TopP as TopP
from dyninf.sampling import chain as chain
from dyninf.stats import StepStats as StepStats
from dyninf.stats import summarize as summarize

__version__ = "0.1.0"
