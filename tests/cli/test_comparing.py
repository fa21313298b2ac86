"""Several runs in one table and one picture, read from what they left in their folders."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from autorank_jax.cli import main as cli
from autorank_jax.cli.comparing import read_found
from autorank_jax.cli.files import write_results
from autorank_jax.experiment.config import ConfigurationError
from tests.cli.cases import fails, make_results


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two runs, the second of which has other options and one rule more."""
    folder = tmp_path_factory.mktemp("written")
    other = make_results(("rbla", "zero_pad"))
    other = other._replace(config=other.config | {"learning_rate": 0.5}, stopped="interrupted after round 3")
    for name, results in (("one", make_results()), ("[other]", other)):
        write_results(folder / name, results)
    return folder


@pytest.fixture
def runs(written, tmp_path):
    """Copies of the two runs, to be changed."""
    return [Path(shutil.copytree(written / name, tmp_path / name)) for name in ("one", "[other]")]


def test_runs_beside_each_other(runs, tmp_path, monkeypatch, capsys):
    drawn = draw(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["compare", *map(str, runs)]) == 0
    text = capsys.readouterr().out
    lines = {line.strip().partition("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["learning-rate"] == ["learning-rate", "0.01", "0.5"]
    assert lines["aggregators"] == ["aggregators", "rbla", "rbla,zero_pad"]
    assert "rounds-per" not in text
    assert "split" not in text  # which is the same
    expected = ["3", "60.0", "±", "14.1", "%", "65.0", "±", "7.1", "%", "2.5", "–", "2.1", "k", "8", "M"]
    assert lines["one: autorank"][2:] == expected
    assert lines["[other]: autorank+zero_pad"][2:] == expected
    assert "[other] ended before its time: interrupted after round 3" in text
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == [
        "one: autorank", "one: full", "[other]: autorank+rbla", "[other]: full+rbla", "[other]: autorank+zero_pad",
        "[other]: full+zero_pad",
    ]  # fmt: skip
    shared = "dataset synthetic · split staircase · model mlp · clients 2"
    assert drawn[0].get_suptitle() == shared
    again = Path(shutil.copytree(runs[0], tmp_path / "again"))
    assert cli.main(["compare", str(runs[0]), str(again)]) == 0
    assert drawn[1].get_suptitle() == f"{shared} · aggregators rbla · learning rate 0.01"
    assert list(drawn[0].axes[0].lines[0].get_ydata()) == pytest.approx([0.15, 0.5, 0.6])


def draw(monkeypatch):
    """Keep what is drawn."""
    drawn, comparing = [], importlib.import_module("autorank_jax.cli.comparing")
    real = comparing.curves_figure
    monkeypatch.setattr(comparing, "curves_figure", lambda *a, **b: drawn.append(real(*a, **b)) or drawn[-1])
    return drawn


def test_names_that_are_no_formulas(runs, tmp_path, monkeypatch, capsys):
    drawn = draw(monkeypatch)
    odd = [tmp_path / "d$\\foo$ 木", tmp_path / "_e$^$\udcff"]
    for before, after in zip(runs, odd, strict=True):
        before.rename(after)
    assert cli.main(["compare", *map(str, odd), "--output", str(tmp_path / "a.png")]) == 0
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names[0] == "d$\\foo$ 木: autorank"
    assert names[2] == " _e$^$?: autorank+rbla"
    assert "Glyph" not in capsys.readouterr().err


def test_what_was_lost_is_in_the_table(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["compare", *map(str, runs), "--output", str(tmp_path / "a.png")]
    assert cli.main(words) == 0
    assert "excluded" not in capsys.readouterr().out
    history = json.loads((runs[0] / "history.json").read_text())
    for row in history[:3]:  # of the first of two seeds
        row |= {"excluded": 1}
    history[0] |= {"reported": 0}
    (runs[0] / "history.json").write_text(json.dumps(history))
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    lines = {line.strip().partition("  ")[0]: line.split() for line in text.splitlines()}
    assert "excluded" in text
    assert lines["one: autorank"][-3:] == ["25", "%", "0.5"]  # of two clients one, in half of the rounds
    assert lines["one: full"][-3:] == ["0", "%", "0"]


@pytest.mark.parametrize("width", [40, 80])
def test_long_names_on_narrow_terminals(width, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    long = [tmp_path / f"fashion_mnist_mini-dirichlet_lognormal-with_a_long_name{end}" for end in ("", "-2")]
    for before, after in zip(runs, long, strict=True):
        before.rename(after)
    assert cli.main(["compare", *map(str, long), "--output", str(tmp_path / "a.png")]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if " is fashion" not in line and str(tmp_path) not in line]
    assert max(map(len, lines)) <= max(width, 79)  # the line on what was interrupted is none of a table
    assert text.count("60.0 ± 14.1 %") == 3
    short = "…" + long[1].name[1 - width // 5 :]
    assert f"{short} is {long[1].name}\n" in text
    assert f" {short}: full+zero_pad " in text
    assert "FLOPs" in text


def test_names_with_one_end_are_numbered(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    same = [tmp_path / f"{begin}-a-name-with-one-long-end" for begin in "xy"]
    for before, after in zip(runs, same, strict=True):
        before.rename(after)
    assert cli.main(["compare", *map(str, same), "--output", str(tmp_path / "a.png")]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"1 is {same[0].name}\n2 is {same[1].name}\n")
    assert " 2: autorank+rbla " in text


def test_accuracy_and_r2_are_not_mixed(runs, tmp_path, monkeypatch, capsys):
    regression, second = (Path(shutil.copytree(runs[0], tmp_path / name)) for name in ("regression", "second"))
    for folder in (regression, second):
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"score": "r2"}))
    assert fails(capsys, "compare", runs[0], regression) == (
        "autorank-jax: runs: expected one measure in all of them, got accuracy (as in one) and R² (as in regression); "
        "compare those of a kind\n"
    )
    drawn = draw(monkeypatch)
    assert cli.main(["compare", str(regression), str(second), "--output", str(tmp_path / "a.png")]) == 0
    text = capsys.readouterr().out.replace(str(tmp_path), "")
    assert "accuracy" not in text
    assert "R²" in text
    assert drawn[0].axes[0].get_ylabel() == "test R²"


def test_mistakes_in_a_comparison(runs, tmp_path, capsys):
    one, link = runs[0], tmp_path / "link"
    link.symlink_to(one)
    for arguments, message in (
        ([one], "runs: expected two folders of runs or more, got 1"),
        ([one, one], "runs: expected every folder once"),
        ([one, link], "runs: expected every folder once"),
        ([one, tmp_path], f"runs: expected the folder of a run, got {tmp_path} without history.json"),
        ([one, "x" * 300], "without history.json"),
        ([*runs, "--output", "x" * 300 + ".png"], "File name too long"),
        ([*runs, "--output", "a.pdf"], "output: expected a file that ends in .png, got a.pdf"),
        ([*runs, "--output", "/none/a.png"], "output: expected to write /none/a.png, got: No such file"),
        ([*runs, "--output", one / "accuracy.png"], "accuracy.png, which belongs to a run"),
        ([*runs, "--output", link / "perplexity.png"], "perplexity.png, which belongs to a run"),
        ([*runs, "--output", one / "checkpoints" / "1" / "a.png"], "a.png, which belongs to a run"),
    ):
        assert message in fails(capsys, "compare", *arguments)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("history.json", "[]"),
        ("history.json", "[1]"),
        ("history.json", "3"),
        ("history.json", "{"),
        ("history.json", "[" * 100_000),
        ("config.json", "[]"),
        ("summary.json", "[]"),
    ],
)
def test_a_damaged_run(name, content, runs):
    (runs[0] / name).write_text(content)
    with pytest.raises(ConfigurationError):
        read_found(runs[0], "one")


@pytest.mark.parametrize(
    "change", [{"accuracy": "0.5"}, {"bytes": float("inf")}, {"round": 7}, {"seed": None}], ids=str
)
def test_damaged_numbers(change, runs):
    history = json.loads((runs[0] / "history.json").read_text())
    history[1] |= change
    (runs[0] / "history.json").write_text(json.dumps(history))
    with pytest.raises(ConfigurationError, match="as a run leaves it"):
        read_found(runs[0], "one")
