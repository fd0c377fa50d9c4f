"""Read the pages whose mean key matches the query best: the retrieval cache of TriForce (Sun et al. 2024, "TriForce:
Lossless Acceleration of Long Sequence Generation with Hierarchical Speculative Decoding").

A page is worth ``q . mean``. Summaries take ``1 / (2 page_size)`` of the cache's memory, half of what bounds take; a
single key that stands out is averaged away, the more so the larger the page.

The paper chooses once, from the last query of the prompt, again only at verification, and drafts with what it chose;
here every step chooses. It forces the first page (``sinks=1``). It knows no grouped queries; the largest score of a
group counts here.
"""

from typing import ClassVar

from dyninf.kv.base import PageScorer
from dyninf.pytree import pytree


@pytree(static=("page_size",))
class PageMean(PageScorer):
    """Score a page by the dot product of the query with the mean of its keys.

    Args:
        page_size: tokens of a page (at least 1).
    """

    kind: ClassVar[str] = "mean"
    reduce: ClassVar[str] = "max"

    page_size: int = 8
