"""Strict settings for every test, the fixtures that all tests share, and a note on what could not be tested.

Tests run on the CPU unless JAX_PLATFORMS says otherwise (make test-gpu sets it). An implicit rank promotion raises,
matrix products run at the highest precision, and warnings are errors (pyproject.toml).
"""

import importlib.util
import os
import zlib

# Read by jax and libtpu when they are imported: do not look for accelerators that the default run does not use.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
import pytest

# importable modules -> (extra that installs them, what is skipped without them)
OPTIONAL = {
    ("torch", "transformers"): ("parity", "comparisons with transformers and torch"),
    ("libtpu",): ("tpu", "ahead-of-time compilation of the TPU kernels"),
}


def pytest_configure(config):
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_default_matmul_precision", "highest")


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


@pytest.fixture(scope="session")
def tiny_model():
    """A random transformer of 6 layers with sharp predictions that change from layer to layer, so that exits differ."""
    from dyninf.models import ModelConfig, Transformer

    config = ModelConfig(
        vocab_size=61, num_layers=6, d_model=24, d_ff=40, num_heads=6, num_kv_heads=2, head_dim=8, max_length=64
    )
    sharper = {"embedding": 50, "unembedding": 60, "wqkv": 10, "w_gate_up": 10, "wo": 60, "w_down": 60}

    def scale(path, leaf):
        names = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
        return leaf * next((sharper[name] for name in names if name in sharper), 1)

    return jax.tree_util.tree_map_with_path(scale, Transformer(config, jax.random.key(0)))


@pytest.fixture
def rng(request):
    """A numpy Generator seeded by the test's name and parameters: the same numbers in any order and any process."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
