"""Modules import from lower layers only; a new module needs a line in `LAYERS`.

Also: no import cycle, no import hidden in a function, no private JAX, effects at the edge only, short files.
"""

import ast
import graphlib
from pathlib import Path

import pytest

import autorank_jax

ROOT = Path(autorank_jax.__file__).parent
REPOSITORY = Path(__file__).parent.parent

LAYERS = {  # a module imports from lower numbers only; a folder is one module here
    0: "types matching results",
    1: "batches budgets checks complexity controls datasets local lora losses mcda models participation transformer "
    "convolution updates",
    2: "aggregators assembly costs dealing evaluation faults federated_data lanes layers partition policies",
    3: "devices functions linen scheduling tasks",
    4: "engine",
    5: "simulation checkpoint criteria_file export text",  # here the host begins: jit, files, logging
    6: "complaints configuration events figures tables",
    7: "charges federations launch report",
    8: "personal ranking",
    9: "rounds",
    10: "resuming",
    11: "experiment runner",
    12: "display",
    13: "commands",
    14: "cli",
    15: "__main__ __init__",
}
NUMBER = {name: number for number, names in LAYERS.items() for name in names.split()}
HOST = 5
EFFECTS_BELOW = {
    "datasets": "reads and keeps files",
    "costs": "asks the compiler for FLOPs",
}
ENGINE_KNOWS_NOTHING_OF = {"aggregators", "local", "models", "tasks", "policies"}
OPTIONAL = {"matplotlib", "PIL", "rich", "safetensors", "tokenizers", "tyro"}
OPTIONAL |= {"requests", "tensorflow", "tensorflow_datasets", "tqdm"}  # of the extra tfds
MOST_LINES = 400

FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(ROOT.rglob("*.py"))}
SOURCES = {name: path.read_text() for name, path in FILES.items()}


def module_of(name):
    """Return the top-level module of a file: `aggregators.base` belongs to `aggregators`."""
    return name.partition(".")[0]


def imports_of(source, files=FILES):
    """Return the files of the package that a source imports, `aggregators.__init__` for the folder itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        found |= {file for name in names if (file := file_of(name, files))}
    return found


def file_of(name, files):
    """Return the file that an imported name comes from, None outside the package."""
    package, *parts = name.split(".")
    if package != "autorank_jax":
        return None
    while parts:
        for candidate in (".".join(parts), ".".join([*parts, "__init__"])):
            if candidate in files:
                return candidate
        parts.pop()
    return "__init__"


def hidden_imports(source):
    """Return imports inside functions, but for optional third-party packages, and relative imports."""
    tree, hidden = ast.parse(source), []
    for scope in ast.walk(tree):
        inside = isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(scope) if inside else ():
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                hidden += [ast.unparse(node) for name in names if name.partition(".")[0] not in OPTIONAL]
    hidden += [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level > 0]
    return sorted(set(hidden))


def effects(source):
    """Return what a source does to the world outside: printing, logging, files, and compiling."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"print", "open", "input"}
        ):
            found.add(node.func.id)
        if isinstance(node, ast.Attribute) and node.attr in {"jit", "open", "mkdir", "read_text", "write_text"}:
            found.add(node.attr)
        if isinstance(node, ast.Import) and {alias.name for alias in node.names} & {"logging", "sys"}:
            found.add("logging or sys")
        if isinstance(node, ast.ImportFrom) and node.module == "jax" and "jit" in {a.name for a in node.names}:
            found.add("jit")
    return found


@pytest.mark.parametrize("name", sorted({module_of(name) for name in FILES} | set(NUMBER)))
def test_every_module_has_a_layer(name):
    assert name in NUMBER, f"{name} is new: add it to LAYERS in {Path(__file__).name}, above all that it imports"
    assert name in {module_of(file) for file in FILES}, f"{name} is gone: remove it from LAYERS"


@pytest.mark.parametrize("name", FILES)
def test_imports_come_from_lower_layers(name):
    here = NUMBER.get(module_of(name), len(NUMBER))  # a module without a layer fails above
    for target in imports_of(SOURCES[name]):
        there = module_of(target)
        if there != module_of(name):
            assert NUMBER.get(there, 0) < here, (
                f"{name} (layer {here}) imports {there} (layer {NUMBER.get(there)}): move what is shared down, or pass "
                "it as an argument"
            )


def test_no_cycles():
    graph = {name: imports_of(source) - {name} for name, source in SOURCES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


@pytest.mark.parametrize("name", FILES)
def test_imports_stand_at_the_top(name):
    hidden = hidden_imports(SOURCES[name])
    assert hidden == [], f"{name} hides {hidden}: import at the top, absolutely; optional packages are in OPTIONAL"


@pytest.mark.parametrize("name", FILES)
def test_only_public_jax(name):
    assert "jax._src" not in SOURCES[name], f"{name} uses jax._src, which changes without notice"


@pytest.mark.parametrize("name", [n for n in FILES if NUMBER.get(module_of(n), HOST) < HOST])
def test_below_the_host_there_are_only_functions_of_arrays(name):
    if module_of(name) not in EFFECTS_BELOW:
        found = effects(SOURCES[name])
        assert not found, f"{name} is below layer {HOST}, where the host begins, but has {sorted(found)}"


def test_the_engine_is_given_its_parts():
    known = {module_of(file) for name in ("engine", "lanes", "devices") for file in imports_of(SOURCES[name])}
    assert known & ENGINE_KNOWS_NOTHING_OF == set(), "the engine takes rule and local training as arguments"


@pytest.mark.parametrize("folder", ["autorank_jax", "tests", "benchmarks"])
def test_files_are_short(folder):
    lengths = {path: len(path.read_text().splitlines()) for path in (REPOSITORY / folder).rglob("*.py")}
    long = {str(path.relative_to(REPOSITORY)): n for path, n in lengths.items() if n > MOST_LINES}
    assert long == {}, f"at most {MOST_LINES} lines a file: split by noun"


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("import autorank_jax.adapters.lora", {"lora"}),
        ("from autorank_jax import lora, mcda as m", {"lora", "mcda"}),
        ("from autorank_jax.adapters.lora import cut", {"lora"}),
        ("from autorank_jax.aggregators.base import mean_dense", {"aggregators.base"}),
        ("from autorank_jax.aggregators import rbla", {"aggregators.__init__"}),
        ("from autorank_jax import critic_weights", {"__init__"}),
        ("def f():\n    import autorank_jax.adapters.lora", {"lora"}),
        ("importlib.import_module('autorank_jax.cli.main')", {"cli"}),
        ("import jax\nfrom autorank import lora", set()),
    ],
)
def test_imports_are_found(source, files):
    assert imports_of(source) == files


def test_hidden_imports_and_effects_are_found():
    assert hidden_imports("import os\ndef f():\n    import os\n    from rich import print") == ["import os"]
    assert hidden_imports("from . import lora") == ["from . import lora"]
    sources = ["print(1)", "jax.jit(f)", "from jax import jit", "import logging", "Path().open()", "open('a')"]
    assert all(effects(source) for source in sources)
    assert effects("def update(x):\n    return x + 1") == set()
