"""Strict settings for every test, the fixtures that all tests share, and a note on what could not be tested.

Tests run on the CPU unless JAX_PLATFORMS says otherwise (make test-gpu sets it), which simulates eight devices for what
is laid out on a mesh; all else runs on the first. An implicit rank promotion raises, matrix products run at the highest
precision, and warnings are errors (pyproject.toml).
"""

import ctypes
import dataclasses
import functools
import gc
import importlib.util
import os
import zlib
from pathlib import Path
from typing import Any

# Read by jax and libtpu when they are imported: do not look for accelerators that the default run does not use.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("NPROC", "16")  # threads of the CPU client: a device that waits, in LAPACK too, keeps one
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several test processes compile for TPUs at once
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # and share a GPU
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Compiling takes most of the time of these tests, so that nothing is optimised. A program's code is emitted in one
    # part, and that of fusions as LLVM's in place of MLIR's: without these two, compiling takes twice as long.
    quick = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    quick += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyninf import CacheSpec, Greedy, decode_step, forward, prefill, pytree
from dyninf.depth_loop import default_driver
from dyninf.kv.low_rank import LowRankCache
from dyninf.models import ModelConfig, Transformer
from dyninf.sampling import Sampler

# importable modules -> (extra that installs them, what is skipped without them)
OPTIONAL = {
    ("torch", "transformers"): ("parity", "comparisons with transformers and torch"),
    ("libtpu",): ("tpu", "ahead-of-time compilation of the TPU kernels"),
}


def pytest_configure(config):
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_num_cpu_devices", 8)
    # Programs in flight together take threads from each other, and collectives wait for all eight devices.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def pytest_collection_finish(session):
    # What was imported stays; tracing makes many objects, and looking through all of them is a tenth of the time.
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def pytest_report_header(config):
    return f"jax {jax.__version__} on {os.environ['JAX_PLATFORMS']}"


def pytest_runtest_setup(item):
    wanted = 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0
    found = len(jax.devices()) if wanted and jax.default_backend() == "gpu" else 0
    if found < wanted:
        pytest.skip(f"needs {wanted} GPU(s), found {found}")


def pytest_terminal_summary(terminalreporter):
    for modules, (extra, skipped) in OPTIONAL.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            terminalreporter.write_line(
                f"skipped, {' and '.join(missing)} not installed: {skipped}; make test TEST_EXTRAS={extra} runs them"
            )


@pytest.fixture(scope="module", autouse=True)
def bounded_mappings():
    """Forget compiled programs before they use up a process's memory mappings, of which Linux allows 65530.

    A program takes ten or more; without them XLA ends the process with a segmentation fault. And before they take
    more than 4 GiB, which glibc keeps unless told.
    """
    yield
    mappings, sizes = Path("/proc/self/maps"), Path("/proc/self/statm")
    if not mappings.exists():
        return
    resident = int(sizes.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if mappings.read_bytes().count(b"\n") > 40_000 or resident > 4 * 2**30:
        jax.clear_caches()
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


@pytest.fixture
def rng(request):
    """A numpy Generator seeded by the test's name and parameters: the same numbers in any order and any process."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


TINY = ModelConfig(
    vocab_size=61, num_layers=6, d_model=24, d_ff=40, num_heads=6, num_kv_heads=2, head_dim=8, max_length=64
)


@pytest.fixture(scope="session")
def tiny_model():
    """A random transformer of 6 layers with sharp predictions that change from layer to layer, so that exits differ."""
    return _sharp(TINY)


@pytest.fixture(scope="session")
def shallow_model():
    """The same with 3 layers, for tests that need no more: its programs compile in half the time."""
    return _sharp(dataclasses.replace(TINY, num_layers=3))


@pytest.fixture(scope="session")
def even_model():
    """The same with sizes that eight devices split evenly, but for the key/value heads, which four do."""
    sizes = {"vocab_size": 64, "d_model": 24, "d_ff": 40, "num_heads": 8, "num_kv_heads": 4, "head_dim": 6}
    return _sharp(ModelConfig(**sizes, num_layers=6, max_length=64))


@pytest.fixture(scope="session")
def wide_model():
    """The same with sizes of which a GPU's kernels take most: a few sequences' states are 256 numbers, heads 64."""
    sizes = {"vocab_size": 64, "d_model": 64, "d_ff": 96, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
    return _sharp(ModelConfig(**sizes, num_layers=4, max_length=64))


def _sharp(config):
    sharper = {"embedding": 50, "unembedding": 60, "wqkv": 10, "w_gate_up": 10, "wo": 60, "w_down": 60}

    def scale(path, leaf):
        names = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
        return leaf * next((sharper[name] for name in names if name in sharper), 1)

    return jax.tree_util.tree_map_with_path(scale, Transformer(config, jax.random.key(0)))


@pytest.fixture(scope="session")
def roller():
    """The class :class:`Roll`, for tests that roll another model."""
    return Roll


@pytest.fixture(scope="session")
def roll(tiny_model):
    """Decode under a plan and keep everything: see :class:`Roll`."""
    return Roll(tiny_model)


@pytest.fixture(scope="session")
def shallow_roll(shallow_model):
    """The same with the model of 3 layers."""
    return Roll(shallow_model)


@dataclasses.dataclass
class Rollout:
    """What a plan did: tokens ``[B, 1 + n]``, logits ``[B, 1 + n, V]``, counts of n decode steps, the last state."""

    tokens: np.ndarray
    logits: np.ndarray
    stats: Any
    state: Any


@pytree(static=("seen",))
class Tap(Sampler):
    """Take the most probable token and keep the logits for the function that is being traced."""

    seen: Any

    def __call__(self, logits_BV, key_B):
        self.seen.append(logits_BV)
        return Greedy()(logits_BV, key_B)


class Roll:
    """Decode greedily, one step at a time; every call of the same shapes uses the same compiled programs."""

    capacity = 20
    steps = 6

    def __init__(self, model):
        # Compiling takes nearly all the time of these tests.
        quick = {"xla_backend_optimization_level": 0}
        self.model = model
        self.spec = CacheSpec(capacity=self.capacity)
        self.prefill = jax.jit(prefill, static_argnames=("spec",), compiler_options=quick)
        self.forward = jax.jit(forward, static_argnames=("driver",), compiler_options=quick)
        self.step = jax.jit(self._step, static_argnames=("driver",), compiler_options=quick)

    @staticmethod
    def _step(model, state, plan, driver):
        seen = []
        state, stats = decode_step(model, state, dataclasses.replace(plan, sampler=Tap(seen=seen)), driver=driver)
        return state, stats, seen[0]

    @property
    def traces(self):
        """How many programs were traced so far."""
        return self.prefill._cache_size() + self.step._cache_size()

    def __call__(self, plan, tokens, lengths, *, driver=None, edit=lambda state, step: state):
        """Decode ``steps`` tokens after the first; ``edit(state, step)`` may change the state before each step."""
        # Named even where it is the default, so that both ways of asking share a program.
        driver = driver or default_driver(self.model.layers, plan)
        keys = jax.random.split(jax.random.key(1), len(tokens))
        first, state = self.prefill(self.model, jnp.asarray(tokens), jnp.asarray(lengths), plan, self.spec, keys)
        chosen, logits, counts = [state.token], [first], []
        for step in range(self.steps):
            state, stats, after = self.step(self.model, edit(state, step), plan, driver)
            chosen, logits, counts = [*chosen, state.token], [*logits, after], [*counts, stats]
        stats = jax.tree.map(lambda *leaves: np.stack(leaves), *counts)
        return Rollout(tokens=np.stack(chosen, 1), logits=np.stack(logits, 1), stats=stats, state=state)

    def step_of_shapes(self, plan, *, used=None, driver="unrolled"):
        """Trace a step of a state that was made for a plan, which another may use, without compiling anything."""
        start, key = functools.partial(prefill, spec=self.spec), jax.random.key(0)
        tokens, lengths = np.zeros((1, 9), np.int32), np.array([9], np.int32)
        _, state = jax.eval_shape(start, self.model, tokens, lengths, plan, key=key)
        return jax.eval_shape(functools.partial(decode_step, driver=driver), self.model, state, used or plan)

    def empty(self, state):
        """Mark the slots of every layer that hold nothing yet ``[L, B, S]``."""
        used = np.minimum(np.asarray(state.cache.length)[None], np.array(state.cache.slots)[:, None])
        return np.arange(state.cache.capacity)[None, None] >= used[:, :, None]

    def poison(self, state, entries_LBS):
        """Put NaN into the keys and values of the marked entries."""
        layers = []
        for cache, entries_BS in zip(state.cache.layers, entries_LBS, strict=True):
            bad = jnp.asarray(entries_BS)[:, : cache.v.shape[1], None, None]
            cache = dataclasses.replace(cache, v=jnp.where(bad, jnp.nan, cache.v))
            if isinstance(cache, LowRankCache):
                layers.append(self._poison_low_rank(cache, bad))
                continue
            layers.append(dataclasses.replace(cache, k=jnp.where(bad, jnp.nan, cache.k)))
        return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=tuple(layers)))

    @staticmethod
    def _poison_low_rank(cache, bad_BS11):
        """Put NaN into the exact keys at these positions, and into pages and outliers that do not exist."""
        (pages, size), outliers = cache.u.shape[1:3], cache.outliers.shape[2] * cache.u.shape[2]
        later_BE = cache.start[:, None] + jnp.arange(cache.k.shape[1] - outliers)[None]
        last = bad_BS11.shape[1] - 1
        unused_BE = jnp.take_along_axis(bad_BS11[:, :, 0, 0], jnp.minimum(later_BE, last), axis=1) | (later_BE > last)
        unused_BO = jnp.arange(outliers)[None] >= cache.start[:, None]
        unused = jnp.concatenate([unused_BO, unused_BE], axis=1)[:, :, None, None]
        beyond = (jnp.arange(pages)[None] >= cache.start[:, None] // size)[:, :, None, None]
        return dataclasses.replace(
            cache,
            k=jnp.where(unused, jnp.nan, cache.k),
            u=jnp.where(beyond, jnp.nan, cache.u),
            landmarks=jnp.where(beyond, jnp.nan, cache.landmarks),
        )
