"""Compaction: run a group of layers on the rows that need it, gathered to a static number of them.

A driver option that changes no result. ``segments`` skips a group of layers when no sequence needs it; where some do,
all rows of the batch run it. ``Compact(capacity=C)`` gathers the rows that need it into C rows in their order, so that
every weight product of the layers sees C rows instead of B. The cache is neither gathered nor copied: the ``attend``
function that a layer is handed puts its queries, keys and values back into their rows of the batch, and writes and
attends there.

Overflow: when more than C rows need a group, the group runs on all rows, as in ``segments``. Nothing is dropped and no
token is forced to exit. Rows that do not run a layer but store its keys all the same (``fill="propagate"``) are
projected beside the C rows, so that each row's keys are computed once.

Cost: one more conditional per group, and vocabulary products (exits that read logits, the last readout) and attention
still see all rows. It can pay only where the layers are bound by arithmetic, which takes batches of a few hundred
sequences on current accelerators: below that, reading the weights takes as long for C rows as for B.

Source: the static-capacity gather of Mixture-of-Depths (Raposo et al. 2024), with another overflow rule: there tokens
beyond the capacity go without the layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.kv.choice import lend
from dyninf.layer_run import LayerRun, Span, plain_span
from dyninf.model import DecoderLayer


@dataclass(frozen=True, kw_only=True)
class Compact:
    """The driver ``segments`` on gathered rows; see :mod:`dyninf.compaction`.

    Args:
        capacity: rows that a gathered group runs (1 to one less than the batch).

    Raises:
        ValueError: if ``capacity`` is not an integer of at least 1.
    """

    capacity: int

    def __post_init__(self) -> None:
        """Refuse a capacity that no batch could have."""
        if not isinstance(self.capacity, (int, np.integer)) or self.capacity < 1:
            raise ValueError(f"expected capacity to be an integer of at least 1, got {self.capacity!r}")


def compact_span(layers: Sequence[DecoderLayer], run: LayerRun, capacity: int) -> Span:
    """Return the span that runs its layers on ``capacity`` gathered rows where these suffice, else on all rows."""
    everyone = plain_span(layers, run)

    def span(start, stop, x_BTD, active_BT, caches, carry):
        active_B = jnp.any(active_BT, axis=1)

        def gathered(operands):
            return _run_gathered(layers[start:stop], run, capacity, active_B, *operands)

        def overflow(operands):
            return everyone(start, stop, *operands, ())[:3]

        fits = jnp.sum(active_B) <= capacity
        x_BTD, prev_BTD, caches = jax.lax.cond(fits, gathered, overflow, (x_BTD, active_BT, tuple(caches)))
        return x_BTD, prev_BTD, caches, carry

    return span


def _run_gathered(layers, run, capacity, active_B, x_BTD, active_BT, caches):
    order_B = jnp.argsort(~active_B, stable=True)
    chosen_C, rest_R = order_B[:capacity], order_B[capacity:]
    x_CTD, active_CT, positions_CT = x_BTD[chosen_C], active_BT[chosen_C], run.positions_BT[chosen_C]
    prev_CTD, updated = x_CTD, []
    for layer, cache in zip(layers, caches, strict=True):
        kv_RTKH = None
        if run.propagate and cache is not None:
            kv_RTKH = layer.project_kv(x_BTD[rest_R], run.positions_BT[rest_R])
        attend = _attend_in_place(run.attend(lend(updated, cache), active_BT), chosen_C, rest_R, kv_RTKH)
        y_CTD, cache = layer(x_CTD, positions_CT, attend)
        prev_CTD, x_CTD = x_CTD, jnp.where(active_CT[:, :, None], y_CTD, x_CTD)
        updated.append(cache)

    def back(values_CTD):
        return x_BTD.at[chosen_C].set(values_CTD, unique_indices=True)

    return back(x_CTD), back(prev_CTD), tuple(updated)


def _attend_in_place(attend, chosen_C, rest_R, kv_RTKH):
    """Attend for some rows of the batch with an ``attend`` that takes all of them."""

    def spread(values_C, rest=None):
        whole = jnp.zeros((chosen_C.size + rest_R.size, *values_C.shape[1:]), values_C.dtype)
        whole = whole.at[chosen_C].set(values_C, unique_indices=True)
        return whole if rest is None else whole.at[rest_R].set(rest.astype(whole.dtype), unique_indices=True)

    def attend_chosen(q_CTNH, k_CTKH, v_CTKH, *, window=None):
        k_RTKH, v_RTKH = (None, None) if kv_RTKH is None else kv_RTKH
        o_BTNH, carry = attend(spread(q_CTNH), spread(k_CTKH, k_RTKH), spread(v_CTKH, v_RTKH), window=window)
        return o_BTNH[chosen_C], carry

    return attend_chosen
