"""The import directions of the library, the house rules that a machine can check, and the list of packages.

Every Python file of the repository is parsed, never imported. Each rule is shown to fire on a small bad example.
"""

import ast
import io
import re
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# top-level folder -> name under which it is imported
FOLDERS = {
    "dyninf": "dyninf",
    "pallas_kernels": "pallas_kernels",
    "models": "dyninf.models",
    "configs": "dyninf.configs",
    "bench": "bench",
    "tests": "tests",
}
LIBRARY = {"pytree", "core", "pallas_kernels", "models", "configs", "training", "cli"}
RUNTIME = {"jax", "flax", "optax", "orbax", "numpy", "safetensors", "tokenizers", "rich"}
ANYTHING = None
# area -> (own areas it may import, third-party packages it may import beside the standard library)
ALLOWED = {
    "pytree": ({"pytree"}, {"jax", "numpy"}),
    "core": ({"core", "pytree", "pallas_kernels"}, {"jax", "numpy"}),
    "pallas_kernels": ({"pallas_kernels"}, {"jax", "numpy"}),
    "models": ({"models", "pytree", "pallas_kernels"}, {"jax", "flax", "orbax", "safetensors", "tokenizers", "numpy"}),
    "configs": ({"configs", "models", "core", "pytree", "training"}, set()),
    "training": (LIBRARY - {"cli"}, RUNTIME),
    "cli": (LIBRARY, RUNTIME | {"matplotlib"}),  # an extra: imported where something is drawn
    "bench": (LIBRARY | {"bench"}, ANYTHING),
    "tests": (LIBRARY | {"bench", "tests"}, ANYTHING),
}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NNX_TRANSFORMS = {"jit", "scan", "vmap", "pmap", "grad", "value_and_grad", "remat", "cond", "while_loop", "fori_loop"}


def files():
    """Every Python file of the repository as (path relative to it, dotted module name)."""
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            inner = inner[:-1] if inner[-1] == "__init__" else inner
            found.append((path.relative_to(ROOT), ".".join((package, *inner))))
    return found


FILES = files()
MODULES = {module for _, module in FILES}


def area_of(module):
    """The part of the repository that a dotted name belongs to; None for a third-party or standard module."""
    parts = module.split(".")
    if parts[0] in ("bench", "tests", "pallas_kernels"):
        return parts[0]
    if parts[0] != "dyninf":
        return None
    second = parts[1] if len(parts) > 1 else ""
    if second in ("models", "configs", "training", "pytree"):
        return second
    return "cli" if second.startswith("cli") or second == "__main__" else "core"


def imports(tree, module, is_package):
    """Every module that the code imports as (line, dotted name, name taken from it or None), also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            base = ".".join(parents[: len(parents) - node.level + is_package]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                known = inner in MODULES or inner in FOLDERS.values()
                yield node.lineno, inner if known else base, alias.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, node.args[0].value, None


def import_faults(source, module, is_package=False):
    """Imports of `source` that its area of the repository may not have."""
    area = area_of(module)
    own, third_party = ALLOWED[area]
    for line, name, taken in imports(ast.parse(source), module, is_package):
        top, target = name.split(".")[0], area_of(name)
        if top in ("models", "configs"):
            yield f"{line}: imports {name}, which is installed as dyninf.{name}"
        elif target and target not in own:
            yield f"{line}: {area} imports {name} ({target})"
        elif target and taken and taken.startswith("_") and not taken.endswith("__"):
            yield f"{line}: imports the private name {taken} of {name}"
        elif not target and third_party is not ANYTHING and top not in third_party | sys.stdlib_module_names:
            yield f"{line}: {area} imports {name}"


def house_faults(source, module):
    """What `source` does against the conventions of the repository."""
    area = area_of(module)
    library, user_facing = area in LIBRARY - {"cli"}, area in ("cli", "bench")
    tree = ast.parse(source)
    limit, lines = 500 if area == "pallas_kernels" else 300, source.count("\n")
    if lines > limit:
        yield f"has {lines} lines, the limit is {limit}"
    if source.strip() and not ast.get_docstring(tree):
        yield "1: has no module docstring"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string):
            yield f"{token.start[0]}: has an unfinished mark"
    if area == "tests":
        return
    for node in ast.walk(tree):
        at = getattr(node, "lineno", 0)
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        attribute = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if called == "print" and not user_facing:
            yield f"{at}: prints outside the command line and bench/"
        if called in ("eval", "exec"):
            yield f"{at}: calls {called}"
        if attribute == "torch.load":
            yield f"{at}: unpickles with torch.load"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"{at}: allows pickles"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            if names & PICKLES:
                yield f"{at}: imports a pickle module"
        if isinstance(node, ast.Assert) and area != "bench":
            yield f"{at}: asserts; raise ValueError or NotImplementedError"
        if library and isinstance(node, ast.Global):
            yield f"{at}: changes a global"
        if library and attribute in ("os.environ", "os.getenv"):
            yield f"{at}: reads the environment"
        if attribute.startswith("nnx.") and attribute[4:] in NNX_TRANSFORMS and area != "bench":
            yield f"{at}: uses {attribute}; plain jax transformations only"


def test_there_is_something_to_check():
    assert {area_of(module) for _, module in FILES} >= {"core", "models", "configs", "pallas_kernels", "tests"}


@pytest.mark.parametrize(("path", "module"), FILES, ids=[str(path) for path, _ in FILES])
def test_import_directions(path, module):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert list(import_faults(source, module, path.name == "__init__.py")) == []


@pytest.mark.parametrize(("path", "module"), FILES, ids=[str(path) for path, _ in FILES])
def test_house_rules(path, module):
    assert list(house_faults((ROOT / path).read_text(encoding="utf-8"), module)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pallas_kernels.dispatch", "import dyninf"),
        ("pallas_kernels.dispatch", "import flax"),
        ("dyninf.models.layers", "from dyninf.training import loop"),
        ("dyninf.models.layers", "from dyninf.plan import Plan"),
        ("dyninf.models.layers", "from dyninf import Plan"),
        ("dyninf.models.layers", "import torch"),
        ("dyninf.plan", "from dyninf import models"),
        ("dyninf.plan", "from .configs.plans import PLANS"),
        ("dyninf.depth.exits", "def f():\n    from ..training import gates"),
        ("dyninf.plan", "import importlib\nimportlib.import_module('dyninf.cli')"),
        ("dyninf.cache", "from flax import nnx"),
        ("dyninf.pytree", "from dyninf.plan import Plan"),
        ("dyninf.configs.plans", "import dyninf.cli"),
        ("dyninf.cli", "from bench import timing"),
        ("dyninf.training.loop", "import tests.helpers"),
        ("dyninf.training.loop", "import transformers"),
        ("bench.decode", "from tests import helpers"),
        ("tests.test_plan", "import models"),
        ("dyninf.plan", "from dyninf.depth.base import _private"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert len(list(import_faults(source, module))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dyninf.plan", "import jax.numpy as jnp\nimport numpy as np\nfrom .depth.base import RunAll\nimport math"),
        ("dyninf.models.layers", "from flax import nnx\nfrom dyninf.pytree import pytree\nfrom . import config"),
        ("dyninf.configs.plans", "from dyninf import Plan\nfrom dyninf.models import config"),
        ("dyninf.cli", "from dyninf import models, training\nimport rich.console"),
        ("bench.decode", "import torch\nfrom bench import timing\nimport dyninf"),
    ],
)
def test_a_right_import_passes(module, source):
    assert list(import_faults(source, module)) == []


@pytest.mark.parametrize(
    ("module", "body"),
    [
        ("dyninf.plan", "\n" * 300),
        ("pallas_kernels.dispatch", "\n" * 500),
        ("dyninf.plan", "# TODO: later"),
        ("dyninf.plan", "print(1)"),
        ("dyninf.plan", "assert True"),
        ("dyninf.cli", "assert True"),
        ("dyninf.plan", "import os\nos.environ['A']"),
        ("dyninf.plan", "def f():\n    global a"),
        ("dyninf.cli", "eval('1')"),
        ("bench.decode", "import pickle"),
        ("dyninf.models.convert", "import torch\ntorch.load('x')"),
        ("dyninf.models.convert", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        ("dyninf.models.layers", "from flax import nnx\nnnx.jit(f)"),
    ],
)
def test_a_broken_house_rule_is_found(module, body):
    assert len(list(house_faults(f'"""Docstring."""\n{body}\n', module))) == 1


def test_a_missing_docstring_is_found_and_allowed_things_pass():
    assert len(list(house_faults("x = 1\n", "dyninf.plan"))) == 1
    assert list(house_faults("", "dyninf.plan")) == []
    assert list(house_faults('"""D."""\nprint(model.eval(), jax.debug.print)\n', "dyninf.cli")) == []
    assert list(house_faults('"""D."""\nnp.load("x")\n', "dyninf.training.data")) == []


def test_pyproject_lists_every_package():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    installed = [(path, module) for path, module in FILES if path.parts[0] not in ("bench", "tests")]
    folders = {module if path.name == "__init__.py" else module.rpartition(".")[0] for path, module in installed}
    assert set(setuptools["packages"]) == folders, "packages in pyproject.toml and folders with Python files differ"
    assert folders <= {module for path, module in installed if path.name == "__init__.py"}, "an __init__.py is missing"
    assert setuptools["package-dir"] == {name: folder for folder, name in FOLDERS.items() if name != folder}
