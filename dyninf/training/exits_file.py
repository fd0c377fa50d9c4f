"""Trained exits as a file: the arrays of a depth policy in safetensors, its name and settings in the header."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dyninf.depth import AdaptedExit, JointExit, MetaExit, StopExit
from dyninf.depth.base import DepthPolicy
from dyninf.depth.combinators import Restricted, at_layers

POLICIES = {policy.__name__: policy for policy in (AdaptedExit, JointExit, MetaExit, StopExit)}
FORMAT = "dyninf-exits-1"


def save_exits(policy: DepthPolicy, path: str | os.PathLike) -> None:
    """Write a policy with trained weights, or one that :func:`dyninf.depth.at_layers` made of it.

    The file appears whole or not at all.

    Raises:
        ValueError: if the policy is of another kind.
        OSError: if the file cannot be written.
    """
    path, layers = Path(path), None
    if isinstance(policy, Restricted) and policy == at_layers(policy.policy, layers=policy.layers or ()):
        policy, layers = policy.policy, policy.layers
    if type(policy).__name__ not in POLICIES:
        raise ValueError(f"expected a policy among {', '.join(POLICIES)}, or one at some layers, got {policy}")
    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    arrays = {name: np.asarray(value) for name, value in values.items() if np.ndim(value)}
    settings = {name: np.asarray(value).item() for name, value in values.items() if not np.ndim(value)}
    header = json.dumps({"policy": type(policy).__name__, "settings": settings, "layers": layers})
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(arrays, partial, metadata={FORMAT: header})  # one entry: several have no fixed order
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_exits(path: str | os.PathLike) -> DepthPolicy:
    """Return the policy that :func:`save_exits` wrote.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = (file.metadata() or {}).get(FORMAT)
            arrays = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}
        if header is None:
            raise ValueError(f"no header of the format {FORMAT!r}")
        if odd := [name for name, array in arrays.items() if not _is_sound(array)]:
            raise ValueError(f"not finite numbers in {', '.join(odd)}; train the exits again")
        about = json.loads(header)
        policy = POLICIES[about["policy"]](**arrays, **about["settings"])
        return policy if about["layers"] is None else at_layers(policy, layers=tuple(about["layers"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected a file of trained exits, got {str(path)!r}: {error!r}") from None


def _is_sound(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating) and bool(jnp.all(jnp.isfinite(array)))
