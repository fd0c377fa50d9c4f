"""Patterns of heads side by side in one index, and the search that finds them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf.pytree import pytree
from dyninf.sparsity import (
    AShape,
    Dense,
    PerHead,
    PooledBlocks,
    Selected,
    SparsityPolicy,
    VerticalSlash,
    ZipVL,
    default_candidates,
    kept_mass,
    search_patterns,
)
from pallas_kernels import prefill_attention
from pallas_kernels.index import check_blocks
from tests.sparsity.test_vertical_slash import CASES, choose, draw, lists, mass_kept, observe, planted

LOCAL = AShape(sinks=4, window=5, block_size=4)
SLASH = VerticalSlash(vertical=2, slash=3, last_queries=7, block_size=4)
ZIP = ZipVL(mass=0.8, budget=3, probes=5, block_size=4)


@pytree(static=("window",))
class Windowed(SparsityPolicy):
    """Local blocks of which only the last keys are seen."""

    window: int
    block_size: int = 4

    def select(self, obs):
        return Selected(index=LOCAL.select(obs).index, window=self.window, sinks=1)


def test_every_head_has_what_its_pattern_chooses(rng):
    obs, _ = draw(rng, **CASES["between"])
    policy = PerHead(patterns=(LOCAL, SLASH, ZIP, Dense()), heads=((1, 0, 3, 2),))
    chosen = choose(policy, obs)
    check_blocks(chosen.index, batch=2, num_heads=4, num_queries=obs.q_BTNH.shape[1])
    found = lists(chosen.index)
    for head, pattern in ((0, SLASH), (1, LOCAL), (3, ZIP)):
        alone = choose(pattern, obs)
        np.testing.assert_array_equal(found[:, head], lists(alone.index)[:, head])
        if pattern is ZIP:
            np.testing.assert_array_equal(chosen.wanted[:, head], alone.wanted[:, head])
    for r, row in enumerate(found[0, 2]):
        assert row == set(range(min((obs.offset + 4 * r + 3) // 4 + 1, -(-obs.k_BSKH.shape[1] // 4))))
    np.testing.assert_array_equal(chosen.wanted[:, :3], chosen.index.counts[:, :3])


def test_layers_differ_and_limits_are_kept_where_all_share_them(rng):
    obs, _ = draw(rng, **CASES["whole"])
    heads = ((2,) * 4, (0, 1, 0, 1), (1,) * 4)
    policy = PerHead(patterns=(Windowed(window=6), LOCAL, Dense()), heads=heads)
    policy.validate(3, 4)
    assert policy.select(obs) is None
    seen = [PerHead(patterns=policy.patterns, heads=(layer,)) for layer in (heads[1], (0,) * 4)]
    seen = [choose(one, obs) for one in seen]
    assert [(x.window, x.sinks, x.wanted) for x in seen] == [(None, 0, None), (6, 1, None)]
    np.testing.assert_array_equal(lists(seen[0].index), lists(choose(LOCAL, obs).index))


def test_kept_mass_equals_numpy(rng):
    obs, _ = draw(rng, **(CASES["whole"] | {"lengths": (37, 37)}))
    policies = (SLASH, LOCAL, Dense())
    shares = jax.jit(functools.partial(_kept, start=9))
    kept = shares(policies, (obs.q_BTNH, obs.k_BSKH, jnp.array([37, 37])))
    want = [mass_kept(obs, choose(policy, obs).index, start=9).mean(axis=0) for policy in policies[:2]]
    np.testing.assert_allclose(kept, [*want, np.ones(4)], rtol=1e-5)
    # Of texts of 20 and 0 tokens, the first alone has queries.
    (kept,) = shares(policies, (obs.q_BTNH, obs.k_BSKH, jnp.array([20, 0])))[1:2]
    first = observe(obs.q_BTNH[:1, :20], obs.k_BSKH[:1, :20])
    np.testing.assert_allclose(kept, mass_kept(first, choose(LOCAL, first).index, start=9)[0], rtol=1e-5)


def _kept(policies, arrays, start):
    return kept_mass(observe(*arrays), policies, start)


def test_candidates_cost_the_same():
    assert default_candidates(8, 64) == (
        AShape(sinks=64, window=385, block_size=64),
        VerticalSlash(vertical=1, slash=6, block_size=64),
        VerticalSlash(vertical=3, slash=4, block_size=64),
        VerticalSlash(vertical=6, slash=1, block_size=64),
        PooledBlocks(budget=8, block_size=64),
    )
    with pytest.raises(ValueError, match="at least 4 blocks a row, got 3"):
        default_candidates(3)


def test_finds_what_is_planted_in_each_head():
    # Heads: near distances, a far one, three stripes, and rows that point at one block each.
    target = np.array([*[0] * 12, 3, 9, 1, 7, 5, 10, 2, 8])
    block = np.eye(321)[np.arange(320) // 16]
    plans = [
        planted(distances=(20, 30), tokens=320),
        planted(distances=(170,), tokens=320),
        planted(stripes=(70, 100, 150), tokens=320),
        observe(
            *(x.astype(np.float32)[None, :, None] for x in (block[target[np.arange(320) // 16] * 16] * 215, block))
        ),
    ]
    q, k = (jnp.concatenate([getattr(plan, name) for plan in plans], axis=2) for name in ("q_BTNH", "k_BSKH"))
    candidates = default_candidates(6, 16)
    kept = np.asarray(jax.jit(functools.partial(_kept, start=208))(candidates, (q, k)))
    # In the order of the candidates: what is near, slashes, stripes by number, and blocks of each row.
    local, (slash, _, stripes), pooled = kept[0], kept[1:4], kept[4]
    assert min(local[0], slash[1], stripes[2], pooled[3]) > 0.98
    assert max(local[1:].max(), slash[2], stripes[1], slash[3], stripes[3]) < 0.5


@pytree()
class Layer:
    """Attention of the states to themselves, by heads."""

    scale: float

    def __call__(self, x_BTD, positions_BT, attend):
        heads_BTNH = x_BTD.reshape(*x_BTD.shape[:2], 4, 8)
        out_BTNH, carry = attend(heads_BTNH * self.scale, heads_BTNH[:, :, ::2], heads_BTNH[:, :, 1::2])
        return x_BTD + out_BTNH.reshape(x_BTD.shape), carry


@pytree()
class Model:
    """Two layers above an embedding."""

    table: jax.Array
    layers: tuple[Layer, ...] = (Layer(scale=-2.0), Layer(scale=1.0))

    def embed(self, tokens_BT):
        return self.table[tokens_BT]


@pytest.fixture(scope="module")
def model():
    return Model(table=jax.random.normal(jax.random.key(0), (64, 32)))


def test_a_search_is_written_down_as_plain_numbers(model):
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 64, (2, 48)), jnp.int32)
    lengths, seen = jnp.array([48, 31]), []
    candidates = (LOCAL, AShape(sinks=0, window=9, block_size=4))
    found = search_patterns(model, tokens, candidates, lengths=lengths, start=12)
    found.validate(2, 4)
    assert eval(repr(found), {"PerHead": PerHead, "AShape": AShape}) == found

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def shares(model, x_BTD):
        def attend(q_BTNH, k_BTKH, v_BTKH):
            seen.append(_kept(candidates, (q_BTNH, k_BTKH, lengths), start=12))
            return prefill_attention(q_BTNH, k_BTKH, v_BTKH, lengths), None

        for layer in model.layers:
            x_BTD, _ = layer(x_BTD, None, attend)
        return jnp.stack(seen)

    best = np.argmax(shares(model, model.embed(tokens)), axis=1).tolist()
    assert found == PerHead(patterns=candidates, heads=tuple(map(tuple, best)))
    assert best[0] != best[1] and {number for layer in best for number in layer} == {0, 1}


@pytest.mark.parametrize(
    ("heads", "patterns", "message"),
    [
        (((0, 0), (0, 0)), (LOCAL,), "4 heads in each of 2 layers for PerHead, got 2 layers of"),
        (((0,) * 4,), (LOCAL,), "got 1 layers"),
        (((0, 0, 0, 1),) * 2, (LOCAL,), "numbers of the 1 patterns"),
        (((0, 0, 0, 1),) * 2, (LOCAL, PooledBlocks(budget=4)), "one block_size for PerHead"),
        (((0,) * 4,) * 2, (PooledBlocks(budget=1),), "sinks"),
    ],
    ids=["heads", "layers", "numbers", "sizes", "pattern"],
)
def test_bad_patterns_are_refused(heads, patterns, message):
    with pytest.raises(ValueError, match=message):
        PerHead(patterns=patterns, heads=heads).validate(2, 4)


def test_a_search_without_queries_is_refused(model):
    with pytest.raises(ValueError, match="among the 9 tokens of the longest text, got 9"):
        search_patterns(model, jnp.zeros((1, 12), jnp.int32), (LOCAL,), lengths=jnp.array([9]), start=9)
