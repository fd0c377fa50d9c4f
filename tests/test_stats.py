"""Statistics of a run: means over active steps by hand, one step, and nothing at all."""

import jax.numpy as jnp
import pytest

from dyninf import StepStats, summarize


def test_means_over_active_steps_by_hand():
    stats = StepStats(
        active=jnp.array([[True, True], [True, False], [False, False]]),
        needed=jnp.array([[4, 6], [2, 0], [0, 0]]),
        run=jnp.array([6, 3, 6]),
        kv_live=jnp.array([[5, 8], [6, 8], [6, 8]]),
        kv_read=jnp.array([[5, 2], [3, 9], [9, 9]]),
    )
    assert summarize(stats) == {
        "tokens": 3,
        "layers_needed": pytest.approx(4.0),  # (4 + 6 + 2) / 3
        "layers_run": pytest.approx(4.5),  # (6 + 3) / 2: the last step had nobody
        "kv_live": pytest.approx(19 / 3),  # (5 + 8 + 6) / 3
        "kv_read": pytest.approx(10 / 3),  # (5 + 2 + 3) / 3
    }


def test_one_step_without_a_leading_axis():
    stats = StepStats(
        active=jnp.array([True, False, True]),
        needed=jnp.array([4, 0, 2]),
        run=jnp.int32(4),
        kv_live=jnp.array([5, 3, 7]),
        kv_read=jnp.array([5, 3, 7]),
    )
    want = {"tokens": 2, "layers_needed": 3.0, "layers_run": 4.0, "kv_live": 6.0, "kv_read": 6.0}
    assert summarize(stats) == want


@pytest.mark.parametrize("steps", [0, 2])
def test_nothing_decoded(steps):
    none = jnp.zeros((steps, 3), jnp.int32)
    stats = StepStats(active=none > 0, needed=none, run=jnp.zeros(steps, jnp.int32), kv_live=none + 4, kv_read=none + 4)
    want = {"tokens": 0, "layers_needed": 0.0, "layers_run": 0.0, "kv_live": 0.0, "kv_read": 0.0}
    assert summarize(stats) == want
