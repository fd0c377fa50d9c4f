"""Named plans for a model of any depth; each line says why its numbers are what they are.

Every plan listed here is held to the laws of tests/test_plan_laws.py and shows up in ``dyninf plans``.
"""

from dyninf.depth import (
    Confidence,
    DecayingThreshold,
    DepthDecay,
    ExitAt,
    Patience,
    Saturation,
    SkipLayers,
    Thresholds,
    TokenHalting,
    UnifiedSkip,
    after_layer,
    at_layers,
    every,
    first_of,
)
from dyninf.kv import (
    D2O,
    H2O,
    TOVA,
    ActQKV,
    Critic,
    ExpectedAttention,
    HashEvict,
    KeyNorm,
    LookOnce,
    MPCache,
    PageMean,
    Quest,
    Recency,
    RetrievalAttention,
    ShadowKV,
    SnapKV,
    TokenSelect,
    TopK,
    pyramid_budgets,
)
from dyninf.plan import Plan
from dyninf.sparsity import (
    AShape,
    FlexPrefill,
    LazyLLM,
    PooledBlocks,
    PowerAttention,
    TriShape,
    VerticalSlash,
    XAttention,
    ZipVL,
)


def plans(num_layers: int) -> dict[str, Plan]:
    """Return the named plans for a model of ``num_layers`` layers (at least 4).

    Raises:
        ValueError: if the model is too shallow for them.
    """
    if num_layers < 4:
        raise ValueError(f"expected a model of at least 4 layers for the named plans, got {num_layers}; build a Plan")
    half, quarter = num_layers // 2, num_layers // 4
    middle = tuple(range(half - quarter // 2, half - quarter // 2 + quarter))
    # Asking costs about as much as a layer or two, so exits are considered at every eighth of the depth only.
    stride = max(1, num_layers // 8)
    confidence = Confidence(threshold=0.9)
    drops = tuple(share * num_layers // 10 for share in (3, 6, 9))
    asked, cap = tuple(share * num_layers // 8 for share in (3, 4, 5)), 3 * num_layers // 4
    # Solved by "dyninf calibrate --mean 0.55 --peak 12 --exits 6,8,10,12" on the shipped model's held-out text.
    solved = dict(zip(asked, (0.877, 0.592, 0.320), strict=True))
    return {
        # The identity: every layer, exact.
        "dense": Plan(),
        # Half the layers: the depth LayerSkip-trained models are asked to be usable at.
        "exit_half": Plan(depth=ExitAt(layer=half)),
        # The middle quarter changes the state least in most models (ShortGPT); the prompt still runs it.
        "skip_middle": Plan(depth=SkipLayers(layers=middle, prompt=False)),
        # The mildest target of the paper.
        "unified_skip": Plan(depth=UnifiedSkip(speedup=2.0)),
        # Reaches three quarters of the depth after about 30 tokens; never fewer than half.
        "decay_power": Plan(depth=DepthDecay(kind="power", alpha=0.99, min_layers=half, flex_start=quarter)),
        # Half of the layers after 256 tokens, SkipDecode's 2x target.
        "decay_linear": Plan(depth=DepthDecay(kind="linear", length=256.0, min_layers=half, flex_start=quarter)),
        # 0.9 keeps 98 % of the shipped model's accuracy (see its card).
        "exit_confidence": Plan(depth=every(confidence, step=stride)),
        # Three questions between 3/8 and 5/8 of the depth, and no token above 3/4: 97 % of the shipped model's
        # accuracy at 59 % of its layers, and the fastest data-dependent plan (see its card).
        "exit_capped": Plan(
            depth=first_of(at_layers(first_of(confidence, Patience(patience=2)), layers=asked), ExitAt(layer=cap))
        ),
        # The same questions with a threshold for each, solved for 55 % of the layers; 96 % of the shipped model's
        # accuracy.
        "exit_budget": Plan(
            depth=first_of(
                Thresholds(policy=Confidence(threshold=1.0), thresholds=tuple(solved.values()), layers=tuple(solved)),
                ExitAt(layer=cap),
            )
        ),
        # The exits of exit_confidence, hiding the keys of layers that did not run instead of projecting them.
        "exit_confidence_masked": Plan(depth=every(confidence, step=stride), fill="mask"),
        # CALM's softmax response.
        "exit_margin": Plan(depth=every(Confidence(threshold=0.8, measure="margin"), step=stride)),
        # One nat of 8.3 (vocabulary 4096) is 0.88.
        "exit_entropy": Plan(depth=every(Confidence(threshold=0.88, measure="entropy"), step=stride)),
        # Needs no readout; only the upper half is saturated enough to be asked.
        "exit_saturation": Plan(depth=after_layer(Saturation(threshold=0.98), layer=half)),
        # MuE's rule for a decoder: the same cosine, asked from the first layer on, so it has to be stricter; 98 % of
        # the shipped model's accuracy at 79 % of its layers.
        "exit_mue": Plan(depth=Saturation(threshold=0.985)),
        # QuickSilver's halting: frozen once a layer moves the state by less than a fifth, as most layers above three
        # quarters of the depth do; 98 % of the shipped model's accuracy at 78 % of its layers. Halted tokens
        # write no keys.
        "halt_tokens": Plan(depth=after_layer(TokenHalting(threshold=0.2), layer=half), fill="mask"),
        # Two unchanged predictions in a row, an eighth of the depth apart.
        "exit_patience": Plan(depth=every(Patience(patience=2), step=stride)),
        # CALM's schedule: strict at the start of a text, 10 % looser in the end.
        "exit_calm": Plan(
            depth=every(DecayingThreshold(policy=confidence, temperature=4.0, length=128.0), step=stride)
        ),
        # Sure at once, or unchanged for three decisions.
        "exit_first_of": Plan(depth=every(first_of(confidence, Patience(patience=3)), step=stride)),
        # Evicting plans keep 512 tokens, a quarter of the shipped model's context. StreamingLLM: four sinks.
        "evict_recent": Plan(evict=TopK(scorer=Recency(), budget=512)),
        "evict_key_norm": Plan(evict=TopK(scorer=KeyNorm(), budget=512)),
        # The window and the kernel of the paper's code, which forces no sinks.
        "evict_snap_kv": Plan(evict=TopK(scorer=SnapKV(), budget=512, sinks=0, recent=32)),
        # The same scores and as many tokens on average; the top layer chooses a twentieth, as in the paper's code.
        "evict_pyramid_kv": Plan(
            evict=TopK(scorer=SnapKV(), budget=pyramid_budgets(512, num_layers, recent=32), sinks=0, recent=32)
        ),
        # kvpress's 512 positions ahead; the shipped model's rotation has the base 10000.
        "evict_expected": Plan(evict=TopK(scorer=ExpectedAttention(), budget=512)),
        # The paper gives no weights: as much of the one as of the other.
        "evict_critic": Plan(evict=TopK(scorer=Critic(), budget=512)),
        # The bits, sinks and recent tokens of the paper's code.
        "evict_hash": Plan(evict=TopK(scorer=HashEvict(), budget=512, recent=10)),
        # The paper's last fifth of the queries; what is generated stays as long as there is a token of the prompt.
        "evict_look_once": Plan(evict=TopK(scorer=LookOnce(), budget=512)),
        "evict_tova": Plan(evict=TopK(scorer=TOVA(), budget=512, sinks=0)),
        # Half of the budget for the newest tokens, as in the paper.
        "evict_h2o": Plan(evict=TopK(scorer=H2O(), budget=512, sinks=0, recent=256)),
        # The same with four sinks, and merging; all layers alike, where nothing was measured.
        "evict_d2o": Plan(evict=TopK(scorer=D2O(), budget=512, recent=256)),
        # Selecting plans keep everything and read 512 tokens a step. Quest: pages of 16, the first two layers whole.
        "select_quest": Plan(select=TopK(scorer=Quest(), budget=512, sinks=0, dense_layers=2)),
        # For a hundred thousand tokens: a step reads all summaries, so that pages are large.
        "select_long": Plan(select=TopK(scorer=Quest(page_size=64), budget=2048, sinks=64, recent=64)),
        # TriForce's chunks of 8, the first of which is always read.
        "select_page_mean": Plan(select=TopK(scorer=PageMean(), budget=512, sinks=1)),
        # The paper's shares of sinks and recent tokens, 1/20 and 1/5; pages of 8, the smallest that kernels read.
        "select_votes": Plan(select=TopK(scorer=TokenSelect(), budget=512, sinks=24, recent=96)),
        # The same with the paper's reuse of a choice while the cosine of the queries is at least 0.9.
        "select_reused": Plan(select=TopK(scorer=TokenSelect(), budget=512, sinks=24, recent=96, reuse=0.9)),
        # select_quest with one scoring for two adjacent layers, as MPCache shares: half of the summaries are read.
        "select_shared": Plan(select=TopK(scorer=Quest(), budget=512, sinks=0, dense_layers=2, share=2)),
        # Pages of 16 in clusters of 32, as in the paper's code.
        "select_mp_cache": Plan(select=TopK(scorer=MPCache(), budget=512)),
        # The paper's blocks of 32; sinks and recent tokens in its shares of a budget of 2048, 1/32 and a quarter.
        "select_act_qkv": Plan(select=TopK(scorer=ActQKV(), budget=512, sinks=16, recent=97)),
        # Sinks and recent tokens in proportion to the paper's 128 and 512 beside 2000 retrieved keys; with 64 centroids
        # means of 8 catch 1.9 times as many of the best keys of recall-6m as in the order of the text.
        "select_retrieval": Plan(select=TopK(scorer=RetrievalAttention(), budget=512, sinks=24, recent=96)),
        # Half of the 128 directions of the shipped model's keys, 98 % of their squares; the outliers of the paper's
        # code for a budget of 512, and its four last pages. The rotation is that of evict_expected.
        "select_shadow_kv": Plan(select=TopK(scorer=ShadowKV(rank=64, outliers=12), budget=512, sinks=0, recent=32)),
        # Sparse plans attend to a part of the prompt only. The sinks of the paper's code, and a window in proportion to
        # its 4096 tokens of a context of 16k.
        "sparse_a_shape": Plan(sparsity=AShape(window=512)),
        # The same in whole blocks; the last block of a prompt, which holds the question, reads everything.
        "sparse_tri_shape": Plan(sparsity=TriShape(window=512)),
        # Half of the paper's unit and two of them near, as five units of 256 are most of the shipped model's context.
        "sparse_power": Plan(sparsity=PowerAttention(window=2, unit=128)),
        # The paper's seven tenths after 30, 60 and 90 % of the layers, of the shipped model's context of 2048 tokens.
        "sparse_lazy": Plan(sparsity=LazyLLM(layers=drops, budgets=(1434, 1003, 702))),
        # The same with the paper's revival; seven and the new token make 8, the smallest tile of the matrix units.
        "sparse_lazy_revive": Plan(sparsity=LazyLLM(layers=drops, budgets=(1434, 1003, 702), revive=7)),
        # Five blocks of 128, the size that kernels take, as many as sparse_a_shape has: the first column, and three
        # bands beside the diagonal, where the paper has six for a column.
        "sparse_vertical_slash": Plan(sparsity=VerticalSlash(vertical=1, slash=3)),
        # The same five, two of them forced.
        "sparse_pooled_blocks": Plan(sparsity=PooledBlocks(budget=5)),
        # Where a mass says how many blocks, they may be eight, half of the shipped model's context; ZipVL's budget is
        # without a row's own.
        "sparse_zip_vl": Plan(sparsity=ZipVL(budget=7)),
        # One column and one diagonal at least, as the 1024 tokens of the paper would be the whole budget.
        "sparse_flex_prefill": Plan(sparsity=FlexPrefill(budget=8, min_budget=1)),
        # The finer stride of the paper's two.
        "sparse_x_attention": Plan(sparsity=XAttention(budget=8, stride=8)),
    }
