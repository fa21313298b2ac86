"""The manual: its sources are whole, and (slow) it builds, every block runs, every public name is in it."""

import importlib
import inspect
import re
from operator import attrgetter

import pytest

import autorank_jax
from autorank_jax.manual import __main__ as command
from autorank_jax.manual import build, check_links, code_blocks, guides, sources
from autorank_jax.manual.docstrings import field_comments, shorten, to_rst
from autorank_jax.manual.pages import linked, names_in, shown_in
from autorank_jax.manual.reference import ALONE, ROOMS, gallery, known, reference, value_of
from autorank_jax.manual.site import HERE, NEEDED, ManualError
from autorank_jax.types import ClientUpdate

SAID = {  # what blocks print, where it is the same on every machine
    "first_federation": ["adapted: layers/0, maximum rank 16", "MLP"],
    "how_autorank_works": ["[ 1  3 10]"],
    "resuming": ["True", "expected"],
    "your_own_rule": ["check_aggregator"],
    "ranks_for_another_stack": ["label_entropy", "hospital"],
    "many_devices": ["2 devices; largest difference"],
    "reading_the_results": ["summary.json"],
}


def _examples():
    """Return the names that guides or the examples of rooms show."""
    found = set(shown_in(known()))
    for room in (*ROOMS, *ALONE):
        text = inspect.getdoc(importlib.import_module(f"autorank_jax.{room}"))
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            found |= set(names_in(block, known()))
    return found


EXAMPLES = _examples()


def test_every_guide_is_listed_and_has_blocks_that_are_python():
    assert {guide.name for guide in guides()} == {path.name for path in (HERE / "guides").glob("*.md")}
    for guide in guides():
        blocks = code_blocks(guide)
        assert blocks, guide.name
        for block in blocks:
            lines = (line for line in block.splitlines() if not line.startswith("!"))
            compile("\n".join(lines), guide.name, "exec")
            assert max(map(len, block.splitlines())) <= 100 or "!" in block, guide.name


def test_the_reference_has_every_public_name():
    pages = reference()
    assert set(ROOMS) < set(pages)
    text = "\n".join(pages.values())
    for module in [autorank_jax, *(importlib.import_module(f"autorank_jax.{room}") for room in ROOMS)]:
        for name in module.__all__:
            if not inspect.ismodule(getattr(module, name)):
                assert re.search(rf"\.{name}[\n(]", text), f"{module.__name__}.{name}"
    for exported in ("policies.autorank", "budgets.with_budget", "partition.dirichlet", "faults.drop_out"):
        assert f".{exported}\n" in text


@pytest.mark.parametrize("name", sorted(known().values()))
def test_every_public_name_says_what_it_takes_and_is_shown_somewhere(name):
    value = value_of(name)
    text = inspect.getdoc(value) or ""
    if inspect.isclass(value):  # of its own: not inherited, and not what Python writes for a dataclass or a named tuple
        own = vars(value).get("__doc__") or ""
        assert own, f"{name} does not explain itself"
        assert not own.startswith(f"{value.__name__}("), f"{name} does not explain itself"
    if inspect.isfunction(value):
        for argument in inspect.signature(value).parameters:
            assert re.search(rf"^ +\*{{0,2}}{argument}:", text, flags=re.M), f"{name} does not explain {argument!r}"
        assert ">>>" in text or name in EXAMPLES, f"{name}: no example, in its docstring, its room or a guide"


def test_names_in_code_are_found_as_code_reaches_them():
    code = "import autorank_jax as ar\nfrom autorank_jax import topsis as t\n!command\nar.policies.autorank(t).nothing"
    assert sorted(names_in(code, known())) == ["autorank_jax.ranks.policies.autorank", "autorank_jax.ranks.topsis"]
    assert names_in("topsis = policies.autorank", known()) == []
    with pytest.raises(AttributeError, match="renamed"):
        names_in("import autorank_jax as ar\nar.ranks.renamed()", known())
    text = "See `ar.topsis(x)`, `topsis`, `nothing`, {cite:p}`topsis`, [`topsis`](a).\n```{code-cell}\n`topsis`\n```\n"
    found = linked(text, "import autorank_jax as ar\nar.topsis", known())
    link = "{py:obj}`%s <autorank_jax.ranks.topsis>`"
    assert found.startswith(
        f"See {link % 'ar.topsis(x)'}, {link % 'topsis'}, `nothing`, {{cite:p}}`topsis`, [`topsis`](a)."
    )
    assert "```{code-cell}\n`topsis`\n```\n" in found
    assert found.endswith(f"In the reference: {link % 'topsis'}.\n")


def test_names_in_the_prose_of_guides_exist():
    for guide in guides():
        for name in re.findall(r"`ar\.([\w.]*\w)", guide.read_text(encoding="utf-8")):
            attrgetter(name)(autorank_jax)


def test_the_gallery_shows_the_pictures_of_the_benchmarks(tmp_path):
    page, pictures = gallery(HERE.parents[1] / "benchmarks")
    assert "study-mixed_ranks.png" in pictures
    assert all(path.is_file() and f"pictures/{name}" in page for name, path in pictures.items())
    assert not gallery(tmp_path)[1]


def test_docstrings_in_markdown_become_restructured_text():
    lines = ["See `x: y`s and [LoRA](https://a.b/c).", "Rules:", "- one", "", "```python", "f(`1`)", "```", "| a | b |"]
    text = "\n".join(to_rst(lines))
    assert "See ``x: y``\\ s and `LoRA <https://a.b/c>`__." in text
    assert "Rules:\n\n- one" in text
    assert ".. code-block:: python\n\n    f(`1`)\n" in text
    assert "::\n\n    | a | b |" in text
    assert field_comments(ClientUpdate) == {}
    assert field_comments(autorank_jax.RankInfo)["weights"] == "(criteria,)"


def test_signatures_say_array_like():
    private = "~jax.jaxlib._jax.Array"
    like = f"(a: {private} | ~numpy.ndarray | ~numpy.bool | ~numpy.number | bool | int | float | complex, b: {private})"
    assert shorten(like, None) == ("(a: ArrayLike, b: ~jax.Array)", None)
    at = "~numpy._typing._array_like."
    numpys = (
        f"{at}_Buffer | {at}_SupportsArray[~numpy.dtype[~typing.Any]] | ~numpy._typing._x._NestedSequence[int | str]"
    )
    assert shorten(f"(a: {numpys} | None = None)", "int") == ("(a: ArrayLike | None = None)", "int")
    defaults = "(f: F = <function f at 0x7f>, g: G = <function <lambda>>)"
    assert shorten(defaults, None) == ("(f: F = f, g: G = ...)", None)


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"></p><a href="#here">1</a><a href="b.html#there">2</a><a href="c.html">3</a>'
    )
    (tmp_path / "b.html").write_text(
        '<a href="a.html#here"></a><a href="https://elsewhere.org/x">4</a><img src="d.png">'
    )
    assert sorted(check_links(tmp_path)) == ["a.html: b.html#there", "a.html: c.html", "b.html: d.png"]


def test_a_folder_with_other_things_is_refused_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("autorank_jax.manual.site.NEEDED", ())
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ManualError, match=r"expected a new folder or that of an earlier build, got .*other things"):
        build(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    monkeypatch.setattr("autorank_jax.manual.site.NEEDED", ("no_such_package",))
    with pytest.raises(ManualError, match=r"no_such_package, got none: pip install 'autorank-jax\[docs\]'"):
        build(tmp_path / "new")


def test_the_command_says_where_the_manual_is_or_what_is_in_the_way(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        command, "build", lambda folder, *, execute: asked.append((folder, execute)) or folder / "index.html"
    )
    assert command.main([str(tmp_path / "a"), "--no-execute"]) == 0
    assert command.main([str(tmp_path / "b")]) == 0
    assert asked == [(tmp_path / "a", False), (tmp_path / "b", True)]
    assert f"open {tmp_path / 'a' / 'index.html'}" in capsys.readouterr().out
    monkeypatch.undo()
    (tmp_path / "thesis.tex").write_text("years of work")
    assert command.main([str(tmp_path)]) == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.slow
def test_the_manual_builds_and_every_block_runs(tmp_path):
    for name in NEEDED:
        pytest.importorskip(name, reason="the manual needs the extra docs")
    from sphinx.util.inventory import InventoryFile  # noqa: PLC0415  an extra

    front = build(tmp_path / "site")
    site = front.parent
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) <= 20e6
    for page, texts in SAID.items():
        html = (site / "guides" / f"{page}.html").read_text(encoding="utf-8")
        for text in texts:
            assert text in html, (page, text)
    with (site / "objects.inv").open("rb") as file:
        known = {name for kind in InventoryFile.load(file, "", lambda *parts: parts[-1]).values() for name in kind}
    assert {"autorank_jax.ranks.autorank_ranks", "autorank_jax.ranks.policies.autorank"} <= known
    assert sources(tmp_path / "sources").is_dir()
