"""The kernels that choose pages against a stable sort in NumPy: interpreted, compiled, lowered, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, topk_pages
from pallas_kernels.topk_pages import TOPK_PAGES
from tests.pallas_kernels.tpus import in_turn

needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the GPU kernel needs jax 0.11.2")
# pages, k, sinks, recent
SHAPES = [(1, 1, 0, 0), (7, 3, 1, 1), (9, 9, 0, 0), (130, 5, 2, 3), (1000, 130, 1, 2)]
LARGE = [(1025, 512, 1, 1), (2048, 32, 1, 1), (4099, 256, 0, 4), (8192, 128, 1, 2), (20001, 512, 0, 0)]
LARGE += [(65536, 1, 0, 0), (65536, 256, 4, 4), (65535, 512, 300, 200)]
# As many as 128 pages between sinks and recent ones: what a warpgroup can find.
NARROW = [
    *SHAPES[:4],
    (16, 4, 2, 2),
    (96, 32, 1, 1),
    (200, 130, 1, 2),
    (1024, 32, 0, 1),
    (1023, 64, 1, 0),
    (2051, 40, 2, 9),
]
NARROW += [(4096, 32, 1, 1), (8192, 32, 0, 1), (8192, 128, 0, 0), (65536, 64, 1, 1)]


def numpy_topk(scores, num_pages, k, sinks, recent):
    """The pages of one row: forced ones lead, then a stable sort by descending score."""
    page = np.arange(min(max(num_pages, 0), len(scores)))
    ranks = np.where(np.isnan(scores), -np.inf, scores)[page].clip(np.finfo("f").min, np.finfo("f").max)
    ranks = np.where((page < sinks) | (page >= len(page) - recent), np.inf, ranks)
    return np.sort(np.argsort(-ranks, kind="stable")[:k])


def rows_of(num_pages, k, seed=0):
    """Scores ``[5, 2, P]``: random, tied, equal, not finite, falling; and how many pages are in use."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(5, 2, num_pages)).astype(np.float32)
    scores[1] = rng.integers(-2, 3, (2, num_pages))
    scores[2, 0], scores[2, 1] = 0.25, -np.inf
    scores[3, 0, ::2], scores[3, 1, 1::3], scores[3, 1, ::5] = np.nan, np.inf, -np.inf
    scores[4] = -np.sort(-scores[4])
    live = np.array([num_pages, num_pages, num_pages, num_pages - 1, min(num_pages, k + 1)], np.int32)
    scores[3, :, num_pages - 1] = np.nan
    return scores, live


def assert_chooses(run, num_pages, k, sinks, recent):
    """Compare a kernel with NumPy, also for few pages in use."""
    scores, full = rows_of(num_pages, k)
    run = jax.jit(functools.partial(run, k=k, page_size=16, sinks=sinks, recent=recent))
    for live in (full, np.array([0, 1, k, k - 1, num_pages // 2], np.int32)):
        index = jax.block_until_ready(run(jnp.asarray(scores), jnp.asarray(live)))
        pages, counts = np.asarray(index.pages), np.asarray(index.counts)
        assert pages.shape == (5, 2, k) and pages.dtype == counts.dtype == np.int32 and index.page_size == 16
        for b, head in np.ndindex(5, 2):
            want = numpy_topk(scores[b, head], live[b], k, sinks, recent)
            np.testing.assert_array_equal(pages[b, head], np.pad(want, (0, k - len(want))))
            assert counts[b, head] == len(want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference(shape):
    assert_chooses(TOPK_PAGES[-1].run, *shape)


@pytest.mark.parametrize("shape", [(7, 3, 1, 1), (1100, 130, 2, 3)], ids=str)
def test_the_tpu_kernel_interpreted(shape):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu as pltpu

    from pallas_kernels.topk_pages import mosaic_tpu

    interpret = pltpu.InterpretParams(detect_races=True, vector_clock_size=128, num_cores_or_threads=2)
    assert_chooses(functools.partial(mosaic_tpu.topk_pages, interpret=interpret), *shape)
    assert not interpret_pallas_call.races.races_found


def specs(batch, heads, num_pages, **options):
    shapes = {"float32": (batch, heads, num_pages), "int32": (batch,)}
    return [jax.ShapeDtypeStruct(shape, dtype, **options) for dtype, shape in shapes.items()]


@pytest.mark.parametrize(("sizes", "topology"), in_turn([(1000, 7), (65536, 512)]))
def test_the_tpu_kernel_compiles(sizes, topology):
    pytest.importorskip("libtpu", reason="needs libtpu to compile for a TPU: pip install dyninf[tpu]")
    from jax.experimental import topologies

    from pallas_kernels.topk_pages import mosaic_tpu

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices[:1], ("x",)), jax.sharding.PartitionSpec())
    num_pages, k = sizes
    run = functools.partial(mosaic_tpu.topk_pages, k=k, page_size=16, sinks=1, recent=1)
    jax.jit(run, out_shardings=sharding).lower(*specs(2, 8, num_pages, sharding=sharding)).compile()


@needs_mosaic_gpu
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_the_gpu_kernel_lowers_for_cuda(shape):
    from pallas_kernels.topk_pages import mosaic_gpu

    num_pages, k, sinks, recent = shape

    def choose(scores_BKP, num_pages_B):
        index = mosaic_gpu.topk_pages(scores_BKP, num_pages_B, k=k, page_size=16, sinks=sinks, recent=recent)
        return index.counts, index.pages

    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(choose), platforms=["cuda"], disabled_checks=checks)(*specs(3, 2, num_pages))
    text = exported.mlir_module()
    assert text.count("mosaic_gpu_v2") == 1 and "sort" not in text and "top_k" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_the_gpu_kernel_on_a_gpu(shape):
    assert_chooses(TOPK_PAGES[0].run, *shape)


def in_a_warpgroup(num_pages, k, sinks, recent, *, rows, blocks=3, space=0):
    """A kernel of scores ``[rows, P]`` and pages in use ``[rows]`` where one warpgroup of three chooses.

    Returns pages ``[rows, k]``, and how many rows a block has by each warpgroup that only waits for itself meanwhile.
    """
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.topk_pages import mosaic_gpu

    geometry = mosaic_gpu.Geometry(num_pages=num_pages, k=k, sinks=sinks, recent=recent, warpgroup=True)

    def body(scores, live, chosen, waits, pages, shared):
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        count = lax.div(rows - block + blocks - 1, blocks)

        @pl.when(warpgroup == 1)
        def _():
            plgpu.set_max_registers(104, action="decrease")

            @pl.loop(0, count)
            def _(i):
                row = block + i * blocks
                mosaic_gpu.choose_in_warpgroup(geometry, scores, row, live[row], pages.at[i % 2], shared)

                @pl.loop(0, k)
                def _(place):
                    chosen[row, place] = pages[i % 2, place]

        @pl.when(warpgroup != 1)
        def _():
            @pl.loop(0, 1000)
            def _(i):
                plgpu.commit_smem()

            waits[block, warpgroup] = count

    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, k), (blocks, 3))],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((2, k), jnp.int32), plgpu.SMEM((geometry.shared_bytes // 4 + space,), jnp.int32)],
    )


@needs_mosaic_gpu
@pytest.mark.parametrize("shape", NARROW, ids=str)
def test_choosing_in_a_warpgroup_lowers_for_cuda(shape):
    arguments = jax.ShapeDtypeStruct((10, shape[0]), "float32"), jax.ShapeDtypeStruct((10,), "int32")
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    run = jax.jit(in_a_warpgroup(*shape, rows=10))
    text = jax.export.export(run, platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()
    assert text.count("mosaic_gpu_v2") == 1


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("shape", "space", "reason"),
    [
        ((1000, 131, 1, 1), 0, "128 pages to find at most"),
        ((65537, 32, 1, 1), 0, "of 65536"),
        ((1000, 32, 1, 1), -1, r"pages \[32\] and shared \[450\]"),
    ],
    ids=str,
)
def test_choosing_in_a_warpgroup_says_what_it_cannot_do(shape, space, reason):
    arguments = jax.ShapeDtypeStruct((10, shape[0]), "float32"), jax.ShapeDtypeStruct((10,), "int32")
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(in_a_warpgroup(*shape, rows=10, space=space), *arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", NARROW, ids=str)
def test_choosing_in_a_warpgroup_on_a_gpu(shape):
    num_pages, k, sinks, recent = shape
    scores, full = rows_of(num_pages, k)
    scores = scores.reshape(10, num_pages)
    run = jax.jit(in_a_warpgroup(*shape, rows=10))
    for live in (full, np.array([1, k, max(k - 1, 1), max(num_pages // 2, 1), num_pages + 5], np.int32)):
        live = np.repeat(live, 2)
        pages, waits = map(np.asarray, run(jnp.asarray(scores), jnp.asarray(live)))
        for row in range(10):
            want = numpy_topk(scores[row], live[row], k, sinks, recent)
            np.testing.assert_array_equal(pages[row, : len(want)], want)
        np.testing.assert_array_equal(waits[:, [0, 2]], [[4, 4], [3, 3], [3, 3]])


def test_no_rows_choose_nothing():
    from pallas_kernels.topk_pages import mosaic_tpu

    index = mosaic_tpu.topk_pages(jnp.zeros((0, 2, 9)), jnp.zeros(0, jnp.int32), k=3, page_size=16, sinks=0, recent=0)
    assert index.pages.shape == (0, 2, 3) and index.counts.shape == (0, 2)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mosaic_gpu", {}, None),
        ("mosaic_gpu", {"platform": "cpu"}, "needs an NVIDIA GPU, got platform 'cpu'"),
        ("mosaic_gpu", {"jax": (0, 11, 1)}, "needs jax 0.11.2 or newer"),
        ("mosaic_gpu", {"capability": "10.0"}, "needs a Hopper GPU .* got 10.0"),
        ("mosaic_gpu", {"num_pages": 65537}, "at most 65536 pages, got 65537"),
        ("mosaic_gpu", {"k": 513}, "at most 512 pages, got k=513"),
        ("mosaic_tpu", {}, None),
        ("mosaic_tpu", {"platform": "gpu", "capability": "8.0"}, "needs a TPU, got platform 'gpu'"),
        ("mosaic_tpu", {"num_pages": 65537}, "at most 65536 pages, got 65537"),
        ("mosaic_tpu", {"k": 513}, "at most 512 pages, got k=513"),
    ],
    ids=str,
)
def test_a_kernel_says_why_it_cannot_serve(monkeypatch, name, change, reason):
    facts = {"platform": name[-3:], "capability": "9.0", "num_pages": 8192, "k": 128, "jax": (0, 11, 2), **change}
    monkeypatch.setattr(jax, "__version_info__", facts.pop("jax"))
    if reason is None:
        assert dispatch.choose("topk_pages", TOPK_PAGES, None, **facts).name == name
    else:
        assert dispatch.choose("topk_pages", TOPK_PAGES, None, **facts).name == "xla"
        with pytest.raises(NotImplementedError, match=f"{name}: .*{reason}"):
            dispatch.choose("topk_pages", TOPK_PAGES, name, **facts)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"one of \['mosaic_gpu', 'mosaic_tpu', 'xla'\], got 'triton'"):
        topk_pages(jnp.zeros((1, 1, 4)), jnp.array([4]), k=2, page_size=16, implementation="triton")
