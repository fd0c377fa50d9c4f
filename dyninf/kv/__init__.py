"""Cache policies: what the KV cache keeps, and what a decode step reads of it."""

from dyninf.kv.base import KeepAll as KeepAll
from dyninf.kv.base import KVScorer as KVScorer
from dyninf.kv.base import PageScorer as PageScorer
from dyninf.kv.base import PromptKV as PromptKV
from dyninf.kv.base import ReadAll as ReadAll
from dyninf.kv.base import StepKV as StepKV
from dyninf.kv.critic import Critic as Critic
from dyninf.kv.d2o import D2O as D2O
from dyninf.kv.d2o import variance_budgets as variance_budgets
from dyninf.kv.expected_attention import ExpectedAttention as ExpectedAttention
from dyninf.kv.h2o import H2O as H2O
from dyninf.kv.hash_evict import HashEvict as HashEvict
from dyninf.kv.key_norm import KeyNorm as KeyNorm
from dyninf.kv.page_mean import PageMean as PageMean
from dyninf.kv.pyramid_kv import pyramid_budgets as pyramid_budgets
from dyninf.kv.quest import Quest as Quest
from dyninf.kv.recall import PageRecall as PageRecall
from dyninf.kv.recall import page_recall as page_recall
from dyninf.kv.recency import Recency as Recency
from dyninf.kv.retrieval_attention import RetrievalAttention as RetrievalAttention
from dyninf.kv.shadow_kv import ShadowKV as ShadowKV
from dyninf.kv.snap_kv import SnapKV as SnapKV
from dyninf.kv.token_select import TokenSelect as TokenSelect
from dyninf.kv.top_k import TopK as TopK
from dyninf.kv.tova import TOVA as TOVA
