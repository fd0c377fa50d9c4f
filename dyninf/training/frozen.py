"""Train a few arrays of a model, or heads beside it, and leave the rest exactly as it was.

Two ways. :func:`select` takes the arrays out by name, to be differentiated and optimised alone, and :func:`merge` puts
them back: the rest has no gradient and no optimizer state, which is what to use::

    trained = select(model, ("norm_final", "layers.*.norm_*"))
    grads = jax.grad(lambda trained: soft_loss(merge(model, trained), tokens, depths)[0])(trained)

:func:`only` wraps an optimizer for a loop that holds gradients of everything; it keeps no state for the rest.
:func:`head_loss` trains exits that the model lacks.

Names are those of :mod:`dyninf.models.parameters`, ``norm_final`` or ``layers.3.wo``; in a tuple or dict of trees they
begin with the index or key, ``policy.gate``.

Source: the idea of EE-Tuning (Pan et al., "EE-Tuning: An Economical yet Scalable Solution for Tuning Early-Exit Large
Language Models", 2024), which tunes exits of a frozen model.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dyninf.depth.adapted import AdaptedExit
from dyninf.model import CausalLM
from dyninf.training.layerskip import exit_loss
from dyninf.training.states import CHUNK, count_layers, exit_states


def select(tree: Any, names: Sequence[str]) -> dict[str, jax.Array]:
    """Return the arrays of a tree whose names match one of the patterns, by name.

    Args:
        names: patterns with ``*`` for anything: ``("norm_final", "layers.*.norm_*")``.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    found = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for pattern in names:
        if not fnmatch.filter(found, pattern):
            raise ValueError(f"expected arrays named {pattern!r}, got only {_few(found)}; correct the pattern")
    return {name: leaf for name, leaf in found.items() if _matches(name, names)}


def merge(tree: Any, arrays: Mapping[str, jax.Array]) -> Any:
    """Return the tree with the arrays that are given by name in place of its own.

    Raises:
        ValueError: if a name is none of the tree's.
    """
    known = {_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    if unknown := sorted(set(arrays) - known):
        raise ValueError(f"expected names of the tree, got {unknown}; its arrays are {_few(known)}")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: arrays.get(_name(path), leaf), tree)


def only(optimizer: optax.GradientTransformation, names: Sequence[str]) -> optax.GradientTransformation:
    """Return an optimizer that updates the arrays whose names match a pattern and gives zero updates to the rest.

    The inner optimizer sees the matching arrays alone: no moments of the rest exist, and a global norm is theirs. A
    gradient that is not a number elsewhere does no harm. Its ``init`` raises ValueError if a pattern matches nothing.
    """

    def labels(tree: Any) -> Any:
        select(tree, names)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "trained" if _matches(_name(path), names) else "frozen", tree
        )

    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def head_loss(
    model: CausalLM,
    policy: AdaptedExit,
    tokens_BT1: jax.Array,
    layers: Sequence[int],
    weights_K: jax.Array,
    *,
    mask_BT: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted cross-entropy of a policy's adapted exits, and that of each, with the model frozen.

    No gradient enters the model; the gates get none either (train them with
    :func:`dyninf.training.meta_classifier.meta_loss`).

    Args:
        tokens_BT1: texts ``[B, T+1]``, right-padded.
        layers: layers before which tokens leave (1 to L - 1), ascending; static.
        weights_K: weight of each of these exits.
        mask_BT: bool, True where the prediction counts; ``None`` for everywhere.
        chunk: tokens whose logits are held at once.

    Returns:
        The loss, a float32 scalar, and the mean cross-entropy of each exit (nats per token, float32 ``[K]``).

    Raises:
        ValueError: if the policy or the layers do not fit the model, or shapes do not fit together.
    """
    model = jax.lax.stop_gradient(model)
    num_layers = count_layers(model)
    policy.validate(num_layers)
    if any(layer not in policy.decision_layers(num_layers) for layer in layers):
        raise ValueError(
            f"expected layers among {policy.decision_layers(num_layers)}, where the policy decides, got {layers}"
        )
    states_KBTD = jax.lax.stop_gradient(exit_states(model, tokens_BT1[:, :-1], layers))
    adapted_KBTD = jnp.stack([policy.adapt(layer, x_BTD) for layer, x_BTD in zip(layers, states_KBTD, strict=True)])
    targets_BT = tokens_BT1[:, 1:]
    mask_BT = jnp.ones(targets_BT.shape, bool) if mask_BT is None else mask_BT
    return exit_loss(model.unembed, adapted_KBTD, targets_BT, jnp.asarray(weights_K), mask_BT, chunk)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _name(path: tuple) -> str:
    path = path[:-1] if path and getattr(path[-1], "name", None) == "value" else path  # of a Flax parameter
    return ".".join(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path)


def _few(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:12]) + (", ..." if len(listed) > 12 else "")
