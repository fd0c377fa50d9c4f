"""The shape of a transformer as plain values.

One frozen dataclass covers the Llama 2 / 3 / 3.1 / 3.2, Mistral, Qwen2 / 2.5 and Qwen3 families; what differs between
them is a field here, never a class. Sizes use the letters of the project: L layers, D d_model, F d_ff, N query heads,
K key/value heads, H head_dim, V vocab.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    ``linear`` divides every frequency by ``factor``. ``llama3`` keeps the high frequencies, divides the low ones and
    blends between them (Llama 3.1, model card and reference code).

    Args:
        original_length: context length (tokens) the frequencies were trained for; ``llama3`` only.

    Raises:
        ValueError: if the kind is unknown or a number is outside its range.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"expected rope scaling 'linear' or 'llama3', got {self.kind!r}")
        if not self.factor > 0 or not self.original_length > 0:
            raise ValueError(f"expected factor and original_length above 0, got {self.factor}, {self.original_length}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"expected 0 < low_freq_factor < high_freq_factor, got {self.low_freq_factor}, {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one decoder-only transformer.

    Args:
        max_length: longest sequence (tokens) the model was trained for; caches beyond it are refused.
        windows: sliding attention window (tokens) of each layer, ``None`` for full attention.
        eos_ids: tokens that end a text; the default stop tokens of generation.

    Raises:
        ValueError: if a size is not positive, sizes do not divide, or a number is outside its range.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim", "max_length")
        for name in sizes:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be a positive integer, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"expected num_heads to be a multiple of num_kv_heads={self.num_kv_heads}, got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"expected an even head_dim (rotary pairs), got {self.head_dim}")
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise ValueError(f"expected one window per layer ({self.num_layers}), got {len(self.windows)}")
        if any(window is not None and window < 1 for window in self.windows or ()):
            raise ValueError(f"expected windows of at least 1 token, got {self.windows}; use None for full attention")
        if not self.norm_eps >= 0 or not self.rope_theta > 0:
            raise ValueError(f"expected norm_eps >= 0 and rope_theta > 0, got {self.norm_eps} and {self.rope_theta}")

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head (G = N / K)."""
        return self.num_heads // self.num_kv_heads

    def window(self, layer: int) -> int | None:
        """Return the sliding window of ``layer`` (tokens), ``None`` for full attention."""
        return None if self.windows is None else self.windows[layer]
