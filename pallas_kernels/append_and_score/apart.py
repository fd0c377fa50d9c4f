"""Scores, then storing, each by its own fastest implementation: the definition, and what runs on other devices."""

from typing import Any

from pallas_kernels.append_tokens import append_tokens
from pallas_kernels.page_scores import page_scores


def refuse(**facts: Any) -> str | None:
    """Serve every call."""
    return None


def append_and_score(k, v, summary, k_BTKH, v_BTKH, slots_BT, q_BTNH, num_pages_B, layer, *, kind, page_size, reduce):
    """See :func:`pallas_kernels.append_and_score.append_and_score`; the arrays are stacked."""
    scores_BKP = page_scores(q_BTNH, summary, num_pages_B, reduce=reduce, layer=layer)
    about = {"kind": kind, "page_size": page_size, "layer": layer}
    return *append_tokens(k, v, summary, k_BTKH, v_BTKH, slots_BT, **about), scores_BKP
