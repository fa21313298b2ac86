"""Files of a run: numbers worked by hand, schemas in full, nothing half-written."""

import csv
import io
import itertools
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from autorank_jax import datasets
from autorank_jax.cli import files as report
from autorank_jax.cli.figures import SHOWN_CLIENTS, accuracy_figure, ranks_figure
from autorank_jax.cli.files import write_results
from autorank_jax.cli.folders import FILES, ReportError, check_folder
from autorank_jax.cli.report import html_report
from autorank_jax.cli.tables import (
    comparison_tables,
    criteria_table,
    datasets_table,
    fitted,
    footnotes,
    scores_table,
)
from autorank_jax.cli.wrapping import print_line, wrapped
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.results import (
    Row,
    client_rows,
    run_names,
    si,
    spread,
    summarize,
)
from autorank_jax.ranks.criteria import CRITERIA
from tests.cli.cases import make_results, make_scores, printed


def test_summary_worked_by_hand():
    summary = summarize(make_results())
    assert list(summary) == ["policies", "critic_weights", "clients", "score", "device", "versions", "config"]
    assert summary["critic_weights"] == {"size": 0.5, "label_entropy": 0.5}
    assert summary["policies"]["autorank"] == {
        "final_accuracy": {"mean": 0.6, "sd": pytest.approx(0.1414214), "values": [0.5, 0.7]},
        "best_accuracy": {"mean": pytest.approx(0.65), "sd": pytest.approx(0.0707107), "values": [0.6, 0.7]},
        "area_under_curve": {
            "mean": pytest.approx(2.5 / 6),
            "sd": pytest.approx(0.02357023),
            "values": pytest.approx([1.3 / 3, 0.4]),
        },
        "rounds_to": {"0.5": 2.5, "0.95": None},
        "mean_ratio": {"clients": 0.55, "examples": 0.775},
        "examples_behind_highest_ratio": 0.75,
        "trained_parameters": 100.0,
        "bytes_per_round": {"up": 400.0, "down": 300.0},
        "train_flops": {"per_round": 1e6, "total": 8e6, "probe": 5e6, "slowest_client": 6e5},
        "lost": {"excluded": 0.0, "rounds": 0.0},
        "seconds": {"compile": 1.5, "train": 1.5},
    }
    full = summary["policies"]["full"]
    assert full["rounds_to"] == {"0.5": None, "0.95": None}  # one seed never gets there
    assert full["final_accuracy"]["values"] == [0.96, 0.4]
    assert full["area_under_curve"]["values"] == [pytest.approx(0.58), pytest.approx(0.35)]  # of evaluated rounds


def test_names_of_several_aggregators():
    assert list(run_names(make_results(("rbla", "zero_pad")))) == [
        "autorank+rbla", "full+rbla", "autorank+zero_pad", "full+zero_pad",
    ]  # fmt: skip
    assert set(summarize(make_results(("rbla", "zero_pad")))["policies"]) == set(
        run_names(make_results(("rbla", "zero_pad")))
    )


def test_client_rows():
    scores = make_scores(0)
    scores = scores._replace(matrix=scores.matrix.astype(np.float32))
    scores.matrix[0, 1] = 1 - 2.0**-24  # which six digits do not tell from 1
    rows = client_rows(scores)
    assert [[np.float32(row[name]) for name in scores.criteria] for row in rows] == scores.matrix.tolist()
    assert rows[1] == {
        "seed": 0, "client": 1, "examples": 30, "size": 30.0, "label_entropy": 0.6931472, "closeness": 1.0,
        "ratio.autorank": 1.0, "rank.autorank.layers/0": 10, "ratio.full": 1.0, "rank.full.layers/0": 10,
    }  # fmt: skip


def test_spread():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "sd": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert spread([4.0]) == {"mean": 4.0, "sd": 0.0, "values": [4.0]}
    assert spread([1.0, None]) == {"mean": None, "sd": None, "values": [1.0, None]}


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.2e11, "420 G"), (1234.0, "1.23 k"), (0.5, "0.5"), (0, "0"), (None, "–"), (2e12, "2 T"), (999.96e6, "1 G")],
)
def test_si(value, text):
    assert si(value) == text


def test_si_of_few_digits_has_no_exponent():
    assert si(2.04e8, 2) == "200 M"


def test_all_files_are_written(tmp_path):
    paths = write_results(tmp_path / "a" / "b", make_results())
    assert [path.name for path in paths] == list(FILES)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted(FILES)
    read = {path.name: path.read_bytes() for path in paths}
    results = make_results()
    assert json.loads(read["config.json"]) == json.loads(json.dumps(results.config))
    Experiment(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(read["config.json"]).items()})
    history = json.loads(read["history.json"])
    assert [{**row, "epsilon": None} for row in history] == [row._asdict() for run in results.runs for row in run.rows]
    assert [*history[0], "epsilon"] == list(Row._fields)
    assert [row["round"] for row in history[:3]] == [1, 2, 3]
    table = list(csv.DictReader(io.StringIO(read["history.csv"].decode())))
    assert [*table[0], "epsilon"] == list(Row._fields)
    assert [row["accuracy"] for row in table[6:9]] == ["0.2", "", "0.96"]
    clients = list(csv.DictReader(io.StringIO(read["criteria.csv"].decode())))
    assert [(row["seed"], row["client"]) for row in clients] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    summary = json.loads(read["summary.json"])
    assert summary == json.loads(json.dumps(summarize(results)))
    assert [list(row) for row in summary["clients"]] == [list(clients[0])] * 4
    for picture in ("accuracy.png", "ranks.png"):
        assert read[picture].startswith(b"\x89PNG")
        assert len(read[picture]) > 10_000


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    write_results(tmp_path, make_results())
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(ReportError, match="--overwrite"):
        write_results(tmp_path, make_results())
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    write_results(tmp_path, make_results(("rbla", "zero_pad")), overwrite=True)
    assert "autorank+rbla" in json.loads((tmp_path / "summary.json").read_text())["policies"]


def test_other_files_in_the_folder_do_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_results(tmp_path, make_results())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_checking_a_folder_makes_nothing(tmp_path):
    check_folder(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="is a file"):
        check_folder(tmp_path / "file" / "run")
    with pytest.raises(ReportError, match="is a file"):
        check_folder(tmp_path / "file")


def test_a_failing_write_leaves_no_summary_and_no_rest(tmp_path, monkeypatch):
    write_results(tmp_path, make_results())
    real = report.write_file

    def full_disk(path, content):
        if path.name == "accuracy.png":
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(report, "write_file", full_disk)
    with pytest.raises(ReportError, match="No space left on device"):
        write_results(tmp_path, make_results(), overwrite=True)
    assert not (tmp_path / "summary.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_nan_never_gets_into_a_file():
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.to_json([{"accuracy": float("nan")}])


def test_pictures_show_every_policy_and_client():
    figure = accuracy_figure(make_results(("rbla", "zero_pad")))
    assert isinstance(figure, Figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "autorank+rbla", "full+rbla", "autorank+zero_pad", "full+zero_pad",
    ]  # fmt: skip
    by_round, by_flops = figure.axes
    first, second = by_round.lines[0], by_flops.lines[0]
    np.testing.assert_allclose(first.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(first.get_ydata(), [0.15, 0.5, 0.6])
    np.testing.assert_allclose(second.get_xdata(), [6e6, 7e6, 8e6])  # the probe comes first
    np.testing.assert_allclose(by_round.lines[1].get_xdata(), [1, 3])  # evaluated rounds only
    bars, table = ranks_figure(make_scores(0)).axes
    assert [patch.get_height() for patch in bars.patches] == [10, 15, 0, 15]
    assert [text.get_text() for text in table.texts] == ["1", "10", "10", "10"]


def test_the_picture_of_ranks_says_whose_seed_it_shows(monkeypatch, tmp_path):
    titles = [ranks_figure(make_scores(3), seeds=seeds).axes[0].get_title(loc="left") for seeds in (1, 4)]
    assert titles == [
        "Label mix of every client, and the rank it is given",
        "Label mix of every client, and the rank it is given\nSeed 3, one of 4; other seeds have other clients",
    ]
    shown = []
    monkeypatch.setattr(report, "ranks_figure", lambda _, **options: shown.append(options) or Figure())
    write_results(tmp_path / "run", make_results())
    assert shown == [{"seeds": 2}]


def test_many_clients_fit_into_the_picture():
    scores = make_scores(0)
    many = scores._replace(
        size=np.arange(1, 501),
        label_counts=np.stack([np.arange(1, 501), np.zeros(500, int)], axis=1),
        ratios={"full": np.ones(500)},
        ranks={"full": {"layers/0": np.full(500, 10)}},
    )
    figure = ranks_figure(many)
    assert len(figure.axes[1].texts) == SHOWN_CLIENTS
    assert figure.get_size_inches()[0] <= 14


@pytest.mark.parametrize(("layers", "shown"), [(1, "{0}"), (3, "{0}/{0}/{0}"), (7, "{0}")])
def test_clients_fit_a_terminal_in_a_line_each(layers, shown):
    names, clients, rng = tuple(CRITERIA), 5, np.random.default_rng(0)
    ranks = {f"layers/{layer}": np.array([16, 64, 112, 130, 160]) for layer in range(layers)}
    scores = make_scores(0)._replace(
        criteria=names,
        size=np.full(clients, 18100),
        matrix=np.column_stack([np.full((clients, 2), 18100.0), rng.random((clients, 3)) / 100]),
        weights=np.full(len(names), 0.2),
        closeness=rng.random(clients),
        ratios={"autorank": np.full(clients, 0.5)},
        ranks={"autorank": ranks},
    )
    text = printed(scores_table(scores))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert "…" not in text
    for client, rank in enumerate(ranks["layers/0"].tolist()):
        assert lines[str(client)][1:3] == ["18100", "18100"]
        assert lines[str(client)][-1] == shown.format(rank)
    assert ("the widest of 7 layers" in text) == (layers == 7)


@pytest.mark.parametrize("width", [40, 80])
def test_every_number_is_whole_on_a_narrow_terminal(width):
    console = Console(file=io.StringIO(), width=width)
    scores = make_scores(0)._replace(criteria=("label_entropy", "gini_simpson"), closeness=np.array([0.111, 0.999]))
    for table in (scores_table(scores), *comparison_tables(make_results(("rbla", "zero_pad")))):
        console.file.seek(0)
        console.file.truncate()
        expected = {str(text) for column in table.columns[1:] for text in column.cells}
        expected |= {word for text in table.columns[0].cells for word in str(text).split()}
        parts = list(fitted(table, console))
        assert len(parts) == 1 + bool(table.caption) or width == 40
        for part in parts:
            console.print(part)
        text = console.file.getvalue()
        assert [cell for cell in expected if cell not in text] == []
        if table.caption:
            words = str(table.caption).split()
            assert text.split()[-len(words) :] == words
            assert len(text.splitlines()[-1]) > 20  # across all columns of the terminal
        lines = text.splitlines()
        assert not any(re.search(r"\d$", line) and re.match(r" *%", after) for line, after in itertools.pairwise(lines))
    assert sum(line.strip() == "weight" for line in lines) == 0
    assert max(map(len, lines)) <= width
    assert "…" not in console.file.getvalue()


def test_datasets_and_long_names_fit_a_terminal(monkeypatch):
    monkeypatch.setenv(datasets.ENVIRONMENT_VARIABLE, f"/{'folder' * 20}")
    text = printed(datasets_table(datasets.available_datasets()))
    assert all(f" {name}.npz " in text for name in ("mnist", "fashion_mnist", "cifar10", "cinic10"))
    numbers = np.ones(2)
    text = printed(*criteria_table(["x" * 100, "b"], {"size": 1.0}, numbers, numbers, numbers.astype(int)))
    assert text.count("x") == 100


def test_tables_fit_a_terminal():
    text = printed(scores_table(make_scores(0)), *comparison_tables(make_results(("rbla", "zero_pad"))))
    assert "…" not in text
    for word in ("weight", "0.750", "closeness", "60.0 ± 14.1 %", "rounds to 95 %", "training FLOPs", "8 M"):
        assert word in text


def test_a_narrow_table_has_no_empty_row_and_no_number_without_its_unit():
    console = Console(file=io.StringIO(), width=40)
    scores = make_scores(0)._replace(criteria=("label_entropy", "gini_simpson"))
    for part in fitted(scores_table(scores), console):
        console.print(part)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["weight"] not in rows
    assert sum(row[:1] == ["weight"] for row in rows) == 1
    console = Console(file=io.StringIO(), width=30)
    for table in comparison_tables(make_results()):
        for part in fitted(table, console):
            console.print(part)
    lines = console.file.getvalue().splitlines()
    assert any("60.0 ± 14.1 %" in line for line in lines)
    assert any("50 %" in line for line in lines)  # of "rounds to 50 %", in two lines
    assert wrapped("  of the slowest", 10) == ["  of the", "  slowest"]
    assert not any(re.match(r"\s*%", line) for line in lines)


@pytest.mark.parametrize("width", [40, 80])
def test_lines_end_between_words_on_a_terminal_and_are_whole_in_a_file(width):
    line = (
        "One level: another would save about 0.5 s of training and cost 2.1 s of compilation, which is 420 G or 50 %."
    )
    for moving in (True, False):
        console = Console(file=io.StringIO(), width=width, force_terminal=moving, color_system=None)
        print_line(console, line)
        print_line(console, f"autorank-jax run --resume {'folder/' * 20} --rounds N")
        *parts, command = console.file.getvalue().splitlines()
        assert command.endswith("--rounds N")  # in one line, to be copied
        assert " ".join(parts) == line
        assert max(map(len, parts)) <= width or not moving
        assert (len(parts) > 1) == moving
        assert not any(part[-1].isdigit() for part in parts)
    for columns in range(8, 100):
        assert not any(part[-1].isdigit() for part in wrapped(line, columns))


def test_pictures_and_report_name_rule_and_learning_rate():
    results = make_results()
    line = "synthetic · staircase · 2 clients · mlp · rbla · learning rate 0.01 · local epochs 5 · mean ± sd of 2 seeds"
    assert accuracy_figure(results).get_suptitle() == line
    assert line in html_report(results, {}).decode()
    several = make_results(("rbla", "zero_pad"))  # which the legend names
    assert accuracy_figure(several).get_suptitle() == line.replace("rbla · ", "")


def test_seconds_are_said_to_be_of_the_machine():
    assert list(footnotes(make_results()))[-1] == (
        "Seconds to train and to compile depend on the machine and its load. To compile took 1.5 s for rbla."
    )
