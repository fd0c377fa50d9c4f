"""What one training run does, as plain values."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A LayerSkip training run from scratch; see :mod:`dyninf.training.layerskip` for the terms of the loss.

    Args:
        steps: optimizer steps.
        batch_size: sequences per step.
        length: tokens predicted in each sequence.
        learning_rate: peak; warmed up linearly over ``warmup`` steps, then a cosine down to a tenth.
        weight_decay: on matrices only (AdamW).
        clip: largest global norm of a gradient.
        dropout: probability of dropping the last layer at full schedule.
        e_scale: strength of the early exits in the loss; 0 is the plain loss.
        exit_curriculum: which exits a step trains; with ``rotational`` every ``exit_period``-th, shifted by one each
            step, so that only ``ceil(L / exit_period) + 1`` readouts are computed.
        compute_dtype: dtype of activations and of the weights they meet; the master weights stay float32.
        chunk: tokens whose logits exist at once.
        eval_every: steps between two held-out evaluations; ``eval_batches`` batches each.
        save_every: steps between two checkpoints.
        seed: of initial weights, data order and dropout.

    Raises:
        ValueError: if a count is not positive or a rate out of range.
    """

    steps: int
    batch_size: int
    length: int
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    dropout: float = 0.1
    e_scale: float = 1.0
    exit_curriculum: Literal["rotational", "gradual", "none"] = "rotational"
    exit_period: int = 4
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    chunk: int = 8192
    eval_every: int = 200
    eval_batches: int = 4
    save_every: int = 500
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "length", "exit_period", "chunk", "eval_every", "eval_batches", "save_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be a positive integer, got {getattr(self, name)!r}")
        if not 0 <= self.warmup < max(self.steps, 2):
            raise ValueError(f"expected warmup below steps={self.steps}, got {self.warmup}; warm up for fewer steps")
        if not 0 <= self.dropout <= 1 or self.e_scale < 0 or self.learning_rate <= 0:
            raise ValueError(
                f"expected dropout in [0, 1], e_scale >= 0 and learning_rate > 0, got {self.dropout}, {self.e_scale}, "
                f"{self.learning_rate}"
            )
        if self.compute_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"expected compute_dtype 'bfloat16' or 'float32', got {self.compute_dtype!r}")
