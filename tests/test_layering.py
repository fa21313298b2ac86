"""A package imports from lower floors only; a new one needs a line in `FLOORS`.

Also: few modules at the top, no import cycle, short chains, no import hidden in a function, few by name, no private
JAX, effects at the edge only, short files and documents, few result files.
"""

import ast
import functools
import graphlib
import subprocess
from pathlib import Path

import pytest

import autorank_jax

ROOT = Path(autorank_jax.__file__).parent
REPOSITORY = Path(__file__).parent.parent

FLOORS = {  # a package imports from lower floors, and from itself
    0: "interface",
    1: "types datasets",
    2: "checkpoint models federated",
    3: "adapters",
    4: "ranks engine",
    5: "aggregators evaluation",
    6: "experiment",
    7: "cli",
    8: "__init__ __main__",
    9: "manual",
}
FLOOR = {name: number for number, names in FLOORS.items() for name in names.split()}
TOP = {"__init__", "__main__", "checkpoint", "types"}
"""The modules that lie in no package."""
LONGEST_CHAIN = 8
HOST = {"checkpoint", "cli", "datasets", "experiment", "manual"}
"""Packages of the host: jit, logging and files. All others are pure functions of arrays, but for:"""
EFFECTS_ELSEWHERE = {
    "adapters.peft": "writes files for Hugging Face",
    "engine.ahead": "compiles",
    "engine.flops": "asks the compiler for FLOPs",
    "engine.probe": "compiles the one round that it runs",
    "models.bert": "reads pretrained weights",
    "models.causal_checkpoint": "likewise",
    "ranks.policies": "autorank_ranks compiles what it does as one program",
    "ranks.table_file": "reads a table",
    "aggregators.testing": "compiles the rounds by which it checks a rule",
}
ENGINE_KNOWS_NOTHING_OF = {"aggregators", "evaluation", "models", "ranks"}
OPTIONAL = {"dp_accounting", "jinja2", "matplotlib", "PIL", "qwix", "rich", "safetensors", "tensorboardX", "tokenizers"}
OPTIONAL |= {"requests", "tensorflow", "tensorflow_datasets", "tqdm"}  # of the extra tfds
LOADED_BY_NAME = {
    "interface.lazy": "what packages export",
    "checkpoint": "Orbax takes seconds, and only what saves or restores needs it",
    "cli.cache": "JAX, which only runs need",
    "cli.entry": "everything, once signals are heard",
    "cli.dispatch": "the modules of the command that is run; help, lists and versions are there at once",
    "cli.help": "the rules, which only the longest help explains",
    "cli.main": "all that needs an extra package, to say which one is missing",
    "manual.pages": "what the blocks of guides import",
    "manual.reference": "whatever it documents",
}
"""Modules that import others when they need them, by `importlib`. All other imports stand at the top."""
MOST_LINES = {".py": 400, "README.md": 150}
MOST_RESULTS = 31
AT_THE_TOP = {"autorank_jax", "benchmarks", "tests", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}

FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(ROOT.rglob("*.py"))}
SOURCES = {name: path.read_text() for name, path in FILES.items()}


def package_of(name):
    """Return the package of a file: `aggregators.base` belongs to `aggregators`."""
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


def graph_of(sources):
    """Return for each file the files that it imports; that of its own package's `__init__` is not meant."""
    return {name: imports_of(source) - {name} for name, source in sources.items()}


def longest_chain(graph):
    """Return the packages of a longest chain of imports between packages, from the top down."""
    packages = {}
    for name, targets in graph.items():
        packages.setdefault(package_of(name), set()).update(map(package_of, targets - {"__init__"}))

    @functools.cache
    def below(package):
        return max(((package, *below(target)) for target in packages[package] - {package}), key=len, default=(package,))

    return max(map(below, packages), key=len)


def too_low(sources, floors):
    """Return the imports that do not go down."""
    return [
        f"{name} imports {target}"
        for name, targets in graph_of(sources).items()
        for target in targets
        if package_of(target) != package_of(name) and floors[package_of(target)] >= floors[package_of(name)]
    ]


def test_every_package_has_a_floor():
    assert {package_of(name) for name in FILES} == set(FLOOR), f"FLOORS in {Path(__file__).name} has other packages"


def test_few_modules_lie_at_the_top():
    assert {name for name in FILES if "." not in name} == TOP, "a new module belongs into the package of its stage"


def test_imports_go_down():
    assert too_low(SOURCES, FLOOR) == [], "move what is shared down, or pass it as an argument"


def test_no_cycles():
    list(graphlib.TopologicalSorter(graph_of(SOURCES)).static_order())  # raises CycleError with the cycle


def test_chains_of_imports_are_short():
    chain = longest_chain(graph_of(SOURCES))
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_wrong_imports_are_found():
    upwards = SOURCES | {"engine.round": "from autorank_jax.aggregators import rbla"}
    assert too_low(upwards, FLOOR) == ["engine.round imports aggregators.__init__"]
    beside = SOURCES | {"engine.round": "from autorank_jax.ranks import mcda"}
    assert too_low(beside, FLOOR) == ["engine.round imports ranks.mcda"]
    in_turn = {"a.one": {"b.two"}, "b.two": {"c.three", "b.__init__"}, "b.__init__": set(), "c.three": set()}
    assert longest_chain(in_turn) == ("a", "b", "c")


@pytest.mark.parametrize("name", FILES)
def test_imports_stand_at_the_top(name):
    hidden = hidden_imports(SOURCES[name])
    assert hidden == [], f"{name} hides {hidden}: import at the top, absolutely; optional packages are in OPTIONAL"


def test_modules_are_loaded_by_name_in_few_places():
    found = {name for name, source in SOURCES.items() if "import_module(" in source or "__import__(" in source}
    assert found == set(LOADED_BY_NAME), "import at the top, or say in LOADED_BY_NAME why not"


@pytest.mark.parametrize("name", FILES)
def test_only_public_jax(name):
    assert "jax._src" not in SOURCES[name], f"{name} uses jax._src, which changes without notice"


@pytest.mark.parametrize("name", [n for n in FILES if package_of(n) not in HOST and n not in EFFECTS_ELSEWHERE])
def test_below_the_host_there_are_only_functions_of_arrays(name):
    found = effects(SOURCES[name])
    assert not found, f"{name} is no part of the host, but has {sorted(found)}"


@pytest.mark.parametrize("name", EFFECTS_ELSEWHERE)
def test_exceptions_are_needed(name):
    assert effects(SOURCES[name]), f"{name} needs no exception any more"


def test_the_engine_is_given_its_parts():
    known = {package_of(file) for name in SOURCES if package_of(name) == "engine" for file in imports_of(SOURCES[name])}
    assert known & ENGINE_KNOWS_NOTHING_OF == set(), "the engine takes rule and local training as arguments"


def tracked():
    """Return the files that git tracks; all files where this is no checkout."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        return [path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*") if path.is_file()]
    return [Path(line) for line in listed.stdout.splitlines() if (REPOSITORY / line).exists()]


@pytest.mark.parametrize("ending", MOST_LINES)
def test_files_are_short(ending):
    lengths = {str(p): (REPOSITORY / p).read_text().count("\n") for p in tracked() if p.name.endswith(ending)}
    long = {path: lines for path, lines in lengths.items() if lines > MOST_LINES[ending]}
    assert long == {}, f"at most {MOST_LINES[ending]} lines a file: split by noun"


def test_nothing_new_lies_at_the_top():
    found = {path.parts[0] for path in tracked() if not path.parts[0].startswith(".")}
    assert found <= AT_THE_TOP, "probably what a run left behind"


def test_result_files_are_few():
    results = [path for path in tracked() if "results" in path.parts]
    assert len(results) <= MOST_RESULTS, "one compact file a study"


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("import autorank_jax.adapters.lora", {"adapters.lora"}),
        ("from autorank_jax.ranks import budgets, mcda as m", {"ranks.budgets", "ranks.mcda"}),
        ("from autorank_jax.adapters.lora import cut", {"adapters.lora"}),
        ("from autorank_jax.aggregators.base import mean_dense", {"aggregators.base"}),
        ("from autorank_jax.aggregators import rbla", {"aggregators.__init__"}),
        ("from autorank_jax import critic_weights", {"__init__"}),
        ("def f():\n    import autorank_jax.adapters.lora", {"adapters.lora"}),
        ("importlib.import_module('autorank_jax.cli.main')", {"cli.main"}),
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
