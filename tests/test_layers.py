"""The architecture: imports point one way, and what is pure stays pure."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxckpt

ROOT = Path(jaxckpt.__file__).parent
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(ROOT.rglob("*.py"))}

#: From the bottom up: a module imports from its own layer and from those below.
LAYERS = [
    ["errors", "report"],
    ["graph"],
    ["storage"],
    [
        "progress",
        "preemption",
        "exits",
        "writer",
        "listing",
        "snapshot",
        "saving",
        "numbered",
        "reader",
        "convert",
        "initialize",
        "fill",
        "restored",
        "saved",
        "restoring",
    ],
    ["cadence", "saves", "catalog", "checkpoint", "manager"],
    ["cli", "demo"],
]
#: No jax, orbax, tensorstore, flax or optax here.
PURE = [
    "errors",
    "report",
    "graph.model",
    "graph.match",
    "graph.rules",
    "graph.status",
    "graph.grow",
    "storage.retention",
    "storage.manifest",
    "storage.chunks",
    "storage.layout",
    "storage.directory",
    "storage.plan",
    "storage.saved_text",
    "storage.format.head",
    "storage.format.ocdbt",
    "storage.state",
    "cadence",
    "reader",
    "listing",
]
HEAVY = {"jax", "orbax", "tensorstore", "flax", "optax"}


def imports(path: Path, *, everywhere: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else top_level(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def top_level(tree: ast.Module):
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from ast.walk(node) if not isinstance(node, ast.FunctionDef | ast.ClassDef) else [node]


def layer(module: str) -> int:
    for index, names in enumerate(LAYERS):
        if module in names or module.split(".")[0] in names:
            return index
    pytest.fail(f"{module} is in no layer")


@pytest.mark.parametrize("module", [m for m in MODULES if m not in ("__init__", "__main__")])
def test_imports_point_down(module):
    module_layer = layer(module.removesuffix(".__init__"))
    for name in imports(MODULES[module], everywhere=True):
        inner = name.removeprefix("jaxckpt.")
        if name.startswith("jaxckpt.") and inner in MODULES:
            assert layer(inner) <= module_layer, f"{module} imports {name}, which is above it"


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_nothing_heavy(module):
    code = f"import sys, jaxckpt.{module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("library", "owners"),
    [("tensorstore", ["storage.kv", "storage.kv_dump"]), ("orbax", ["storage.handler"])],
)
def test_few_modules_import_it(library, owners):
    users = [
        module
        for module, path in MODULES.items()
        if any(name.split(".")[0] == library for name in imports(path, everywhere=True))
    ]
    assert users == owners


def test_files_and_functions_stay_small():
    for module, path in MODULES.items():
        text = path.read_text()
        assert text.count("\n") <= 400, f"{module} has outgrown one concept"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 55, f"{module}.{node.name} has {lines} lines"


def test_public_names_are_the_namespace():
    assert sorted(jaxckpt.__all__) == sorted(
        set(dir(jaxckpt)) - {n for n in dir(jaxckpt) if n.startswith("_")}
    )
    for name in jaxckpt.__all__:
        value = getattr(jaxckpt, name)
        assert value.__doc__, f"jaxckpt.{name} has no docstring"


def test_import_alone_imports_no_jax():
    code = f"import sys, jaxckpt; print(sorted({HEAVY | {'numpy'}!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
