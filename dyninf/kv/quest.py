"""Read the pages whose keys could match the query best (Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient
Long-Context LLM Inference").

The summary of a page holds the largest and the smallest entry of each feature of its keys, and a page is worth the
largest dot product with the query that any key between them could have: ``sum_d max(q_d high_d, q_d low_d)``. This is
never below the best key of the page. Summaries take ``1 / page_size`` of the cache's memory, and a step reads all of
them.

The paper reads the first two layers whole: ``TopK(dense_layers=2)``. It forces no sinks (``sinks=0``), though the page
of the newest token is always read here. Its budget is at least three pages; here it is what it says. Its code has a
page set for each query head; query heads that share a key/value head share one here, by the largest of their scores.
"""

from typing import ClassVar

from dyninf.kv.base import PageScorer
from dyninf.pytree import pytree


@pytree(static=("page_size",))
class Quest(PageScorer):
    """Score a page by the largest dot product that a key within its bounds could have.

    Args:
        page_size: tokens of a page (at least 1).
    """

    kind: ClassVar[str] = "bounds"
    reduce: ClassVar[str] = "max"

    page_size: int = 16
