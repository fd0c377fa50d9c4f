"""Scores of blocks by antidiagonals: a case by hand, NumPy loops, and the sums of the paper's own code.

The numbers below were printed by ``xattn_estimate`` of mit-han-lab/x-attention (e379887), run with torch in float32 on
``draw`` of the same seeds.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import strided_scores
from tests.sparsity.conftest import draw


def score_numpy(q, k, *, stride, block_size, offset, ends):
    """Score in float64, strided row by strided row."""
    batch, tokens, heads, dim = q.shape
    group = heads // k.shape[2]
    out = np.zeros((batch, heads, -(-tokens // block_size), -(-k.shape[1] // block_size)))
    for b, n in np.ndindex(batch, heads):
        # What is not a token counts as zero.
        keys, queries = np.zeros((2, out.shape[3] * block_size + offset + tokens + block_size, dim))
        keys[: ends[b]] = k[b, : ends[b], n // group]
        queries[offset : max(ends[b], offset)] = q[b, : max(ends[b] - offset, 0), n]
        for row in range(offset // stride, -(-ends[b] // stride)):
            sums = np.array([
                sum(queries[(row + 1) * stride - 1 - s] @ keys[column * stride + s] for s in range(stride))
                for column in range(row + 1)
            ])  # fmt: skip
            weights = np.exp(sums * dim**-0.5 / stride)
            for column, weight in enumerate(weights / weights.sum()):
                out[b, n, (row * stride - offset) // block_size, column * stride // block_size] += weight
    return out


def test_scores_by_hand():
    # Strided row 1 holds the queries 3 and 4, in reverse 4 and 3. Column 0: 4 * 1 + 3 * 0 = 4, column 1: 4 * 0 + 3 * 1
    # = 3. With a scale of ln 2 their weights are 16 and 8. Row 0 sees column 0 alone.
    q, k = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1.0, 0.0, 0.0, 1.0])
    scores = strided_scores(q.reshape(1, 4, 1, 1), k.reshape(1, 4, 1, 1), stride=2, block_size=2, scale=math.log(2.0))
    np.testing.assert_allclose(scores[0, 0], [[1, 0], [2 / 3, 1 / 3]], rtol=1e-6)


CASES = {
    "whole": {"tokens": 24, "keys": 24, "heads": 4, "kv": 2, "dim": 8, "stride": 4, "block_size": 8},
    "awkward": {"tokens": 19, "keys": 19, "heads": 3, "kv": 1, "dim": 5, "stride": 4, "block_size": 8},
    "padded": {
        "tokens": 24, "keys": 24, "heads": 2, "kv": 1, "dim": 8, "stride": 2, "block_size": 8, "lengths": (24, 13),
    },
    "chunk": {
        "tokens": 14, "keys": 45, "heads": 2, "kv": 2, "dim": 8, "stride": 8, "block_size": 8, "offset": 16,
        "lengths": (29, 10),
    },
    "one": {"tokens": 1, "keys": 1, "heads": 2, "kv": 2, "dim": 4, "stride": 4, "block_size": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_numpy(rng, name):
    case = {"offset": 0, "lengths": None} | CASES[name]
    q = rng.normal(size=(2, case["tokens"], case["heads"], case["dim"])).astype(np.float32) * 2
    k = rng.normal(size=(2, case["keys"], case["kv"], case["dim"])).astype(np.float32) * 2
    lengths, offset = case["lengths"], case["offset"]
    ends = np.minimum((case["keys"],) * 2 if lengths is None else lengths, offset + case["tokens"])
    for b, end in enumerate(ends):
        k[b, end:], q[b, max(end - offset, 0) :] = np.nan, np.nan
    options = {name: case[name] for name in ("stride", "block_size")}
    scored = jax.jit(lambda q, k, offset, lengths: strided_scores(q, k, offset=offset, lengths_B=lengths, **options))
    scores = scored(q, k, offset, None if lengths is None else jnp.array(lengths))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, score_numpy(q, k, offset=offset, ends=ends, **options), atol=1e-5)


OFFICIAL = {  # of each query head, the last row of blocks but one
    "block 64": (
        {"seed": 2, "tokens": 700, "heads": 2, "kv": 2, "dim": 16}, {"stride": 4, "block_size": 64},
        [[0.0025, 0.0023, 0.044, 0.0474, 6.659, 0.0408, 0.0382, 0.0007, 9.1541, 0.0108, 0],
         [0.0102, 0.0082, 0.0557, 0.0537, 7.559, 0.1142, 0.0651, 0.003, 8.1054, 0.0254, 0]],
    ),
    "chunk": (
        {"seed": 3, "tokens": 1500, "heads": 2, "kv": 2, "dim": 16}, {"stride": 16, "block_size": 128, "offset": 1024},
        [[0.868, 2.0841, 0.9905, 0.0148, 0.5442, 1.019, 0.0013, 0.9424, 0.0024, 1.1695, 0.3638, 0],
         [1.4934, 2.1051, 0.6602, 0.0007, 1.0417, 0.8602, 0.0001, 0.589, 0.0001, 0.7571, 0.4924, 0]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_scores_are_those_of_the_papers_code(name):
    inputs, options, expected = OFFICIAL[name]
    q, k = draw(**inputs)
    scores = strided_scores(q[None, options.get("offset", 0) :], k[None], **options)
    np.testing.assert_allclose(scores[0, :, -2], expected, atol=6e-5)  # printed to four digits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 3}, "multiple of stride=3"),
        ({"stride": 0}, "stride to be a whole number"),
        ({"block_size": 8.0}, "block_size to be a whole number"),
        ({"offset": 4}, "offset=4"),
        ({"offset": 8}, "offset=8"),
        ({"offset": jnp.zeros(1, jnp.int32)}, "scalar offset"),
        ({"lengths_B": jnp.zeros(3, jnp.int32)}, r"lengths \[B\]"),
        ({"k_BSKH": jnp.zeros((1, 9, 3, 4))}, "multiple of key heads"),
        ({"q_BTNH": jnp.zeros((1, 0, 2, 4))}, "T of at least 1"),
        ({"implementation": "fast"}, "one of"),
    ],
)
def test_refused(change, message):
    arguments = {"q_BTNH": jnp.zeros((1, 9, 2, 4)), "k_BSKH": jnp.zeros((1, 9, 1, 4)), "stride": 4, "block_size": 8}
    arguments |= change
    with pytest.raises(ValueError, match=message):
        strided_scores(arguments.pop("q_BTNH"), arguments.pop("k_BSKH"), **arguments)
