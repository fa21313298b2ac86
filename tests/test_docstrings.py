"""Every example in a docstring runs; doctests print what they say, arrays to four digits."""

import doctest
import importlib
import inspect
import pkgutil
import re

import numpy as np
import pytest

import autorank_jax

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(autorank_jax.__path__, "autorank_jax.")
    if not module.name.endswith("__main__")  # importing it runs the command line
)
PACKAGES = ["autorank_jax", *(m.name for m in pkgutil.iter_modules(autorank_jax.__path__, "autorank_jax.") if m.ispkg)]
COMPILES_MUCH = ("models", "aggregators", "adapters", "experiment", "engine")
EXAMPLES = [pytest.param(n, marks=[pytest.mark.slow] * n.endswith(COMPILES_MUCH)) for n in PACKAGES]
EQUATIONS = ("autorank_jax.ranks.mcda", "autorank_jax.ranks.criteria")


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    with np.printoptions(precision=4, suppress=True):
        failures = doctest.testmod(importlib.import_module(name)).failed
    assert failures == 0, f"{failures} failing docstring examples in {name}: see the captured output"


@pytest.mark.parametrize("name", EQUATIONS)
def test_every_equation_has_an_example(name):
    module = importlib.import_module(name)
    functions = [f for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == name and n[0] != "_"]
    finder = doctest.DocTestFinder(recurse=False)
    without = [f.__name__ for f in functions if not any(test.examples for test in finder.find(f))]
    assert functions
    assert without == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_package_teaches_by_an_example_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = importlib.import_module(name).__doc__
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks or name == "autorank_jax", "a package's docstring ends in an example"
    for block in blocks:
        exec(compile(block, f"docstring of {name}", "exec"), {})


@pytest.mark.parametrize("name", PACKAGES)
def test_what_a_package_exports_is_there(name):
    package = importlib.import_module(name)
    missing = [word for word in getattr(package, "__all__", []) if not hasattr(package, word)]
    assert missing == []
