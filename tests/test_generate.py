"""Generation: the cache against one uncached pass, stops, keys, donation, full caches and refused input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Plan, Temperature, TopK, chain, decode_step, forward, generate, prefill, stream
from dyninf.depth import Confidence, ExitAt, Patience, UnifiedSkip
from dyninf.models import Transformer
from dyninf.prompts import stop_matrix

V, B, T, NEW = 61, 3, 7, 9
LENGTHS = np.array([7, 4, 5])
PROMPTS = np.random.default_rng(0).integers(0, V, (B, T))
DRAW = Plan(sampler=chain(Temperature(temperature=2.0), TopK(k=20)))
NOWHERE = (60, 60, 60)  # a stop sequence that never comes up here; it fixes the shape of the stop matrix


@pytest.fixture(scope="module")
def dense(shallow_model):
    """Tokens of the dense model as lists."""
    return generate(shallow_model, PROMPTS, max_new_tokens=NEW, lengths=LENGTHS).tokens.tolist()


@pytest.mark.parametrize("windows", [None, (3, None)], ids=["full", "sliding_window"])
def test_cached_decoding_is_one_uncached_forward(shallow_roll, rng, windows):
    text = rng.integers(0, V, (B, T))
    if windows:
        config = dataclasses.replace(
            shallow_roll.model.config, num_layers=2, windows=windows, qk_norm=True, qkv_bias=True, tie_embeddings=True
        )
        shallow_roll = type(shallow_roll)(Transformer(config, jax.random.key(3)))

    def feed(state, step):
        return dataclasses.replace(state, token=jnp.asarray(text[:, step + 1], jnp.int32))

    got = shallow_roll(Plan(), text, np.ones(B, int), edit=feed)
    want = jax.jit(forward)(shallow_roll.model, jnp.asarray(text))
    np.testing.assert_allclose(got.logits, want.logits, rtol=1e-4, atol=1e-4)


def test_each_prompt_of_a_ragged_batch_is_computed_as_if_alone(shallow_model, dense):
    alone = generate(shallow_model, PROMPTS[1, :4], max_new_tokens=NEW)
    assert alone.tokens.tolist() == [dense[1]]


def cut(tokens, stop):
    """What is left of a text that ends with the first stop among its own tokens, and whether it stopped."""
    stop = [(entry,) if isinstance(entry, int) else tuple(entry) for entry in stop]
    for end in range(1, len(tokens) + 1):
        if any(len(entry) <= end and tuple(tokens[end - len(entry) : end]) == entry for entry in stop):
            return tokens[:end], True
    return tokens, False


def stops(dense):
    """Two stops each, the longest of three tokens, so that all cases share their programs."""
    first, second, third = dense
    return {
        "one token": [first[3], NOWHERE],
        "the first token": [second[0], NOWHERE],
        "a pair": [tuple(second[2:4]), NOWHERE],
        "three tokens": [tuple(third[4:7]), first[5]],
        "the last tokens": [tuple(first[-3:]), third[-1]],
        "a pair in the wrong order": [(third[3], third[2]), NOWHERE],
        "the end of the prompt and the first token": [(int(PROMPTS[0, -1]), first[0]), NOWHERE],
        "the prompt alone": [tuple(int(token) for token in PROMPTS[0, -3:]), int(PROMPTS[1, 3])],
    }


@pytest.mark.parametrize("case", list(stops([[0] * 9] * 3)))
def test_a_text_ends_with_its_first_stop(shallow_model, dense, case):
    stop = stops(dense)[case]
    got = generate(shallow_model, PROMPTS, max_new_tokens=NEW, lengths=LENGTHS, stop=stop)
    want = [cut(tokens, stop) for tokens in dense]
    for row, (tokens, stopped) in enumerate(want):
        assert got.tokens[row].tolist() == tokens + [-1] * (NEW - len(tokens))
        assert int(got.lengths[row]) == len(tokens) and bool(got.stopped[row]) == stopped
        active = got.stats.active[:, row].tolist()
        assert active == [step < len(tokens) - 1 for step in range(NEW - 1)]
    if case == "the end of the prompt and the first token":
        assert not any(stopped for _, stopped in want)

    pieces = list(stream(shallow_model, PROMPTS, max_new_tokens=NEW, lengths=LENGTHS, stop=stop))
    longest = max(len(tokens) for tokens, _ in want)
    np.testing.assert_array_equal(np.stack([tokens for tokens, _ in pieces], 1), got.tokens[:, :longest])


def test_sampling_is_decided_by_the_key(shallow_model):
    def draw(key):
        return generate(shallow_model, PROMPTS, DRAW, max_new_tokens=NEW, lengths=LENGTHS, key=key).tokens.tolist()

    one, other = draw(jax.random.key(1)), draw(jax.random.key(2))
    assert one == draw(jax.random.key(1)) and all(a != b for a, b in zip(one, other, strict=True))
    assert one == draw(jax.random.split(jax.random.key(1), B)), "one key is split over the batch"


def test_every_token_is_drawn_anew(shallow_model):
    # At this temperature all 61 tokens are equally likely: nine draws of three rows that share nothing.
    plan = Plan(sampler=chain(Temperature(temperature=1e6), TopK(k=61)))
    tokens = generate(shallow_model, PROMPTS, plan, max_new_tokens=NEW, lengths=LENGTHS, key=jax.random.key(3)).tokens
    assert all(len(set(row)) > 5 for row in tokens.tolist()) and len(set(map(tuple, tokens.tolist()))) == B


def test_a_sequence_has_its_own_key_whatever_its_neighbours(shallow_model):
    keys = jax.random.split(jax.random.key(7), B)
    one = generate(shallow_model, PROMPTS, DRAW, max_new_tokens=NEW, lengths=LENGTHS, key=keys).tokens
    order = np.array([2, 0, 1])
    other = generate(
        shallow_model, PROMPTS[order], DRAW, max_new_tokens=NEW, lengths=LENGTHS[order], key=keys[order]
    ).tokens
    np.testing.assert_array_equal(other, one[order])
    same = generate(
        shallow_model, PROMPTS[[0, 0, 0]], DRAW, max_new_tokens=NEW, lengths=LENGTHS[[0, 0, 0]], key=keys
    ).tokens
    assert len({tuple(row) for row in same.tolist()}) == B, "equal prompts with different keys"
    np.testing.assert_array_equal(same[0], one[0])
    # The key of a row is the same in a batch of any size.
    np.testing.assert_array_equal(
        jax.random.key_data(jax.random.split(keys[0], 2)), jax.random.key_data(jax.random.split(keys[0], 5)[:2])
    )


def test_one_token(shallow_model, dense):
    got = generate(shallow_model, PROMPTS, max_new_tokens=1, lengths=LENGTHS)
    assert got.tokens.tolist() == [row[:1] for row in dense] and got.lengths.tolist() == [1] * B
    assert got.stats.needed.shape == (0, B)
    assert len(list(stream(shallow_model, PROMPTS, max_new_tokens=1, lengths=LENGTHS))) == 1


def test_the_cache_is_donated_and_updated_in_place(shallow_model):
    plan = Plan(depth=Confidence(threshold=0.9))
    spec = CacheSpec(capacity=T + NEW)
    _, state = jax.jit(prefill, static_argnames="spec")(
        shallow_model, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), plan, spec, jax.random.key(0)
    )
    step = jax.jit(decode_step, donate_argnums=1).lower(shallow_model, state, plan).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    assert step.memory_analysis().alias_size_in_bytes >= size
    step(shallow_model, state, plan)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


def test_a_full_cache_ends_a_sequence(shallow_model):
    spec = CacheSpec(capacity=8)
    start = jax.jit(prefill, static_argnames="spec")
    _, state = start(shallow_model, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), Plan(), spec, jax.random.key(0))
    step, done, before = jax.jit(decode_step), [], None
    for _ in range(6):
        done.append(state.done.tolist())
        before = state if state.done[0] and before is None else before
        state, stats = step(shallow_model, state, Plan())
    # Free slots after the prompts: 1, 4 and 3.
    assert [[row[i] for row in done].index(True) if done[-1][i] else 6 for i in range(B)] == [1, 4, 3]
    assert state.cache.length.tolist() == [8, 8, 8] and not stats.active.any() and stats.needed.tolist() == [0, 0, 0]
    for old, new in zip(before.cache.layers, state.cache.layers, strict=True):
        np.testing.assert_array_equal(new.k[0], old.k[0], err_msg="a sequence that is done wrote to its cache")
    assert int(state.token[0]) == int(before.token[0])


def test_a_prompt_that_fills_the_cache_yields_its_first_token(shallow_model, dense):
    start = jax.jit(prefill, static_argnames="spec")
    arguments = (jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), Plan(), CacheSpec(capacity=T), jax.random.key(0))
    _, state = start(shallow_model, *arguments)
    assert state.token.tolist() == [row[0] for row in dense] and state.done.tolist() == [True, False, False]


@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cache", [jnp.float32, jnp.bfloat16], ids=["float32_cache", "bfloat16_cache"])
def test_the_cache_may_have_another_dtype_than_the_model(shallow_model, weights, cache):
    model = jax.tree.map(lambda leaf: leaf.astype(weights), shallow_model)
    plan, spec = Plan(depth=Confidence(threshold=0.9)), CacheSpec(capacity=12, dtype=cache)
    arguments = (jnp.asarray(PROMPTS), jnp.asarray(LENGTHS))
    logits, state = jax.eval_shape(lambda m, p: prefill(m, *arguments, p, spec, jax.random.key(0)), model, plan)
    after, _ = jax.eval_shape(decode_step, model, state, plan)
    assert logits.dtype == jnp.float32 and {layer.k.dtype for layer in state.cache.layers} == {jnp.dtype(cache)}
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "at least one token each"),
        ({"tokens": [[]]}, "at least one token each"),
        ({"tokens": np.zeros((0, 4), int)}, "at least one token each"),
        ({"tokens": [[1.5, 2.0]]}, "integers"),
        ({"tokens": [[[1]]]}, "integers"),
        ({"tokens": [[1, 2], [3]]}, "one length .* pad on the right and pass lengths"),
        ({"tokens": [[1, 2], []]}, "one length .* pad on the right and pass lengths"),
        ({"tokens": [[5, 61]]}, r"between 0 and 60 of this model, got \[61\]"),
        ({"tokens": [[-1, 5]]}, r"between 0 and 60 of this model, got \[-1\]"),
        ({"tokens": [[2**40]]}, "between 0 and 60"),
        ({"lengths": [7, 0, 4]}, r"between 1 and 7, got \[7, 0, 4\]; no prompt is empty"),
        ({"lengths": [8, 1, 4]}, "between 1 and 7"),
        ({"lengths": [7, 4]}, "one integer length per prompt"),
        ({"lengths": [7.0, 4.0, 5.0]}, "one integer length per prompt"),
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"max_new_tokens": 2.0}, "integer .* got 2.0"),
        ({"max_new_tokens": 58}, r"context of 64, got 7 \+ 58; shorten the prompt"),
        ({"stop": 5}, "list of stop tokens"),
        ({"stop": "end"}, "list of stop tokens"),
        ({"stop": ["end"]}, "list of stop tokens"),
        ({"stop": [[]]}, "list of stop tokens"),
        ({"stop": [-1]}, "list of stop tokens"),
        ({"stop": [[3, -1]]}, "list of stop tokens"),
        ({"stop": [[1.5]]}, "list of stop tokens"),
        ({"plan": DRAW, "key": None}, "expected a key for Chain"),
        ({"key": 0}, r"typed random key, got 0; pass key=jax.random.key\(seed\)"),
        ({"key": np.zeros(2, np.uint32)}, "typed random key"),
        ({"key": jnp.zeros(2, jnp.uint32)}, "typed random key"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, r"one per sequence \[3\], got shape \(2,\)"),
        ({"driver": "fast"}, "expected driver to be one of .* got 'fast'"),
        (
            {"driver": "unrolled", "plan": Plan(depth=Confidence(threshold=0.5))},
            "static schedule for driver 'unrolled'",
        ),
        ({"plan": ExitAt(layer=2)}, r"expected a Plan, got ExitAt; .* Plan\(depth=policy\)"),
        ({"plan": Plan(depth=Confidence)}, "expected depth to be a DepthPolicy"),
        ({"plan": Plan(depth=ExitAt(layer=7))}, "between 1 and 3, got 7"),
        ({"plan": Plan(depth=Confidence(threshold=1.5))}, "threshold .* got 1.5"),
        ({"plan": Plan(sampler=TopK(k=0)), "key": jax.random.key(0)}, "k .* at least 1, got 0"),
        ({"plan": Plan(sampler=ExitAt(layer=2))}, "expected sampler to be a Sampler"),
        ({"plan": Plan(sparsity="blocks")}, "expected sparsity to be a SparsityPolicy, got 'blocks'"),
        ({"plan": Plan(fill="copy")}, "expected fill 'propagate', 'mask' or 'catch_up', got 'copy'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
@pytest.mark.parametrize("start", [generate, stream], ids=["generate", "stream"])
def test_bad_input_gets_one_clear_error_before_any_work(shallow_model, start, changes, message):
    arguments = {"tokens": PROMPTS, "max_new_tokens": 3} | changes
    with pytest.raises(ValueError, match=message):
        started = start(shallow_model, arguments.pop("tokens"), **arguments)
        if "driver" in changes:  # looked up when a step is traced
            list(started)


def test_what_this_version_cannot_run_is_named(shallow_model):
    with pytest.raises(NotImplementedError, match="expected draft=None in this version, got 'a plan'"):
        generate(shallow_model, PROMPTS, Plan(draft="a plan"), max_new_tokens=3)


def test_prefill_and_decode_step_refuse_what_does_not_fit(shallow_model):
    def start(plan, capacity=9):
        arguments = (jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), plan, CacheSpec(capacity=capacity), jax.random.key(0))
        return jax.eval_shape(lambda model: prefill(model, *arguments)[1], shallow_model)

    def step(state, plan):
        return jax.eval_shape(lambda model, state: decode_step(model, state, plan), shallow_model, state)

    with pytest.raises(ValueError, match="at least 7 slots for this prompt, got 6"):
        start(Plan(), capacity=6)
    with pytest.raises(ValueError, match="between 1 and 3, got 9"):
        start(Plan(depth=ExitAt(layer=9)))
    with pytest.raises(ValueError, match="between 1 and 3, got 9"):
        step(start(Plan()), Plan(depth=ExitAt(layer=9)))
    exits = Confidence(threshold=0.5)
    for made, used in [
        (Plan(), Plan(depth=exits, fill="mask")),  # would read slots that nothing marks as empty
        (Plan(depth=exits, fill="mask"), Plan(depth=exits)),
        (Plan(), Plan(depth=Patience(patience=2))),
    ]:
        with pytest.raises(ValueError, match="a state that was made for this plan"):
            step(start(made), used)
    step(start(Plan()), Plan(depth=exits))  # another policy over the same kind of state is fine


def test_forward_refuses_what_one_pass_cannot_hold(shallow_model):
    with pytest.raises(ValueError, match="expected another driver than 'unrolled'"):
        forward(shallow_model, jnp.asarray(PROMPTS), Plan(depth=UnifiedSkip(speedup=1.5)), driver="unrolled")


def test_scan_refuses_layers_that_differ(shallow_model):
    config = dataclasses.replace(shallow_model.config, num_layers=2, windows=(3, None))
    with pytest.raises(ValueError, match="layers of one structure for driver 'scan'"):
        generate(Transformer(config, jax.random.key(0)), PROMPTS, max_new_tokens=3, driver="scan")


def test_stop_matrix_by_hand():
    matrix = stop_matrix([5, (1, 2, 3), np.int64(7), [4, 4]])
    assert matrix.tolist() == [[-1, -1, 5], [1, 2, 3], [-1, -1, 7], [-1, 4, 4]] and matrix.dtype == jnp.int32
    assert stop_matrix(()).shape == (0, 0) and stop_matrix(np.array([3, 4])).tolist() == [[3], [4]]
