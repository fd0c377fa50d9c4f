"""Plans on the command line: a name of ``configs/plans.py``, a file of calibrated or trained exits, and changes to it.

A change is ``PATH=VALUE`` with a dotted path such as ``depth.threshold``. Wrappers (a policy that holds another one)
need not be named: a field that a wrapper does not have is looked for inside it. The value is read as what stands there
now: a number, true or false, layer numbers joined by commas, or text.
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import dyninf
from dyninf.cli.calibrated import read_calibrated
from dyninf.cli.common import require_known
from dyninf.configs.plans import plans
from dyninf.depth import AdaptedExit, MetaExit, StopExit
from dyninf.indexed import is_indexed, refuse_indexed
from dyninf.models import Transformer
from dyninf.training.exits_file import load_exits

WEIGHTS = {AdaptedExit: "gate", MetaExit: "gate", StopExit: "weight"}  # arrays [L, D, ...] that read a state
HIDDEN = ("draft",)  # holds only its identity element in this version


def add_plan_options(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """Add ``--plan`` and ``--set``."""
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--plan", metavar="NAME", default=default, help=f"a named plan{shown}; 'dyninf plans' lists them"
    )
    parser.add_argument(
        "--set",
        metavar="PATH=VALUE",
        dest="changes",
        action="append",
        default=[],
        help="change a field of the plan, e.g. depth.threshold=0.9 (may be given several times)",
    )


def read_plan(name: str, changes: Sequence[str], num_layers: int) -> dyninf.Plan:
    """Return a named plan for a model of ``num_layers`` layers, or that of a file, changed.

    Files are those of ``dyninf calibrate --json``, and the ``exits.safetensors`` that ``dyninf train`` leaves.

    Raises:
        ValueError: if there is no such plan or field, or a value cannot be read.
    """
    if name == "dense":
        plan = dyninf.Plan()
    elif name.endswith(".json"):
        plan = read_calibrated(name)
    elif name.endswith(".safetensors"):
        plan = dyninf.Plan(depth=load_exits(name))
    else:
        named = plans(num_layers)
        require_known("a plan", name, named)
        plan = named[name]
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path:
            raise ValueError(f"expected PATH=VALUE such as depth.threshold=0.9, got {change!r}")
        plan = change_field(plan, path.strip(), text.strip())
    return plan


def read_plans(text: str, num_layers: int) -> dict[str, dyninf.Plan]:
    """Return the plans of a list such as ``dense,exit_confidence@depth.threshold=0.8`` by what was written.

    Raises:
        ValueError: if the list is empty, names a plan twice, or holds one that :func:`read_plan` refuses.
    """
    # A comma before a digit belongs to a list of layers: skip_middle@depth.layers=3,4
    specs = [spec.strip() for spec in re.split(r",(?!\s*\d)", text)]
    if "" in specs or len(set(specs)) != len(specs):
        raise ValueError(f"expected different plans joined by commas, got {text!r}")
    return {spec: read_plan(spec.split("@")[0], spec.split("@")[1:], num_layers) for spec in specs}


def check_plan(plan: dyninf.Plan, model: Transformer) -> None:
    """Raise before any work if a plan or the width of its trained weights does not fit the model.

    Raises:
        ValueError: as :func:`dyninf.check`, for weights that were trained beside a model of another width, and for a
            plan that stacked layers cannot run, with which each step would copy them.
        NotImplementedError: if a field holds something this version cannot run.
    """
    dyninf.check(plan, model)
    if is_indexed(model.layers) and (reason := refuse_indexed(plan, model.layers)) is not None:
        raise ValueError(f"expected a plan that stacked layers can run, got one that cannot: {reason}; drop --stacked")
    width = model.config.d_model
    for policy in policies(plan.depth):
        weights = getattr(policy, WEIGHTS.get(type(policy), ""), None)
        if weights is not None and weights.shape[1] != width:
            raise ValueError(
                f"expected exits for a model of d_model={width}, got {type(policy).__name__} with weights for "
                f"{weights.shape[1]}; take those that were trained beside this model"
            )


def change_field(plan: dyninf.Plan, path: str, text: str) -> dyninf.Plan:
    """Return the plan with one field replaced.

    Raises:
        ValueError: if the path names no field of a number, a text or layers, or the text cannot be read as one.
    """
    changed = _change(plan, tuple(path.split(".")), text, path)
    if changed is None:
        known = ", ".join(f"{name}={shown(value)}" for name, value in fields(plan).items())
        raise ValueError(f"expected a field of this plan ({known}), got {path!r}")
    return changed


def fields(plan: dyninf.Plan) -> dict[str, Any]:
    """Return the values that can be changed by their paths, wrappers left out of the path."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(plan):
        if field.name not in HIDDEN:
            _collect(getattr(plan, field.name), field.name, found)
    return found


def policies(policy: Any) -> list[Any]:
    """Return a policy and those it holds, outermost first."""
    inner = [held for _, child in _wrapped(policy) for held in policies(child)]
    return [policy, *inner]


def read_value(text: str, current: Any, path: str) -> Any:
    """Return ``text`` read as the kind of value that stands there now.

    ``None`` is taken for a list of layers, for a number if the text has a point.

    Numbers of a tuple are read as its first one is.

    Raises:
        ValueError: if it cannot be read so.
    """
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, int):
            return int(text)
        if isinstance(current, float) or (current is None and "." in text):
            return float(text)
        if current is None or isinstance(current, tuple):
            number = float if current and isinstance(current[0], float) else int
            return tuple(number(part) for part in text.split(",") if part.strip())
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(current), "numbers like 3,4")
        raise ValueError(f"expected {kind} for {path}, got {text!r}") from None
    return text


def shown(value: Any) -> str:
    """Return a value as ``--set`` reads it."""
    return "(none)" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _change(node: Any, path: tuple[str, ...], text: str, whole: str) -> Any:
    """Return ``node`` with the field replaced, ``None`` if it has none of that name."""
    name, rest = path[0], path[1:]
    names = {field.name for field in dataclasses.fields(node)}
    if name in names and name not in HIDDEN:
        value = getattr(node, name)
        if dataclasses.is_dataclass(value) and rest:
            changed = _change(value, rest, text, whole)
            return None if changed is None else dataclasses.replace(node, **{name: changed})
        if not rest and not dataclasses.is_dataclass(value) and not _wraps(value):
            return dataclasses.replace(node, **{name: read_value(text, value, whole)})
    inside = _wrapped(node)
    if name in names and rest and rest[0].isdigit():  # one of several policies, as in depth.policies.0.threshold
        inside = [(place, child) for place, child in inside if place == (name, int(rest[0]))]
        path = rest[1:]
        if not path:
            return None
    tried = [(place, _change(child, path, text, whole)) for place, child in inside]
    results = [(place, changed) for place, changed in tried if changed is not None]
    if len(results) > 1:
        (field, index), _ = results[0]
        raise ValueError(
            f"expected a field that one policy has, got {whole!r}, which {len(results)} have; name one by its place: "
            f"{field}.{index}.{path[0]}"
        )
    if not results:
        return None
    (field, index), changed = results[0]
    if index is None:
        return dataclasses.replace(node, **{field: changed})
    held = list(getattr(node, field))
    held[index] = changed
    return dataclasses.replace(node, **{field: tuple(held)})


def _collect(value: Any, path: str, found: dict[str, Any]) -> None:
    if not dataclasses.is_dataclass(value):
        found.setdefault(path, value)
        return
    held = {key[0] for key, _ in _wrapped(value)}
    for field in dataclasses.fields(value):
        if field.name not in held:
            _collect(getattr(value, field.name), f"{path}.{field.name}", found)
    for _, child in _wrapped(value):
        _collect(child, path, found)


def _wrapped(node: Any) -> list[tuple[tuple[str, int | None], Any]]:
    """Return what a wrapper holds, with the place of each: field, and index where the field is a tuple."""
    children: list[tuple[tuple[str, int | None], Any]] = []
    for field in dataclasses.fields(node) if not isinstance(node, dyninf.Plan) else ():
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            children.append(((field.name, None), value))
        elif _wraps(value):
            children += [((field.name, index), child) for index, child in enumerate(value)]
    return children


def _wraps(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(dataclasses.is_dataclass(child) for child in value)
