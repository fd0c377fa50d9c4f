"""Models that are not ours run under a plan: plain functions over arrays, and a small Flax NNX module.

The two parts between the marks are the snippet of the README: a model without any framework, and its use.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dyninf
from dyninf.depth import Confidence, UnifiedSkip
from dyninf.model import token_logits_of


# --- snippet: the model
@dyninf.pytree()
class Block:
    wqkv: jax.Array  # [D, 3, N, H]
    wo: jax.Array  # [N, H, D]

    def __call__(self, x, positions, attend):
        q, k, v = jnp.einsum("btd,dcnh->cbtnh", x, self.wqkv)
        o, carry = attend(q, k, v)  # the cache and the policy stay behind this call
        return x + jnp.tanh(jnp.einsum("btnh,nhd->btd", o, self.wo)), carry

    def project_kv(self, x, positions):
        return tuple(jnp.einsum("btd,dcnh->cbtnh", x, self.wqkv[:, 1:]))


@dyninf.pytree()
class Model:
    table: jax.Array  # [V, D]
    layers: list[Block]

    def embed(self, tokens):
        return self.table[tokens]

    def unembed(self, x):
        return x @ self.table.T


# --- end


def random_model():
    normal, keys = jax.random.normal, jax.random.split(jax.random.key(1), 4)
    blocks = [Block(wqkv=normal(key, (24, 3, 4, 6)) / 5, wo=normal(key, (4, 6, 24))) for key in keys]
    return Model(table=normal(jax.random.key(0), (61, 24)), layers=blocks)


def test_the_snippet_exits_early():
    model = random_model()
    # --- snippet: its use
    plan = dyninf.Plan(depth=Confidence(threshold=0.95))
    out = dyninf.generate(model, [3, 1, 4, 1, 5], plan, max_new_tokens=16)
    saved = dyninf.summarize(out.stats)
    # --- end
    assert out.tokens.shape == (1, 16) and (out.tokens >= 0).all()
    assert saved["tokens"] == 15 and saved["layers_needed"] < len(model.layers)


class Mixer(nnx.Module):
    """A block with learned positions in its keys and one key/value head for all queries."""

    def __init__(self, rngs):
        self.qkv = nnx.Linear(24, 24 + 12, rngs=rngs)
        self.out = nnx.Linear(24, 24, kernel_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.where = nnx.Embed(64, 24, rngs=rngs)

    def __call__(self, x, positions, attend):
        queries = self.qkv(x + self.where(positions))[..., :24].reshape(*x.shape[:2], 4, 6)
        o, carry = attend(queries, *self.project_kv(x, positions), window=8)
        return x + self.out(o.reshape(x.shape)), carry

    def project_kv(self, x, positions):
        k, v = jnp.split(self.qkv(x + self.where(positions))[..., None, 24:], 2, axis=-1)
        return k, v


class Language(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(61, 24, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.layers = nnx.List([Mixer(rngs) for _ in range(4)])

    def embed(self, tokens):
        return self.table(tokens)

    def unembed(self, x):
        return self.table.attend(x)


@pytest.fixture(scope="module", params=["functions", "nnx"])
def theirs(request):
    return random_model() if request.param == "functions" else Language(nnx.Rngs(0))


@pytest.mark.parametrize(
    ("theirs", "fill"),
    [
        ("functions", "propagate"),
        ("nnx", "mask"),
        pytest.param("functions", "mask", marks=pytest.mark.slow),
        pytest.param("nnx", "propagate", marks=pytest.mark.slow),
    ],
    indirect=["theirs"],
)
def test_an_exit_plan_with_a_full_budget_is_dense(theirs, fill):
    prompts, lengths = np.random.default_rng(0).integers(0, 61, (2, 5)), [5, 3]

    def run(plan):
        return dyninf.generate(theirs, prompts, plan, max_new_tokens=8, lengths=lengths)

    def exits(threshold):
        return dyninf.Plan(depth=Confidence(threshold=threshold), fill=fill)

    dense, full, saving = run(None), run(exits(1.0)), run(exits(0.9))
    np.testing.assert_array_equal(full.tokens, dense.tokens)
    np.testing.assert_array_equal(full.stats.needed, dense.stats.needed)
    assert saving.stats.needed.min() < 4


def test_logits_of_a_few_tokens_are_taken_from_all(theirs, rng):
    x_BTD, ids_BTM = jnp.asarray(rng.normal(size=(2, 3, 24)), jnp.float32), jnp.asarray(rng.integers(0, 61, (2, 3, 4)))
    want = np.take_along_axis(np.asarray(theirs.unembed(x_BTD)), np.asarray(ids_BTM), axis=-1)
    np.testing.assert_array_equal(token_logits_of(theirs)(x_BTD, ids_BTM), want)


# Read and written as in the test above, whatever the model is made of.
@pytest.mark.parametrize("theirs", ["nnx", pytest.param("functions", marks=pytest.mark.slow)], indirect=True)
def test_teacher_forcing_and_a_static_schedule(theirs):
    plan, prompt = dyninf.Plan(depth=UnifiedSkip(speedup=2.0)), jnp.array([[7, 2, 9, 4]])
    out = dyninf.generate(theirs, prompt, plan, max_new_tokens=6)
    assert set(out.stats.run.tolist()) == {2}
    text = jnp.concatenate([prompt, out.tokens], axis=1)
    forced = jax.jit(dyninf.forward)(theirs, text, plan, prompt_lengths=jnp.array([4]))
    np.testing.assert_array_equal(jnp.argmax(forced.logits, axis=-1)[:, 3:-1], out.tokens)


def test_bad_tokens_are_refused_by_the_size_of_their_vocabulary(theirs):
    with pytest.raises(ValueError, match="between 0 and 60 of this model"):
        dyninf.generate(theirs, [61], max_new_tokens=1)
