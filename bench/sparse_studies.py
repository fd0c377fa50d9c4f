"""The two studies of ``bench/sparse_quality.py``: each makes its texts once and returns what measures a policy on them.

Attention is judged on the exact states of a model: a text runs dense, and in each layer a policy chooses and attends
beside it. No error of a layer reaches the next one.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dyninf
from bench.attention_mass import run_layers
from bench.budget_studies import TASKS, task_samples, text_windows
from bench.prompt_inputs import planted_inputs
from dyninf.cli.common import Loaded
from dyninf.cli.heldout import FILE
from dyninf.models import Transformer
from dyninf.pytree import pytree
from dyninf.sparsity import PromptObs, SparsityPolicy, density
from dyninf.tasks import Sample, evaluate_task
from pallas_kernels import block_sparse_attention, prefill_attention

PLANTED = argparse.Namespace(heads=4, kv_heads=2, head_dim=64, dtype="float32")  # heads of both shipped models
Measure = Callable[[SparsityPolicy], dict[str, Any]]


@pytree()
class Exact:
    """What the attention of a layer reads and gives; all arrays may have leading axes of layers.

    Attributes:
        lse_BNT: logarithms of the sums of exponentials, float32.
        lengths_B: tokens that exist.
    """

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    o_BTNH: jax.Array
    lse_BNT: jax.Array
    lengths_B: jax.Array


@pytree()
class Judged:
    """What a policy leaves of the attention of each text ``[B]``, means over queries that exist and heads.

    Attributes:
        mass: share of the exact probability on what is attended to.
        error: ``|o - o_exact| / |o_exact|`` of the attention outputs.
        density: blocks that are attended to over those of dense attention.
    """

    mass: jax.Array
    error: jax.Array
    density: jax.Array


def judge(policy: SparsityPolicy, exact: Exact) -> Judged:
    """Return what a policy leaves of the attention of a layer.

    The sums of exponentials say what is attended to, to the token: their quotient is the share of the probability.
    """
    q_BTNH, k_BTKH, lengths_B = exact.q_BTNH, exact.k_BTKH, exact.lengths_B
    batch, length = q_BTNH.shape[:2]
    obs = PromptObs(layer=0, q_BTNH=q_BTNH, k_BSKH=k_BTKH, lengths_B=lengths_B)
    selected = policy.select(obs)
    if selected is None:
        return Judged(mass=jnp.ones(batch), error=jnp.zeros(batch), density=jnp.ones(batch))
    about = {"window": selected.window, "sinks": selected.sinks, "with_lse": True}
    o_BTNH, lse_BNT = block_sparse_attention(q_BTNH, k_BTKH, exact.v_BTKH, selected.index, lengths_B, **about)
    moved_BTN, size_BTN = (
        jnp.linalg.norm(x.astype(jnp.float32), axis=3) for x in (o_BTNH - exact.o_BTNH, exact.o_BTNH)
    )
    live_BT = jnp.arange(length)[None] < lengths_B[:, None]

    def mean(x_BTN):
        return jnp.sum(jnp.where(live_BT[:, :, None], x_BTN, 0.0), axis=(1, 2)) / (lengths_B * x_BTN.shape[2])

    return Judged(
        mass=mean(jnp.moveaxis(jnp.exp(lse_BNT - exact.lse_BNT), 1, 2)),
        error=mean(moved_BTN / size_BTN),
        density=jnp.mean(density(selected, obs).attended, axis=1),
    )


@jax.jit
def exact_layers(model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array) -> Exact:
    """Return the states and the attention of every layer of texts that run dense, layers first."""

    def attend(number, q_BTNH, k_BTKH, v_BTKH):
        o_BTNH, lse_BNT = prefill_attention(q_BTNH, k_BTKH, v_BTKH, lengths_B, with_lse=True)
        return o_BTNH, Exact(
            q_BTNH=q_BTNH, k_BTKH=k_BTKH, v_BTKH=v_BTKH, o_BTNH=o_BTNH, lse_BNT=lse_BNT, lengths_B=lengths_B
        )

    return jax.tree.map(lambda *layers: jnp.stack(layers), *run_layers(model, tokens_BT, attend))


@functools.partial(jax.jit, static_argnums=0)
def exact_planted(tokens: int) -> Exact:
    """Return one layer of planted queries and keys, which attend to neighbours, first tokens and stripes of blocks."""
    q_BTNH, k_BTKH, v_BTKH = planted_inputs(tokens, PLANTED)
    lengths_B = jnp.full(1, tokens)
    o_BTNH, lse_BNT = prefill_attention(q_BTNH, k_BTKH, v_BTKH, lengths_B, with_lse=True)
    parts = {"q_BTNH": q_BTNH, "k_BTKH": k_BTKH, "v_BTKH": v_BTKH, "o_BTNH": o_BTNH, "lse_BNT": lse_BNT}
    return jax.tree.map(lambda x: x[None], Exact(lengths_B=lengths_B, **parts))


@jax.jit
def judge_layers(policy: SparsityPolicy, exact: Exact) -> Judged:
    """Return what a policy leaves of the attention of each of L layers ``[L, B]``, one after the other.

    One program serves all layers, so that the policy has to be alike in all of them.
    """
    return jax.lax.map(lambda layer: judge(policy, layer), exact)


def prepare_mass(loaded: Loaded | None, arguments: argparse.Namespace) -> Measure:
    """Return what judges attention: mass, error and density, means over layers, heads, queries and texts.

    Texts are windows where held-out text lies beside the model, else prompts of the tasks; planted without a model.
    """
    if loaded is None:
        texts = [exact_planted(arguments.length)]
    elif (loaded.folder / FILE).is_file():
        texts = _run(loaded.model, list(text_windows(loaded, arguments).inputs), arguments.length)
    else:
        texts = _run(loaded.model, [sample.prompt_ids for sample in task_samples(loaded, arguments)], arguments.length)

    def measure(policy: SparsityPolicy) -> dict[str, Any]:
        judged = [jax.device_get(judge_layers(policy, exact)) for exact in texts]
        names = ("mass", "error", "density")
        means = {name: float(np.mean([getattr(text, name) for text in judged])) for name in names}
        return {name: round(mean, 5) for name, mean in means.items()} | {"texts": len(texts)}

    return measure


def prepare_tasks(loaded: Loaded, arguments: argparse.Namespace) -> Measure:
    """Return what answers the tasks: the share of answers that are right token for token, and the mean score.

    The density is that of the choice on exact states, of one prompt a task.
    """
    samples = task_samples(loaded, arguments)
    prompts = _run(loaded.model, [sample.prompt_ids for sample in _first_of_each(samples)], arguments.length)

    def measure(policy: SparsityPolicy) -> dict[str, Any]:
        plan, stop = dyninf.Plan(sparsity=policy), loaded.model.config.eos_ids
        results = evaluate_task(loaded.model, plan, samples, batch_size=arguments.batch, stop=stop).results
        found: dict[str, Any] = {
            name: {
                task: round(float(np.mean([getattr(x, name) for x in results if x.task == task])), 5) for task in TASKS
            }
            for name in ("exact", "score")
        }
        held = [jax.device_get(judge_layers(policy, exact).density) for exact in prompts]
        return found | {"density": round(float(np.mean(held)), 5)}

    return measure


def _run(model: Transformer, texts: list, length: int) -> list[Exact]:
    """Return the layers of each text, one at a time, padded to one length."""
    found = []
    for text in texts:
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(text)] = text
        found.append(exact_layers(model, tokens, np.asarray([len(text)], np.int32)))
    return found


def _first_of_each(samples: list[Sample]) -> list[Sample]:
    return [next(sample for sample in samples if sample.task == task) for task in TASKS]
