"""Dense attention against loops in numpy float64: lengths, heads, windows, masks and what is never read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, prefill_attention

B, H = 3, 8
# Compiled as one program: op by op, every shape would compile twenty.
prefill = jax.jit(prefill_attention, static_argnames=("window", "implementation"))
decode = jax.jit(decode_attention, static_argnames=("window", "implementation"))
HEADS = {"mha": (3, 3), "gqa": (6, 2), "mqa": (4, 1)}


def numpy_attention(q, k, v, readable):
    """Attend with plain loops; ``readable(b, t, s)`` says whether query t of sequence b may read key s."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        slots = [s for s in range(k.shape[1]) if readable(b, t, s)]
        if slots:
            scores = k[b, slots, n // group] @ q[b, t, n] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights / weights.sum() @ v[b, slots, n // group]
    return out


def arrays(rng, num_queries, num_keys, heads="gqa", dtype=jnp.float32, head_dim=H, scale=2.0):
    num_heads, num_kv = HEADS[heads]
    shapes = [(B, num_queries, num_heads), (B, num_keys, num_kv), (B, num_keys, num_kv)]
    return [jnp.asarray(scale * rng.normal(size=(*shape, head_dim)), dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("heads", "length", "window"),
    [("mha", 17, None), ("gqa", 17, 5), ("mqa", 17, 1), ("gqa", 1, None), ("mqa", 2, 100), ("mha", 2, 1)],
)
def test_prefill_is_causal_attention(rng, heads, length, window):
    q, k, v = arrays(rng, length, length, heads)
    lengths = np.array([length, max(1, length // 2), 1])
    got = np.asarray(prefill(q, k, v, jnp.asarray(lengths), window=window))
    want = numpy_attention(q, k, v, lambda b, t, s: s <= t and s < lengths[b] and (window is None or s > t - window))
    for row, count in enumerate(lengths):
        np.testing.assert_allclose(got[row, :count], want[row, :count], atol=1e-5)
    assert np.isfinite(got).all() and got.shape == q.shape


def test_prefill_without_lengths_pads_nothing(rng):
    q, k, v = arrays(rng, 5, 5)
    np.testing.assert_allclose(prefill(q, k, v, None), prefill(q, k, v, jnp.full(B, 5)), atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "num_queries", "num_keys", "window"),
    [
        ("mha", 1, 1, None),
        ("gqa", 1, 13, None),
        ("mqa", 1, 13, 5),
        ("gqa", 4, 13, 5),
        ("mha", 4, 13, None),
        ("gqa", 2, 5, 1),
    ],
)
def test_decode_reads_up_to_its_position(rng, heads, num_queries, num_keys, window):
    q, k, v = arrays(rng, num_queries, num_keys, heads)
    last = np.array([num_keys - 1, min(6, num_keys - 1), 0])
    positions = last[:, None] - np.arange(num_queries)[::-1][None]  # some are negative: they read nothing
    got = decode(q, k, v, jnp.asarray(positions), window=window)
    want = numpy_attention(
        q, k, v, lambda b, t, s: s <= positions[b, t] and (window is None or s > positions[b, t] - window)
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert not np.asarray(got)[positions < 0].any()


def test_masked_tokens_and_slots_are_not_attended(rng):
    q, k, v = arrays(rng, 9, 9)
    keep, lengths = rng.random((B, 9)) < 0.5, np.array([9, 6, 3])
    keep[0, 0] = False  # the first query of the first sequence reads nothing
    got = np.asarray(prefill(q, k, v, jnp.asarray(lengths), keep_BT=jnp.asarray(keep), window=4))
    want = numpy_attention(q, k, v, lambda b, t, s: s <= t and s > t - 4 and s < lengths[b] and keep[b, s])
    for row, count in enumerate(lengths):
        np.testing.assert_allclose(got[row, :count], want[row, :count], atol=1e-5)
    assert not got[0, 0].any()

    valid, positions = rng.random((B, 9)) < 0.5, np.array([[8], [4], [0]])
    valid[2] = False
    got = np.asarray(decode(q[:, :1], k, v, jnp.asarray(positions), valid_BS=jnp.asarray(valid)))
    want = numpy_attention(q[:, :1], k, v, lambda b, t, s: s <= positions[b, t] and valid[b, s])
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert not got[2].any(), "a row that may read nothing gives zeros"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_read_changes_nothing(rng, bad):
    q, k, v = arrays(rng, 1, 11)
    positions, valid = jnp.array([[10], [5], [-1]]), np.ones((B, 11), bool)
    valid[0, [2, 3]] = False
    unread = (np.arange(11)[None] > np.asarray(positions)) | ~valid | (np.arange(11)[None] <= np.asarray(positions) - 7)
    spoilt = [jnp.where(jnp.asarray(unread)[:, :, None, None], bad, array) for array in (k, v)]
    arguments = {"valid_BS": jnp.asarray(valid), "window": 7}
    clean = decode(q, k, v, positions, **arguments)
    np.testing.assert_array_equal(decode(q, *spoilt, positions, **arguments), clean)

    q, k, v = arrays(rng, 11, 11)
    lengths, keep = jnp.array([11, 6, 1]), np.ones((B, 11), bool)
    keep[0, [2, 3]] = False
    unread = (np.arange(11)[None] >= np.asarray(lengths)[:, None]) | ~keep
    spoilt = [jnp.where(jnp.asarray(unread)[:, :, None, None], bad, array) for array in (k, v)]
    clean = prefill(q, k, v, lengths, keep_BT=jnp.asarray(keep))
    np.testing.assert_array_equal(prefill(q, *spoilt, lengths, keep_BT=jnp.asarray(keep)), clean)


def test_huge_scores_do_not_overflow(rng):
    q, k, v = arrays(rng, 4, 4, scale=1e4)
    got = prefill(q, k, v, jnp.full(B, 4))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, numpy_attention(q, k, v, lambda b, t, s: s <= t), rtol=1e-4)


def test_gradients_are_finite_where_nothing_is_read(rng):
    q, k, v = arrays(rng, 5, 5)
    keep = jnp.zeros((B, 5), bool).at[0, 2].set(True)
    gradients = jax.grad(lambda qkv: prefill(*qkv, jnp.array([5, 2, 1]), keep_BT=keep).sum())((q, k, v))
    assert all(np.isfinite(leaf).all() for leaf in gradients)
    assert np.asarray(gradients[2])[0, 2].all() and not np.asarray(gradients[2])[1:].any()


def low_precision(q, k, v, mask):
    """The same maths, every intermediate in the dtype of the input."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * jnp.asarray(q.shape[3] ** -0.5, q.dtype)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v)


def worst(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("num_keys", [1, 113])
def test_error_is_within_twice_that_of_the_same_maths_in_the_input_dtype(rng, dtype, num_keys):
    q, k, v = arrays(rng, num_keys, num_keys, dtype=dtype, head_dim=16, scale=1.0)
    want = numpy_attention(q, k, v, lambda b, t, s: s <= t)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((num_keys, num_keys), bool)), (B, num_keys, num_keys))
    allowed = 2 * worst(low_precision(q, k, v, mask), want) + float(jnp.finfo(dtype).eps)
    got = prefill(q, k, v, jnp.full(B, num_keys))
    assert got.dtype == dtype and worst(got, want) <= allowed
    got = decode(q[:, -1:], k, v, jnp.full((B, 1), num_keys - 1))
    assert got.dtype == dtype and worst(got, want[:, -1:]) <= allowed


def test_a_cache_of_another_dtype_keeps_the_dtype_of_the_queries(rng):
    q, k, v = arrays(rng, 1, 7)
    positions = jnp.full((B, 1), 6)
    want = decode(q, k, v, positions)
    got = decode(q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16), positions)
    assert got.dtype == jnp.float32 and 0 < worst(got, np.asarray(want)) < 0.1
    assert decode(q.astype(jnp.bfloat16), k, v, positions).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (3, 4, 6)}, r"expected q \[B, T, N, H\]"),
        ({"v": (3, 4, 2, 9)}, "k, v of one shape"),
        ({"q": (2, 4, 6, 8)}, "one batch"),
        ({"q": (3, 4, 5, 8)}, "query heads a multiple of key/value heads"),
        ({"q": (3, 4, 6, 7)}, "one batch and head_dim"),
        ({"window": 0}, "window of at least 1 token, got 0"),
        ({"window": -2}, "window of at least 1 token, got -2"),
        ({"implementation": "triton"}, r"'cudnn'.*'xla'\], got 'triton'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("operation", [prefill_attention, decode_attention])
def test_what_does_not_fit_is_refused(operation, change, message):
    shapes = {"q": (3, 4, 6, 8), "k": (3, 4, 2, 8), "v": (3, 4, 2, 8)}
    q, k, v = (jnp.zeros(change.get(name, shape)) for name, shape in shapes.items())
    options = {name: value for name, value in change.items() if name not in shapes}
    last = jnp.ones(3, jnp.int32) if operation is prefill_attention else jnp.ones((3, 4), jnp.int32)
    with pytest.raises(ValueError, match=message):
        operation(q, k, v, last, **options)


@pytest.mark.parametrize(
    ("operation", "last", "options", "message"),
    [
        (prefill_attention, (1,), {}, r"lengths \[B\] of shape \(3,\), got \(1,\)"),
        (prefill_attention, (3,), {"keep_BT": (3, 1)}, r"keep \[B, T\] of shape \(3, 4\), got \(3, 1\)"),
        (decode_attention, (3, 1), {}, r"positions \[B, T\] of shape \(3, 4\), got \(3, 1\)"),
        (decode_attention, (3, 4), {"valid_BS": (1, 4)}, r"valid \[B, S\] of shape \(3, 4\), got \(1, 4\)"),
    ],
    ids=["lengths", "keep", "positions", "valid"],
)
def test_a_shape_that_would_be_broadcast_in_silence_is_refused(operation, last, options, message):
    q, k, v = jnp.zeros((3, 4, 6, 8)), jnp.zeros((3, 4, 2, 8)), jnp.zeros((3, 4, 2, 8))
    options = {name: jnp.ones(shape, bool) for name, shape in options.items()}
    with pytest.raises(ValueError, match=message):
        operation(q, k, v, jnp.ones(last, jnp.int32), **options)


def test_prefill_needs_as_many_keys_as_queries(rng):
    q, k, v = arrays(rng, 4, 5)
    with pytest.raises(ValueError, match="as many keys as queries, got 5 and 4"):
        prefill_attention(q, k, v, jnp.ones(B, jnp.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("length", "head_dim"), [(1, 64), (2, 128), (113, 64), (257, 128)])
def test_cudnn_agrees_with_xla_on_a_gpu(rng, dtype, length, head_dim):
    q, k, v = arrays(rng, length, length, "gqa", dtype, head_dim, scale=1.0)
    wide = [array.astype(jnp.float32) for array in (q, k, v)]
    lengths = jnp.array([length, max(1, length // 3), 1])
    mask = jnp.tril(jnp.ones((length, length), bool))[None] & (jnp.arange(length)[None] < lengths[:, None])[:, None]
    eps = float(jnp.finfo(dtype).eps)
    for window in (None, 5):
        near = jnp.arange(length)[:, None] - jnp.arange(length)[None] < (window or length)
        want = np.asarray(prefill(*wide, lengths, window=window, implementation="xla"), np.float64)
        got = np.asarray(prefill(q, k, v, lengths, window=window, implementation="cudnn"), np.float64)
        low = np.asarray(low_precision(q, k, v, mask & near[None]), np.float64)
        for row, count in enumerate(lengths.tolist()):
            allowed = 2 * np.abs(low[row, :count] - want[row, :count]).max() + eps
            assert np.abs(got[row, :count] - want[row, :count]).max() <= allowed

    # The second sequence is done with a full cache and asks for the slot behind the last one; the third reads nothing.
    positions = jnp.array([[length // 2], [length], [-1]])
    want = np.asarray(decode(wide[0][:, :1], *wide[1:], positions, implementation="xla"), np.float64)
    got = np.asarray(decode(q[:, :1], k, v, positions, implementation="cudnn"), np.float64)
    low = low_precision(q[:, :1], k, v, (jnp.arange(length)[None] <= positions)[:, None])
    allowed = 2 * np.abs(np.asarray(low, np.float64)[:2] - want[:2]).max() + eps
    assert np.abs(got - want).max() <= allowed and not got[2].any()
