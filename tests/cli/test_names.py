"""Names and values that lead nowhere: a line for each, whichever option has them, and nothing is lost to them."""

import json

import pytest

from autorank_jax.cli import main as cli
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.language_options import LanguageOptions
from autorank_jax.experiment.mistakes import ConfigurationError
from tests.cli.cases import fails
from tests.cli.test_scoring import TABLE

NOBODY, LONG = "~nosuchuser/x", "x" * 300


@pytest.mark.parametrize(
    "words",
    [
        "run --out", "run --config", "run --resume", "ranks --criteria", "compare a", "compare a b --output",
        "finetune --out", "finetune --model", "finetune --data", "finetune --resume", "data fetch x --source",
    ],
)  # fmt: skip
def test_homes_of_nobody(words, capsys):
    said = fails(capsys, *words.split(), NOBODY)
    assert said.count("expected a path, got '~nosuchuser/x', of whose user no home folder is known\n") == 1


def test_a_folder_of_datasets_of_nobody(capsys, monkeypatch):
    monkeypatch.setenv("AUTORANK_JAX_DATA", NOBODY)
    for words in (["data"], ["run", "--dataset", "mnist"], ["data", "fetch", "mine", "--source", "a.csv"]):
        assert "of whose user no home folder is known" in fails(capsys, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--config", LONG], "File name too long"),
        (["finetune", "--data", LONG], "expected a file of JSON lines, got none"),
        (["finetune", "--quiet", "--model", LONG], "got no such folder"),
        (["data", "fetch", "mine", "--source", LONG], "source: expected a folder, got nothing at xxx"),
        (["compare", "", "b"], "runs: expected a path, got '', probably a shell variable that is empty"),
    ],
)
def test_names_that_no_disk_holds(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTORANK_JAX_DATA", str(tmp_path / "data"))
    assert said in fails(capsys, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [((LONG, "a.csv"), "No such file"), (("mine", f"{LONG}.csv"), "File name too long")],
    ids=["to", "from"],
)
def test_tables_that_no_disk_holds(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORANK_JAX_DATA", str(tmp_path))
    assert cli.main(["data", "fetch", words[0], "--source", words[1]]) == 2
    progress, mistake = capsys.readouterr().err.splitlines()
    assert progress == f"{words[0]}: reading"
    assert said in mistake


def test_a_folder_of_datasets_that_no_disk_holds(capsys, monkeypatch):
    monkeypatch.setenv("AUTORANK_JAX_DATA", LONG)
    assert cli.main(["data"]) == 0
    capsys.readouterr()
    assert "expected a file at xxx" in fails(capsys, "run", "--dataset", "mnist")


def test_a_link_to_itself(tmp_path, capsys):
    (tmp_path / "table.csv").write_text(TABLE)
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    for criteria, output in (("table", "loop"), ("loop", "ranks")):
        words = ["--criteria", tmp_path / f"{criteria}.csv", "--output", tmp_path / f"{output}.csv"]
        assert "Too many levels of symbolic links" in fails(capsys, "ranks", "--max-rank", "10", *words)
    assert (tmp_path / "loop.csv").is_symlink()


def resumed(tmp_path, capsys, command, **content):
    """What a command says that goes on with a run of which this is noted."""
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / "run.json").write_text(json.dumps(content))
    return fails(capsys, command, "--resume", tmp_path)


@pytest.mark.parametrize("every", ["x", float("nan"), float("inf"), 1.5, True, None], ids=str)
def test_rounds_between_checkpoints_of_another_kind(every, tmp_path, capsys):
    assert "as this command leaves it" in resumed(tmp_path, capsys, "run", experiment={}, every=every, keep=3)
    assert "as this command leaves it" in resumed(tmp_path, capsys, "finetune", training={}, every=1, keep=every)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"policy": 5}, "as this command leaves it"),
        ({"learning_rate": "x"}, "as this command leaves it"),
        ({"clients_by": 5}, "as this command leaves it"),
        ({"rounds": True}, "as this command leaves it"),
        ({"data": 3}, "as this command leaves it"),
        ({"unknown": 3}, "as this command leaves it"),
        ([1], "as this command leaves it"),
        ("x", "as this command leaves it"),
        ({"policy": "x"}, "policy: expected one of"),
        ({"alpha": 10**400}, "alpha: expected a finite number above 0"),
        ({"data": NOBODY}, "of whose user no home folder is known"),
    ],
)
def test_options_of_finetune_of_another_kind(training, said, tmp_path, capsys):
    assert said in resumed(tmp_path, capsys, "finetune", training=training, every=1, keep=3)


@pytest.mark.parametrize("word", [5, None, [1]], ids=str)
def test_words_that_are_none(word):
    with pytest.raises(ConfigurationError, match="policy: expected a text"):
        LanguageOptions(policy=word).validate()
    with pytest.raises(ConfigurationError, match="split: expected one of"):
        Experiment(split=word).validate()
