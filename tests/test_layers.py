"""The imports of the package keep to its layers. The tables below are the rule; docs/architecture.md gives the reasons.

Imports are read from the source, those inside functions and under `TYPE_CHECKING` too: all of them are dependencies.
Only the last rule, `early`, asks when an import happens.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tribute"

# From the ground up. A unit imports from lower layers, and from units before it in its own.
LAYERS = (
    ("errors", "types", "seeding", "files", "pulse", "memory", "config"),
    ("games", "store"),
    ("data",),
    ("models",),
    ("diffusion", "unlearning", "behaviors"),
    ("baselines",),
    ("study", "report"),
    ("cli", "__main__"),
)

# These do not know each other, whatever their order.
STRANGERS = (("games", "store"), ("diffusion", "behaviors"), ("unlearning", "behaviors"))

# Who may import a heavy dependency: one owner where possible. diffusers has two, as networks live in models and the
# samplers' schedulers in diffusion; unlearning and study only name the type of a network.
OWNERS = {
    "PIL": {"data"},
    "accelerate": {"diffusion"},
    "bitsandbytes": {"diffusion"},
    "datasets": {"data"},
    "deepspeed": set(),  # Accelerate's business
    "diffusers": {"models", "diffusion", "unlearning", "study"},
    "jinja2": {"report"},
    "matplotlib": {"study", "report"},
    "peft": {"models"},
    "pyarrow": {"data", "store"},
    "pydantic": {"config", "cli"},
    "psycopg": set(),  # SQLAlchemy's business
    "ray": {"study"},
    "sklearn": {"data"},
    "sqlalchemy": {"store"},
    "torch_fidelity": {"behaviors"},
    "torch_pruning": {"models"},
    "torchmetrics": {"behaviors"},
    "transformers": {"behaviors"},
    "tyro": {"cli"},
    # Cannot be imported beside the CPU build of torch.
    "torchvision": set(),
    # Nothing is loaded that can execute code.
    # Ray's own messages are pickles that it made itself; nothing else is read so.
    "cloudpickle": set(),
    "dill": set(),
    "joblib": set(),
    "pickle": set(),
}

# What a unit may import besides the standard library and the package itself, where that is less than anything.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "pulse": set(),
    "memory": set(),
    "types": {"numpy", "scipy"},
    "games": {"numpy", "scipy"},
}

# `tribute --help` must not wait for these: nothing that the command line imports at once may import them at once.
LATE = {
    *(
        "accelerate",
        "bitsandbytes",
        "datasets",
        "diffusers",
        "jinja2",
        "matplotlib",
        "pandas",
        "pyarrow",
        "ray",
        "scipy",
    ),
    *("sklearn", "sqlalchemy", "torch", "torch_fidelity", "torch_pruning", "torchmetrics", "transformers"),
}


@dataclass(frozen=True)
class Import:
    """One import: who, of what (both as dotted names), and whether it happens when the importer is imported."""

    importer: str
    imported: str
    at_once: bool
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def read_imports(source: Path) -> list[Import]:
    """All imports of the package whose folder is `source`."""
    modules = {module_name(source, path): path for path in sorted(source.rglob("*.py"))}
    found: list[Import] = []
    for importer, path in modules.items():
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_once = {id(node) for node in walk_at_once(tree)}
        for node in ast.walk(tree):
            for imported in imported_names(node, package, set(modules)):
                found.append(Import(importer, imported, id(node) in at_once, getattr(node, "lineno", 0)))
    return found


def module_name(source: Path, path: Path) -> str:
    parts = [source.name, *path.relative_to(source).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def walk_at_once(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from walk_at_once(child)


def imported_names(node: ast.AST, package: str, modules: set[str]) -> list[str]:
    """Dotted names that a node imports; `from x import y` is `x.y` if that is a module of ours, and else `x`.

    `from tribute import __version__` is no dependency on what stands above: the version is a constant.
    """
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            return [full if (full := f"{base}.{name}") in modules else base for name in names]
        case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]):
            return [name] if called in ("import_module", "__import__") else []
    return []


def unit_of(module: str) -> str | None:
    """The unit of a module of ours; None for the package itself, which stands above all."""
    return module.split(".")[1] if "." in module else None


def violations(source: Path) -> list[str]:
    """What breaks the rules, one line each."""
    imports = read_imports(source)
    ours = source.name
    rank = {unit: (layer, i) for layer, units in enumerate(LAYERS) for i, unit in enumerate(units)}
    broken: list[str] = []
    for entry in imports:
        unit, top = unit_of(entry.importer), entry.imported.partition(".")[0]
        if unit is not None and unit not in rank:
            broken.append(f"{entry.importer} belongs to no layer")
        elif top != ours:
            if top in OWNERS and unit not in OWNERS[top]:
                broken.append(f"{entry}, which belongs to {sorted(OWNERS[top]) or 'nobody'}")
            if unit in ALLOWED and top not in ALLOWED[unit] | set(sys.stdlib_module_names):
                broken.append(f"{entry}, beyond {sorted(ALLOWED[unit]) or 'the standard library'}")
        elif unit is not None and (target := unit_of(entry.imported)) != unit:
            if target is None or target not in rank or rank[target] > rank[unit]:
                broken.append(f"{entry}, upward")
            elif {unit, target} in [set(pair) for pair in STRANGERS]:
                broken.append(f"{entry}, a stranger")
    return sorted(set(broken)) + circles(imports, ours) + early(imports, ours)


def circles(imports: list[Import], ours: str) -> list[str]:
    """The first circle among the modules, if there is one."""
    graph: dict[str, set[str]] = {}
    for entry in imports:
        if entry.imported.partition(".")[0] == ours:
            graph.setdefault(entry.importer, set()).add(entry.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"circle: {' <- '.join(error.args[1])}"]
    return []


def early(imports: list[Import], ours: str) -> list[str]:
    """Heavy imports that the command line would wait for, directly or through modules that it imports at once."""
    waiting, seen, broken = [f"{ours}.cli"], set(), []
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        # Importing a module imports the packages around it.
        waiting += [module.rpartition(".")[0]] if "." in module else []
        for entry in imports:
            if entry.importer == module and entry.at_once:
                if entry.imported.partition(".")[0] == ours:
                    waiting.append(entry.imported)
                elif entry.imported.partition(".")[0] in LATE:
                    broken.append(f"{entry} at once, and {ours}.cli waits for it")
    return sorted(broken)


def test_the_package_keeps_to_its_layers_and_imports_heavy_packages_late() -> None:
    assert violations(SOURCE) == []


def test_the_package_was_found_and_read() -> None:
    read = {(entry.importer, entry.imported) for entry in read_imports(SOURCE)}
    assert ("tribute.data.contributors", "tribute.seeding") in read
    assert ("tribute.data.hub", "datasets") in read, "imports inside functions count"


SOUND = {
    "__init__.py": "",
    "errors.py": "class TributeError(Exception): ...",
    "config.py": "import pydantic\nfrom tribute.errors import TributeError",
    "games/__init__.py": "",
    "games/coalitions.py": "import numpy\nfrom tribute import errors",
    "games/shapley.py": "from .coalitions import x\nfrom ..errors import TributeError",
    "store/records.py": "import sqlalchemy\nfrom tribute.errors import TributeError",
    "data/sources.py": "from tribute import __version__\ndef read():\n    import datasets",
    "diffusion/train.py": "import torch\nfrom tribute.data import sources",
    "unlearning/gd.py": "from tribute.diffusion import train",
    "behaviors/base.py": "import torchmetrics",
    "study/run.py": "import torch\nfrom tribute.games import shapley\nfrom tribute.behaviors import base",
    "cli/__init__.py": "import tyro\ndef main():\n    from tribute.study import run",
}


def written(folder: Path, changes: dict[str, str]) -> Path:
    for name, text in {**SOUND, **changes}.items():
        path = folder / "tribute" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "tribute"


def test_a_sound_tree_passes(tmp_path: Path) -> None:
    assert violations(written(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("games/lds.py", "import tribute.data.sources", "games.lds:1 imports tribute.data.sources, upward"),
        (
            "games/lds.py",
            "def f():\n    from ..data import sources",
            "games.lds:2 imports tribute.data.sources, upward",
        ),
        ("games/lds.py", "from .. import study", "games.lds:1 imports tribute, upward"),
        ("errors.py", "import tribute.config", "errors:1 imports tribute.config, upward"),
        ("data/sources.py", "from tribute import __version__, load", "data.sources:1 imports tribute, upward"),
        ("data/sources.py", "import importlib\nimportlib.import_module('tribute.study.run')", "study.run, upward"),
        ("store/records.py", "from tribute.games import shapley", "imports tribute.games.shapley, a stranger"),
        ("behaviors/base.py", "from tribute.diffusion import train", "tribute.diffusion.train, a stranger"),
        ("games/coalitions.py", "from tribute.games import shapley", "circle: tribute.games."),
        ("games/coalitions.py", "def f():\n    from .shapley import y", "circle: tribute.games."),
        ("study/run.py", "import sqlalchemy.orm", "imports sqlalchemy.orm, which belongs to ['store']"),
        ("data/sources.py", "def f():\n    import torchvision", "imports torchvision, which belongs to nobody"),
        ("store/records.py", "from pickle import loads", "imports pickle, which belongs to nobody"),
        ("games/lds.py", "def f():\n    import torch", "imports torch, beyond ['numpy', 'scipy']"),
        ("errors.py", "import numpy", "imports numpy, beyond the standard library"),
        ("helpers/files.py", "import os", "tribute.helpers.files belongs to no layer"),
        (
            "cli/__init__.py",
            "from tribute.study import run",
            "study.run:1 imports torch at once, and tribute.cli waits",
        ),
        ("cli/__init__.py", "class A:\n    import torch", "cli:2 imports torch at once"),
        ("__init__.py", "try:\n    import torch\nexcept ImportError: ...", "tribute:2 imports torch at once"),
    ],
)
def test_each_rule_can_be_broken(tmp_path: Path, name: str, text: str, expected: str) -> None:
    broken = violations(written(tmp_path, {name: text}))
    assert any(expected in line for line in broken), broken


def test_imports_for_types_only_do_not_make_the_command_line_wait(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nasync def f():\n    import torch"
    assert violations(written(tmp_path, {"cli/__init__.py": text})) == []
