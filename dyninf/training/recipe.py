"""What one training run does, as plain values."""

import dataclasses
import math
from typing import Literal, get_args

Start = Literal["normal", "retrieval"]
Kind = Literal["layerskip", "soft", "plain", "frozen", "jei", "stop"]
ComputeDtype = Literal["bfloat16", "float32"]
ExitCurriculum = Literal["rotational", "gradual", "none"]
ExitScale = Literal["paper", "uniform", "linear", "sum", "sqrt", "inv", "inv_sqrt"]
DropoutSchedule = Literal["exp", "constant"]

COUNTS = ("steps", "batch_size", "length", "exit_period", "rank", "phase", "chunk")
COUNTS += ("eval_every", "eval_batches", "save_every")
CHOICES = {
    "kind": get_args(Kind),
    "start": get_args(Start),
    "exit_curriculum": get_args(ExitCurriculum),
    "exit_scale": get_args(ExitScale),
    "dropout_schedule": get_args(DropoutSchedule),
    "compute_dtype": get_args(ComputeDtype),
}
HEADS = ("frozen", "jei", "stop")  # train exits beside a backbone that keeps its bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run. What it trains and the loss are those of its kind:

    - ``layerskip``: layer dropout and early-exit losses (:mod:`dyninf.training.layerskip`);
    - ``soft``: the mean cross-entropy of every ``exit_period``-th depth (:mod:`dyninf.training.soft`);
    - ``plain``: the cross-entropy of the last layer alone, without dropout;
    - ``frozen``: adapters and gates of :class:`dyninf.depth.AdaptedExit` beside a frozen backbone;
    - ``jei``: the readout and the gates of :class:`dyninf.depth.JointExit`, in turn, on frozen layers;
    - ``stop``: the classifier of :class:`dyninf.depth.StopExit` beside a frozen model.

    Args:
        kind: one of these; a field that names others is not read.
        start: initial weights of a new model: small random ones, or those of
            :func:`dyninf.training.retrieval_start.retrieval_start`.
        steps: optimizer steps.
        batch_size: sequences per step.
        length: tokens predicted in each sequence.
        learning_rate: peak; warmed up linearly over ``warmup`` steps, then a cosine down to a tenth.
        weight_decay: on matrices only (AdamW).
        clip: largest global norm of a gradient.
        dropout: layerskip; probability of dropping the last layer at full schedule.
        dropout_schedule: ``exp`` rises from 0, for training from scratch; ``constant`` is for trained weights.
        e_scale: layerskip; strength of the early exits in the loss; 0 is the plain loss.
        exit_scale: how the strength grows with depth; ``uniform`` and ``linear`` ask more of the early exits than
            ``paper``, which is about quadratic.
        exit_curriculum: which exits a step trains; with ``rotational`` every ``exit_period``-th, shifted by one each
            step, so that only ``ceil(L / exit_period) + 1`` readouts are computed.
            For soft and jei, the exits are every ``exit_period``-th depth at every step.
        rank: frozen; width of an exit's adapter.
        price: jei; nats that all layers are worth.
        phase: jei; steps before the readout and the gates take turns.
        compute_dtype: dtype of activations and of the weights they meet; the master weights stay float32.
        chunk: tokens whose logits exist at once.
        eval_every: steps between two held-out evaluations; ``eval_batches`` batches each.
        save_every: steps between two checkpoints.
        seed: of initial weights, data order and dropout.

    Raises:
        ValueError: if a number is out of range or a name unknown.
    """

    kind: Kind = "layerskip"
    start: Start = "normal"
    steps: int
    batch_size: int
    length: int
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    dropout: float = 0.1
    dropout_schedule: DropoutSchedule = "exp"
    e_scale: float = 1.0
    exit_scale: ExitScale = "paper"
    exit_curriculum: ExitCurriculum = "rotational"
    exit_period: int = 4
    rank: int = 16
    price: float = 0.7
    phase: int = 25
    compute_dtype: ComputeDtype = "bfloat16"
    chunk: int = 8192
    eval_every: int = 200
    eval_batches: int = 4
    save_every: int = 500
    seed: int = 0

    def __post_init__(self):
        for name in COUNTS:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be a positive integer, got {getattr(self, name)!r}")
        if not isinstance(self.warmup, int) or not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"expected warmup to be a whole number below steps={self.steps}, got {self.warmup!r}; "
                f"use a tenth of the steps, {self.steps // 10}"
            )
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 32:
            raise ValueError(f"expected seed to be an integer in [0, 2**32), got {self.seed!r}")
        ranges = {  # comparisons that NaN fails
            "learning_rate": ("above 0 and finite", 0 < self.learning_rate < math.inf),
            "clip": ("above 0 and finite", 0 < self.clip < math.inf),
            "weight_decay": ("at least 0 and finite", 0 <= self.weight_decay < math.inf),
            "e_scale": ("at least 0 and finite", 0 <= self.e_scale < math.inf),
            "price": ("at least 0 and finite", 0 <= self.price < math.inf),
            "beta2": ("in [0, 1)", 0 <= self.beta2 < 1),
            "dropout": ("in [0, 1]", 0 <= self.dropout <= 1),
        }
        for name, (expected, holds) in ranges.items():
            if not holds:
                raise ValueError(f"expected {name} {expected}, got {getattr(self, name)!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"expected {name} among {', '.join(choices)}, got {getattr(self, name)!r}")
