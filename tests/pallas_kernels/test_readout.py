"""The readout against NumPy in float64: by hand, at random, and its kernels interpreted, compiled and lowered."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.readout import READOUT, exit_readout, read_logits, reference
from tests.pallas_kernels.tpus import in_turn

NUMBERS = ("top", "second", "logsumexp", "entropy")
needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the GPU kernel needs jax 0.11.2")


def numpy_readout(logits):
    """What float64 logits ``[B, V]`` say, by sorting and by loops over the defined rows."""
    out = {name: np.full(len(logits), np.nan) for name in NUMBERS} | {"token": np.full(len(logits), -1)}
    for row, z in enumerate(np.asarray(logits, np.float64)):
        if not np.isfinite(z.max()):
            continue
        probs = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        entropy = -(probs[probs > 0] * np.log(probs[probs > 0])).sum()
        second = np.sort([-np.inf, *z])[-2]
        numbers = (z.max(), second, z.max() + np.log(np.exp(z - z.max()).sum()), entropy, np.argmax(z))
        for name, value in zip(out, numbers, strict=True):
            out[name][row] = value
    return out


def assert_reads(got, logits, *, tokens=None, rtol=1e-5, atol=1e-5):
    want = numpy_readout(logits)
    for name in NUMBERS:
        np.testing.assert_allclose(getattr(got, name), want[name], rtol=rtol, atol=atol, err_msg=name)
    np.testing.assert_array_equal(got.token, want["token"] if tokens is None else np.asarray(tokens)[want["token"]])
    assert got.token.dtype == jnp.int32 and got.num_tokens == logits.shape[1]
    assert not (got.max_prob > 1).any() and not (got.entropy < 0).any()


def norm(x, scale, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(scale, np.float64)


@pytest.mark.parametrize(
    ("logits", "second", "logsumexp", "entropy", "token"),
    [
        # ln 1/2, ln 1/4, ln 1/4: they sum to 1; H = 1/2 ln 2 + 2 * 1/4 ln 4
        (np.log([0.25, 0.5, 0.25]), np.log(0.25), 0.0, 1.039721, 1),
        # two of three equal, shifted: lse = 5 + ln(2 + e^-3) = 5 + ln 2.049787; p = 0.487856 twice and 0.024289
        ([2.0, 5.0, 5.0], 5.0, 5.717736, 0.790601, 1),
        # impossible tokens count for nothing; H = 0.75 ln(4/3) + 0.25 ln 4
        ([-np.inf, np.log(0.25), -np.inf, np.log(0.75)], np.log(0.25), 0.0, 0.562335, 3),
        ([3.0], -np.inf, 3.0, 0.0, 0),
        ([-np.inf, 7.0], -np.inf, 7.0, 0.0, 1),
    ],
    ids=["plain", "tie", "impossible", "alone", "certain"],
)
def test_by_hand(logits, second, logsumexp, entropy, token):
    got = read_logits(jnp.asarray(logits, jnp.float32))
    numbers = [got.top, got.second, got.logsumexp, got.entropy]
    np.testing.assert_allclose(numbers, [np.max(logits), second, logsumexp, entropy], atol=2e-6)
    assert got.token == token and got.num_tokens == len(logits)
    np.testing.assert_allclose(got.max_prob - got.margin, np.exp(second - logsumexp), atol=2e-6)


@pytest.mark.parametrize("logits", [[0.0, np.nan, 1.0], [0.0, np.inf], [-np.inf, -np.inf]], ids=str)
def test_an_undefined_softmax_exceeds_no_threshold(logits):
    got = read_logits(jnp.asarray(logits))
    assert all(np.isnan(getattr(got, name)) for name in (*NUMBERS, "max_prob", "margin")) and got.token == -1


def test_parts_of_a_vocabulary_are_merged_by_hand():
    # Token 4 has ln 2 and token 0 has 0 in the first part, token 9 has ln 2 in the second, the third saw nothing.
    # Sums relative to ln 2: total 1 + 1/2 and 1; moment -1/2 ln 2 and 0. So p = 0.4, 0.2, 0.4.
    two = float(np.log(2))
    columns = [(two, two, -np.inf), (0.0, -np.inf, -np.inf), (4, 9, 0), (1.5, 1.0, 0.0), (-two / 2, 0.0, 0.0)]
    top, second, token, total, moment = (jnp.asarray(column)[:, None] for column in columns)
    got = reference.merge(top, second, token, total, moment, 10)
    numbers = np.stack([got.top, got.second, got.logsumexp, got.entropy])[:, 0]
    np.testing.assert_allclose(numbers, [two, two, np.log(5), 1.054920], atol=2e-6)
    assert got.token.tolist() == [4] and got.token.dtype == jnp.int32


@pytest.mark.parametrize("tokens", [None, (40, 60, 3, 17, 0), (5,)], ids=["all", "some", "one"])
@pytest.mark.parametrize("transposed", [False, True], ids=["VD", "DV"])
@pytest.mark.parametrize("rows", [1, pytest.param(3, marks=pytest.mark.slow), 70])
def test_reference_against_numpy(rng, rows, transposed, tokens):
    x, scale, matrix = (rng.normal(size=shape).astype(np.float32) for shape in [(rows, 24), (24,), (61, 24)])
    scale = 0.5 + np.abs(scale)
    x[0] = matrix[3] = matrix[60] = 50 * np.eye(24)[0]  # a tie of the first state, without any rounding
    weights = jnp.asarray(matrix.T if transposed else matrix)
    read = jax.jit(functools.partial(exit_readout, eps=1e-3, transposed=transposed, tokens=tokens))
    got = read(jnp.asarray(x), jnp.asarray(scale), weights)
    kept = np.arange(61) if tokens is None else np.sort(tokens)
    assert_reads(got, norm(x, scale, 1e-3) @ matrix[kept].T.astype(np.float64), tokens=kept)
    assert tokens == (5,) or (got.token[0] == 3 and got.top[0] == got.second[0])


def test_a_state_is_rounded_to_its_dtype_after_the_norm(rng):
    x, matrix = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in [(2, 24), (61, 24)])
    h = jnp.asarray(norm(x.astype(jnp.float32), np.ones(24), 1e-5), jnp.bfloat16)
    got = exit_readout(x, jnp.ones(24), matrix, eps=1e-5, transposed=False)
    assert_reads(got, np.asarray(h, np.float64) @ np.asarray(matrix, np.float64).T)


def test_token_ids_that_are_known_at_run_time(rng):
    x, matrix = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(2, 24), (61, 24)])
    read = jax.jit(lambda tokens: exit_readout(x, jnp.ones(24), matrix, eps=1e-5, transposed=False, tokens=tokens))
    logits = norm(x, np.ones(24), 1e-5) @ np.asarray(matrix, np.float64).T
    assert_reads(read(jnp.array([7, 60, 2])), logits[:, [2, 7, 60]], tokens=[2, 7, 60])
    for outside in (-1, 61):
        got = read(jnp.array([7, outside, 2]))
        assert np.isnan(got.top).all() and (got.token == -1).all()


def kernel_case(rows, num_tokens, d_model, dtype, transposed):
    """Normed states and weights: ties between tiles, a tile of impossible tokens, a state of NaN; float64 logits."""
    rng = np.random.default_rng(d_model)  # multiples of 1/8: no sum is rounded, so that equal tokens stay equal
    states, matrix = (rng.integers(-8, 9, (count, d_model)) / 8 for count in (rows, num_tokens))
    states[:, 0], matrix[135, 0] = np.maximum(np.abs(states[:, 0]), 1 / 8), 0.5
    matrix[:, 1], states[:, 1] = np.arange(num_tokens) // 128 % 8, 2 * (-1.0) ** np.arange(rows)  # rising or falling
    matrix[num_tokens - 1] = matrix[135]
    matrix[:128, 0] = -np.inf
    states[0] = 2 * matrix[135]
    if rows > 1:
        states[1, 3] = np.nan
    states, matrix = jnp.asarray(states, dtype), jnp.asarray(matrix, dtype)
    logits = np.asarray(states, np.float64) @ np.asarray(matrix, np.float64).T
    return states, matrix.T if transposed else matrix, logits


def assert_kernel_reads(got, logits):
    assert_reads(got, logits, atol=5e-5)
    assert got.token[0] == 135 and got.top[0] == got.second[0]
    assert len(logits) == 1 or (got.token[1] == -1 and np.isfinite(got.top[2:]).all())


@pytest.mark.parametrize(
    ("rows", "num_tokens", "transposed", "dtype"),
    [(9, 907, False, "float32"), (3, 384, True, "bfloat16")],  # 8 blocks, the last of 11 tokens; 3, so one half has 1
)
def test_the_tpu_kernel_interpreted(rows, num_tokens, transposed, dtype):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu as pltpu

    from pallas_kernels.readout import mosaic_tpu

    states, weights, logits = kernel_case(rows, num_tokens, 128, dtype, transposed)
    interpret = pltpu.InterpretParams(detect_races=True, vector_clock_size=128, num_cores_or_threads=2)
    run = functools.partial(mosaic_tpu.exit_readout, transposed=transposed, block=128, interpret=interpret)
    assert_kernel_reads(jax.block_until_ready(jax.jit(run)(states, weights)), logits)
    assert not interpret_pallas_call.races.races_found


@needs_mosaic_gpu
@pytest.mark.filterwarnings(
    "ignore:invalid value encountered in matmul"
)  # padding, 0, times an impossible token's -inf
@pytest.mark.parametrize(
    ("rows", "num_tokens", "d_model", "transposed", "blocks"),
    [
        (9, 584, 64, False, 1),  # 5 tiles of 128, the last of 72
        pytest.param(3, 320, 128, True, 2, marks=pytest.mark.slow),  # 3 tiles of 128, the last of 64
        (40, 576, 64, True, 2),  # 3 tiles of 256 for two readers, the last of 64 all for one of them
    ],
)
def test_the_gpu_kernel_interpreted(rows, num_tokens, d_model, transposed, blocks):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.readout import mosaic_gpu

    states, weights, logits = kernel_case(rows, num_tokens, d_model, "bfloat16", transposed)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=blocks)
    with (
        jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
    ):
        run = functools.partial(mosaic_gpu.exit_readout, transposed=transposed, blocks=blocks)
        assert_kernel_reads(jax.block_until_ready(jax.jit(run)(states, weights)), logits)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(("transposed", "topology"), in_turn([False, True]))
def test_the_tpu_kernel_compiles_and_keeps_no_logits(transposed, topology):
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    from pallas_kernels.readout import mosaic_tpu

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices[:1], ("x",)), jax.sharding.PartitionSpec())
    shapes = [(64, 4096), (4096, 128256) if transposed else (128256, 4096)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    run = functools.partial(mosaic_tpu.exit_readout, transposed=transposed)
    compiled = jax.jit(run, out_shardings=sharding).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20  # the logits would be 32.8 MB, a copied matrix 1 GB


@needs_mosaic_gpu
@pytest.mark.parametrize("transposed", [False, True], ids=["VD", "DV"])
@pytest.mark.parametrize("rows", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8)), 64])
def test_the_gpu_kernel_lowers_for_cuda_and_keeps_no_logits(rows, transposed):
    from pallas_kernels.readout import mosaic_gpu

    shapes = [(rows, 4096), (4096, 128256) if transposed else (128256, 4096)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]

    def module(function):  # too much shared memory would raise
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)
        return exported(*arguments).mlir_module()

    text = module(functools.partial(mosaic_gpu.exit_readout, transposed=transposed, blocks=132))
    assert "mosaic_gpu" in text and f"tensor<{rows}x128256x" not in text
    assert f"tensor<{rows}x128256x" in module(functools.partial(reference.exit_readout, transposed=transposed))


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True], ids=["VD", "DV"])
@pytest.mark.parametrize("rows", [1, 3, 8, 17, 40, 64])
def test_the_gpu_kernel_on_a_gpu(rows, transposed):
    for num_tokens, d_model in ((192, 64), (320, 192), (32064, 1024)):
        states, weights, logits = kernel_case(rows, num_tokens, d_model, "bfloat16", transposed)
        run = jax.jit(functools.partial(READOUT[0].run, transposed=transposed))
        first, again = run(states, weights), run(states, weights)
        assert_kernel_reads(first, logits)
        jax.tree.map(np.testing.assert_array_equal, first, again)


FACTS = {"rows": 8, "d_model": 4096, "num_tokens": 128256, "transposed": False, "capability": "9.0", "jax": (0, 11, 2)}
FACTS |= {"dtype": jnp.dtype("bfloat16"), "weights_dtype": jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mosaic_gpu", {}, None),
        ("mosaic_gpu", {"platform": "cpu"}, "needs an NVIDIA GPU, got platform 'cpu'"),
        ("mosaic_gpu", {"jax": (0, 11, 1)}, "needs jax 0.11.2 or newer"),
        ("mosaic_gpu", {"rows": 65}, "1 to 64 states at a time, got 65"),
        ("mosaic_gpu", {"capability": "10.0"}, "needs a Hopper GPU .* got 10.0"),
        ("mosaic_gpu", {"weights_dtype": jnp.dtype("float32")}, "got bfloat16 states and float32 weights"),
        ("mosaic_gpu", {"d_model": 100}, "multiple of 64, got 100"),
        ("mosaic_gpu", {"num_tokens": 50257}, "a multiple of 8 with transposed=False, got 50257"),
        ("mosaic_gpu", {"num_tokens": 1000, "transposed": True}, "a multiple of 64 with transposed=True, got 1000"),
        ("mosaic_tpu", {"num_tokens": 50257}, None),
        ("mosaic_tpu", {"platform": "cpu"}, "needs a TPU, got platform 'cpu'"),
        ("mosaic_tpu", {"rows": 0}, "1 to 64 states at a time, got 0"),
        ("mosaic_tpu", {"dtype": jnp.dtype("float16")}, "got float16 states and bfloat16 weights"),
        ("mosaic_tpu", {"d_model": 16512}, "multiple of 128 up to 16384, got 16512"),
        ("mosaic_tpu", {"num_tokens": 100}, "at least 128 tokens, got 100"),
        ("mosaic_tpu", {"num_tokens": 1000, "transposed": True}, "multiple of 128 tokens .* got 1000"),
    ],
    ids=str,
)
def test_a_kernel_says_why_it_cannot_serve(monkeypatch, name, change, reason):
    facts = {"platform": name[-3:], **FACTS, **change}
    monkeypatch.setattr(jax, "__version_info__", facts.pop("jax"))
    if reason is None:
        assert dispatch.choose("exit_readout", READOUT, None, **facts).name == name
    else:
        assert dispatch.choose("exit_readout", READOUT, None, **facts).name == "xla"
        with pytest.raises(NotImplementedError, match=f"{name}: .*{reason}"):
            dispatch.choose("exit_readout", READOUT, name, **facts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 3, 24)}, r"expected x \[B, D\] and norm \[D\], got x \(2, 3, 24\)"),
        ({"norm": (23,)}, r"got .* norm \(23,\)"),
        ({"weights": (24, 61)}, r"expected weights \[V, D\], or \[D, V\] .* with transposed=False"),
        ({"weights": (0, 24)}, r"weights \(0, 24\)"),
        ({"tokens": ()}, r"at least one integer id \[R\], got float64 \(0,\)"),
        ({"tokens": [[1]]}, r"got int64 \(1, 1\)"),
        ({"tokens": [0.5]}, "got float64"),
        ({"tokens": [3, 61]}, "token ids between 0 and 60, got 3 to 61"),
        ({"tokens": [-1, 3]}, "got -1 to 3"),
        ({"tokens": jnp.array([9, 4, 9])}, "distinct token ids, got 9 more than once"),
        ({"implementation": "triton"}, r"one of \['mosaic_gpu', 'mosaic_tpu', 'xla'\], got 'triton'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = {"x": (2, 24), "norm": (24,), "weights": (61, 24)}
    arrays = [jnp.zeros(change.get(name, shape)) for name, shape in shapes.items()]
    options = {name: value for name, value in change.items() if name not in shapes}
    with pytest.raises(ValueError, match=message):
        exit_readout(*arrays, eps=1e-5, transposed=False, **options)


def test_a_cpu_says_nothing_when_no_kernel_serves(caplog):
    with caplog.at_level(logging.DEBUG, logger=dispatch.__name__):
        exit_readout(jnp.ones((65, 24)), jnp.ones(24), jnp.ones((61, 24)), eps=1e-5, transposed=False)
    assert not caplog.records
