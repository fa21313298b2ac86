"""The README's code runs, its pictures are there, and it names every module."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), names)
    if "history" in names:
        accuracy = names["history"].metrics["accuracy"]
        assert accuracy.shape == (5,)
        assert accuracy[-1] > 0.4  # ten classes: it learns
    if "ranks" in names and "label_counts" in names:
        assert names["ranks"].shape == (3,)
        assert 1 <= names["ranks"].min() <= names["ranks"].max() == 64


def test_linked_files_are_there():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_module_is_in_the_layer_table():
    table = README.split("## Architecture")[1].split("## ")[0]
    modules = {path.stem for path in (ROOT / "autorank_jax").glob("*.py")} | {"aggregators"}
    missing = {name for name in modules if not re.search(rf"`{name}`", table)} - {"__init__", "__main__"}
    assert not missing, f"add to the layer table of the README: {sorted(missing)}"
