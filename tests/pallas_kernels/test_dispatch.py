"""The choice of an implementation: reasons for refusing, what was asked for by name, and what is logged."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, dispatch, prefill_attention
from pallas_kernels.attention import DECODE, PREFILL, explain_attention
from pallas_kernels.dispatch import Implementation, choose

FACTS = {
    "platform": "gpu", "dtype": jnp.bfloat16, "kv_dtype": jnp.bfloat16, "head_dim": 64, "window": None,
    "masked": False, "num_queries": 1, "num_keys": 99, "capability": "8.0", "num_heads": 4, "num_kv": 2,
    "page_size": None, "num_entries": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "change", "reason"),
    [
        ("decode", {}, None),
        ("prefill", {"num_queries": 99, "window": 7}, None),
        ("decode", {"platform": "cpu"}, "needs an NVIDIA GPU, got platform 'cpu'"),
        ("decode", {"dtype": jnp.float32}, "needs bfloat16 or float16, got float32"),
        ("decode", {"kv_dtype": jnp.float32}, "needs one dtype everywhere, got bfloat16 queries and float32 keys"),
        ("decode", {"head_dim": 20}, "multiple of 8 up to 256, got 20"),
        ("decode", {"head_dim": 264}, "multiple of 8 up to 256, got 264"),
        ("decode", {"window": 7}, "sliding window"),
        ("decode", {"masked": True}, "not a mask of slots"),
        ("decode", {"page_size": 16, "num_entries": 3}, "not the pages of an index"),
        ("decode", {"num_queries": 2}, "one token at a time here, got 2"),
        ("prefill", {"masked": True}, "not a mask of tokens"),
    ],
    ids=str,
)
def test_cudnn_says_why_it_cannot_serve(operation, change, reason):
    table = {"decode": DECODE, "prefill": PREFILL}[operation]
    facts = FACTS | change
    said = {implementation.name: implementation.refuse(**facts) for implementation in table}
    assert said["xla"] is None and (said["cudnn"] is None if reason is None else reason in said["cudnn"])
    assert choose("attention", table, None, **facts).name == ("cudnn" if reason is None else "xla")
    if reason:
        with pytest.raises(NotImplementedError, match="no implementation of attention can serve: cudnn: "):
            choose("attention", table, "cudnn", **facts)
    assert choose("attention", table, "xla", **facts).name == "xla"


@pytest.mark.parametrize("operation", [prefill_attention, decode_attention])
def test_a_requested_implementation_is_never_replaced(operation):
    q, k, v = jnp.ones((3, 1, 4, 8)), jnp.ones((3, 1, 2, 8)), jnp.ones((3, 1, 2, 8))
    last = jnp.ones(3, jnp.int32) if operation is prefill_attention else jnp.zeros((3, 1), jnp.int32)
    with pytest.raises(NotImplementedError, match=r"cudnn: needs (an NVIDIA GPU|bfloat16)"):
        operation(q, k, v, last, implementation="cudnn")
    np.testing.assert_array_equal(operation(q, k, v, last, implementation="xla"), operation(q, k, v, last))


def test_the_first_that_can_serve_is_taken_and_the_reasons_are_logged_once(caplog):
    def fussy(name, reason):
        return Implementation(name=name, refuse=lambda **facts: reason, run=lambda: name)

    table = [fussy("fast", "too odd for the log test"), fussy("good", None), fussy("slow", None)]
    with caplog.at_level(logging.WARNING, logger=dispatch.__name__):
        for _ in range(3):
            assert choose("operation", table, None, platform="gpu").name == "good"
        assert choose("operation", table, "slow", platform="gpu").name == "slow"
    assert [record.getMessage() for record in caplog.records] == [
        "operation runs as 'good': fast: too odd for the log test"
    ]
    with pytest.raises(NotImplementedError, match="fast: too odd for the log test"):
        choose("operation", table[:1], None, platform="cpu")


def test_explain_names_every_implementation():
    said = explain_attention(head_dim=64, dtype="bfloat16", num_queries=5)
    assert list(said) == ["prefill_attention", "decode_attention"]
    for reasons in said.values():
        assert {"mosaic_gpu", "mosaic_tpu", "cudnn"} < set(dict(reasons)) and reasons[-1] == ("xla", None)
    # cuDNN first for short prompts and small heads, the kernel of ours for long ones.
    first = [said[operation][0][0] for operation in said]
    assert first == ["cudnn", "mosaic_gpu"]
    assert (
        explain_attention(head_dim=128, dtype="bfloat16", num_queries=16384)["prefill_attention"][0][0] == "mosaic_gpu"
    )
