"""Training recipes; each number with its reason."""

from dyninf.models import ModelConfig
from dyninf.training.recipe import Recipe

# The shipped model: deep and narrow, so that exits matter; 12.9 million parameters are 26 MB in bfloat16.
PYCODE_13M = ModelConfig(
    vocab_size=4096,  # a readout costs 1.4 layers; a larger vocabulary would eat what an exit saves
    num_layers=16,
    d_model=256,
    d_ff=704,  # 8/3 of d_model, rounded up to a multiple of 64
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_length=2048,
    rope_theta=10000.0,
    tie_embeddings=True,
)

PYCODE_13M_RECIPE = Recipe(
    steps=9600,  # 629 million tokens, 10.6 passes over the corpus: a quarter of an hour on one H200
    batch_size=32,
    length=2048,
    learning_rate=2e-3,
    warmup=300,
    dropout=0.1,  # the low end of the paper: a small model has little to spare
    e_scale=1.0,  # the high end: exits are what this model is for
    exit_period=4,  # five readouts a step; every exit is trained every fourth step
    eval_every=800,
    save_every=2400,
)

# A model that retrieves: token tasks only, so that a cache policy that loses what is asked for is seen at once. 6.5
# million parameters are 13 MB in bfloat16.
RECALL = ModelConfig(
    vocab_size=1024,  # replaced by the tasks' own
    num_layers=8,  # retrieval takes two, following a chain of assignments more
    d_model=256,
    d_ff=704,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_length=32768,
    rope_theta=1e8,  # the slow half of each head turns by 3 radians at most over 32768 positions
    tie_embeddings=True,
    qkv_bias=True,  # what retrieval_start needs
)

# The first of three lengths, 512, 2048 and 8192, with as many tokens a step; the card of recall-6m has the commands.
RECALL_RECIPE = Recipe(
    kind="plain",  # every layer is needed to find anything
    start="retrieval",  # from small random weights it stays at guessing for thousands of steps
    steps=2500,
    batch_size=128,
    length=512,
    learning_rate=1e-3,
    warmup=50,
    weight_decay=0.01,
    exit_period=8,
    chunk=32768,
    eval_every=500,
    save_every=2000,
)

# A few minutes on two CPU cores, to see the whole pipeline work on a folder of one's own.
TINY = ModelConfig(
    vocab_size=1024,
    num_layers=8,
    d_model=96,
    d_ff=256,
    num_heads=3,
    num_kv_heads=1,
    head_dim=32,
    max_length=512,
    tie_embeddings=True,
)

TINY_RECIPE = Recipe(
    steps=300,
    batch_size=8,
    length=256,
    warmup=30,
    compute_dtype="float32",  # bfloat16 is slower on most CPUs
    chunk=2048,
    eval_every=100,
    eval_batches=2,
    save_every=100,
)
