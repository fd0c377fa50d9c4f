"""Shapes of known models, for benches with random weights; each with the reason for its numbers.

The numbers are those of the published config.json files. A model is loaded by ``dyninf.models.load`` from its own
files; nothing here is needed for that.
"""

from dyninf.models import ModelConfig, RopeScaling


def shapes() -> dict[str, ModelConfig]:
    """Return the named shapes."""
    return {
        # Seconds on two CPU cores; every axis has a size of its own, so that a mixed-up axis cannot go unnoticed.
        "tiny": ModelConfig(
            vocab_size=512,
            num_layers=8,
            d_model=96,
            d_ff=256,
            num_heads=6,
            num_kv_heads=3,
            head_dim=16,
            max_length=1024,
            tie_embeddings=True,
        ),
        # The smallest Llama: half the depth of the 8B, a head of 64, and an embedding that is a fifth of all weights.
        "llama3.2-1b": ModelConfig(
            vocab_size=128256,
            num_layers=16,
            d_model=2048,
            d_ff=8192,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            max_length=131072,
            rope_theta=500000.0,
            rope_scaling=RopeScaling(kind="llama3", factor=32.0),
            tie_embeddings=True,
        ),
        # What the speed targets are stated for: 15.0 GB in bfloat16 are read for each token, 1.05 of them vocabulary.
        "llama3-8b": ModelConfig(
            vocab_size=128256,
            num_layers=32,
            d_model=4096,
            d_ff=14336,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            max_length=8192,
            rope_theta=500000.0,
        ),
        # The same weights' shapes for long contexts: at 128K the cache of a sequence takes 17 GB.
        "llama3.1-8b": ModelConfig(
            vocab_size=128256,
            num_layers=32,
            d_model=4096,
            d_ff=14336,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            max_length=131072,
            rope_theta=500000.0,
            rope_scaling=RopeScaling(kind="llama3", factor=8.0),
        ),
        # What one accelerator does not hold: 141 GB in bfloat16, and 10.7 GB of cache for 32K tokens.
        "llama3.1-70b": ModelConfig(
            vocab_size=128256,
            num_layers=80,
            d_model=8192,
            d_ff=28672,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            max_length=131072,
            rope_theta=500000.0,
            rope_scaling=RopeScaling(kind="llama3", factor=8.0),
        ),
        # What a host of eight accelerators holds: 812 GB in bfloat16; 16 query heads share a key.
        "llama3.1-405b": ModelConfig(
            vocab_size=128256,
            num_layers=126,
            d_model=16384,
            d_ff=53248,
            num_heads=128,
            num_kv_heads=8,
            head_dim=128,
            max_length=131072,
            rope_theta=500000.0,
            rope_scaling=RopeScaling(kind="llama3", factor=8.0),
        ),
        # As large as the 8B, with more and narrower layers and norms on queries and keys.
        "qwen3-8b": ModelConfig(
            vocab_size=151936,
            num_layers=36,
            d_model=4096,
            d_ff=12288,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            max_length=40960,
            rope_theta=1000000.0,
            norm_eps=1e-6,
            qk_norm=True,
        ),
    }
