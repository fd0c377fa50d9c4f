"""Choose the next token from logits.

A sampler is a frozen pytree dataclass: called with logits and one key per sequence it returns tokens. Filters
(:class:`Temperature`, :class:`TopK`, :class:`TopP`, :class:`MinP`) sample from what they leave; :func:`chain` applies
several in order. Parameters are leaves: changing one never recompiles, except ``TopK.k``, which decides a shape.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyninf.pytree import pytree


class Sampler:
    """Base of samplers: filter logits, then draw."""

    def filter(self, logits_BV: jax.Array) -> jax.Array:
        """Return the logits of the distribution to draw from; ``-inf`` for tokens that must not be drawn."""
        return logits_BV

    def __call__(self, logits_BV: jax.Array, key_B: jax.Array) -> jax.Array:
        """Return a token id per sequence, ``int32 [B]``; each sequence draws from its own key."""
        return jax.vmap(jax.random.categorical)(key_B, self.filter(logits_BV)).astype(jnp.int32)

    def validate(self) -> None:
        """Raise ValueError if a parameter is out of range."""


@pytree()
class Greedy(Sampler):
    """Take the most probable token; the lowest id among equals."""

    def __call__(self, logits_BV: jax.Array, key_B: jax.Array) -> jax.Array:
        """Return the argmax; the keys are not used."""
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


@pytree()
class Temperature(Sampler):
    """Divide logits by a temperature: below 1 sharper, above 1 flatter.

    Args:
        temperature: greater than 0; use :class:`Greedy` for 0.
    """

    temperature: float | jax.Array = 1.0

    def filter(self, logits_BV: jax.Array) -> jax.Array:
        """Scale the logits."""
        return logits_BV / self.temperature

    def validate(self) -> None:
        """Raise ValueError unless the temperature is positive and finite."""
        _require("temperature", self.temperature, 1e-6, 1e6, "use Greedy() for 0")


@pytree(static=("k",))
class TopK(Sampler):
    """Keep the k most probable tokens (and what equals the last of them).

    Args:
        k: tokens kept (at least 1).
    """

    k: int

    def filter(self, logits_BV: jax.Array) -> jax.Array:
        """Drop everything below the k-th logit."""
        top, _ = jax.lax.top_k(logits_BV, min(self.k, logits_BV.shape[-1]))
        return jnp.where(logits_BV < top[:, -1:], -jnp.inf, logits_BV)

    def validate(self) -> None:
        """Raise ValueError unless k is a positive integer."""
        if not isinstance(self.k, (int, np.integer)) or self.k < 1:
            raise ValueError(f"expected k to be an integer of at least 1, got {self.k!r}; keep at least one token")


@pytree()
class TopP(Sampler):
    """Keep the smallest set of most probable tokens whose probability reaches p (nucleus sampling).

    Source: Holtzman et al. 2020. The token that crosses p is kept, and with it what equals it.

    Args:
        p: probability mass kept (0 to 1); 1 keeps everything.
    """

    p: float | jax.Array

    def filter(self, logits_BV: jax.Array) -> jax.Array:
        """Drop the tail."""
        ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(ordered_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        kept_BV = (before_BV < self.p).at[:, 0].set(True)
        smallest_B1 = jnp.min(jnp.where(kept_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True)
        return jnp.where((logits_BV < smallest_B1) & (jnp.asarray(self.p) < 1), -jnp.inf, logits_BV)

    def validate(self) -> None:
        """Raise ValueError unless p is a probability."""
        _require("p", self.p, 0.0, 1.0, "1 keeps every token")


@pytree()
class MinP(Sampler):
    """Keep tokens at least ``p`` times as probable as the most probable one.

    Source: Nguyen et al. 2024.

    Args:
        p: share of the largest probability (0 to 1); 0 keeps everything.
    """

    p: float | jax.Array

    def filter(self, logits_BV: jax.Array) -> jax.Array:
        """Drop improbable tokens."""
        peak_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        return jnp.where(logits_BV < peak_B1 + jnp.log(jnp.asarray(self.p, jnp.float32)), -jnp.inf, logits_BV)

    def validate(self) -> None:
        """Raise ValueError unless p is a probability."""
        _require("p", self.p, 0.0, 1.0, "0 keeps every token")


@pytree()
class Chain(Sampler):
    """Apply several filters in order, then draw; made by :func:`chain`."""

    filters: tuple[Sampler, ...]

    def filter(self, logits_BV: jax.Array) -> jax.Array:
        """Apply the filters one after the other."""
        for step in self.filters:
            logits_BV = step.filter(logits_BV)
        return logits_BV

    def validate(self) -> None:
        """Raise ValueError if a filter is out of range."""
        for step in self.filters:
            if isinstance(step, Greedy):
                raise ValueError("expected filters in a chain, got Greedy, which draws nothing; use it alone")
            step.validate()


def chain(*filters: Sampler) -> Chain:
    """Sample after applying ``filters`` in order, for example ``chain(Temperature(temperature=0.8), TopK(k=50))``."""
    return Chain(filters=filters)


def _require(name: str, value: Any, low: float, high: float, hint: str) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    number = np.ndim(value) == 0 and jnp.issubdtype(np.asarray(value).dtype, jnp.number)
    if not number or not low <= float(value) <= high:
        raise ValueError(f"expected {name} between {low:g} and {high:g}, got {value!r}; {hint}")
