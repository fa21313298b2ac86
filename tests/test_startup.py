"""What starts at once loads neither JAX nor anything that takes as long."""

import json
import subprocess
import sys

import pytest

import autorank_jax
from autorank_jax import ranks
from autorank_jax.interface.lazy import lazy

SLOW = ["jax", "flax", "optax", "orbax", "matplotlib"]
AT_ONCE = ["--help", "--version", "run --help", "data list", "cache", "completion bash"]
PROGRAM = """
import contextlib, io, json, sys
import autorank_jax
from autorank_jax.cli.main import main

names, *commands = json.loads(sys.argv[1])
assert set(autorank_jax.__all__) <= set(dir(autorank_jax))
for words in commands:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            code = main(words.split())
        except SystemExit as stop:
            code = stop.code or 0
    loaded = [name for name in names if name in sys.modules]
    print(json.dumps([code, len(said.getvalue()) > 20, loaded]))
"""


def test_commands_load_only_what_they_need(tmp_path):
    path = tmp_path / "criteria.csv"
    path.write_text("client,size,classes\na,100,2\nb,200,5\nc,500,4\n")
    words = json.dumps([SLOW, *AT_ONCE, f"ranks --criteria {path}"])  # in this order: what is loaded stays so
    done = subprocess.run([sys.executable, "-c", PROGRAM, words], capture_output=True, text=True, check=True)
    *others, scoring = map(json.loads, done.stdout.splitlines())
    assert dict(zip(AT_ONCE, others, strict=True)) == {command: [0, True, []] for command in AT_ONCE}
    assert scoring == [0, True, ["jax"]]


def test_lazy_names_are_those_that_are_written():
    get, names = lazy("autorank_jax")
    assert set(autorank_jax.__all__) <= set(names())
    assert get("budgets") is ranks.budgets
    assert get("topsis") is ranks.mcda.topsis
    assert get("checkpoint").save_state is autorank_jax.save_state
    with pytest.raises(AttributeError, match="module 'autorank_jax' has no attribute 'toppsis'"):
        get("toppsis")
    with pytest.raises(ImportError, match="cannot import name 'toppsis' from 'autorank_jax'"):
        exec("from autorank_jax import toppsis")
