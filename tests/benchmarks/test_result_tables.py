"""The tables of `benchmarks/paper.py` and `study.py` are those of the cells, and `benchmarks/README.md` holds them."""

import json
import re
from pathlib import Path

import answers
import curves
import grid
import mixed_ranks
import numpy as np
import paper
import paper_tables
import plan
import pytest
import readme
import study
from scipy import stats

from tests.benchmarks.fake_cells import TINY, fake_cell

TARGET = plan.DATASETS["mnist"].targets[-1]
BASE = curves.runs_of(fake_cell(TINY))["full"][0]


def column(title, finals, own=(), after=(), costs=(2, 1e9, 1e6)):
    """Return a column with these final accuracies; the target is seen at the second of two evaluations, if at all.

    Args:
        title: of the column.
        finals: by seed.
        own: clients' own accuracy by seed, as mean and worst.
        after: likewise, after one more training.
        costs: rounds, FLOPs and bytes until the second evaluation, of which seed `s` takes `s + 1` times as much.
    """
    rounds, flops, sent = costs
    runs = {}
    for seed, final in enumerate(finals):
        clients = {"before": own[seed], "after": after[seed]} if seed < len(own) else {}
        runs[seed] = BASE._replace(
            rounds=np.array([1, rounds * (seed + 1)]),
            accuracy=np.array([0.3, final]),
            flops=np.array([1, flops * (seed + 1)]),
            bytes=np.array([1, sent * (seed + 1)]),
            clients={when: dict(zip(("mean", "worst"), pair, strict=True)) for when, pair in clients.items()},
        )
    return paper_tables.Column(title, None, runs)


def test_further_columns_are_compared_with_each_other():
    one, other = plan.CONTRASTS[0]
    columns = [column(other, (0.6, 0.7, 0.8)), column(one, (0.7, 0.8, 0.91)), column("by size", (0.8, 0.8, 0.8))]
    text = paper_tables.write("mnist", "staircase", columns, seeds=3)
    assert f"| {one} minus {other} | 3 | +10.3 [" in text
    assert "minus by size" not in text


def test_what_stands_behind_the_highest_rank():
    cell = fake_cell(TINY)
    cell["scores"]["0"] |= {"size": [10, 30, 20], "ratios": {"full": [0.9, 0.2, 0.9]}}
    assert curves.runs_of(cell)["full"][0].behind == pytest.approx(0.5)
    mixed = BASE._replace(behind=0.25)
    runs = {seed: mixed._replace(accuracy=np.array([0.1, 0.6 + 0.1 * seed])) for seed in range(3)}
    one = {seed: BASE._replace(accuracy=np.array([0.1, 0.75])) for seed in range(2)}
    columns = [paper_tables.Column(title, None, own) for title, own in ((plan.AUTHOR[2], one), (plan.AUTHOR[0], runs),
                                                                         ("AutoRank + raFLoRA", runs))]  # fmt: skip
    points = mixed_ranks.mixed_runs({("mnist", "staircase"): columns})
    assert [point[:5] for point in points] == [("mnist", "staircase", plan.AUTHOR[0], seed, 0.25) for seed in range(2)]
    np.testing.assert_allclose([point.difference for point in points], [-0.15, -0.05])


def test_losses_are_told_by_the_examples_behind_the_highest_rank():
    found = [(0, 0.012, -0.5), (1, 0.2, -0.02), (2, 0.39, 0.01), (0, 0.3, -0.06)]
    runs = [mixed_ranks.MixedRun("mnist", "staircase", "b" if n == 3 else "a", *run) for n, run in enumerate(found)]
    (text,) = mixed_ranks.write(runs)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:3] == [
        ["under 5 %", "1", "-50.0", "-50.0", "-50.0", "1"],
        ["20 to 40 %", "3", "-6.0", "-2.0", "+1.0", "1"],
    ]
    assert rows[4:] == [
        ["a", "mnist, staircase", "-50.0 (1.2 %)", "-2.0 (20 %)", "+1.0 (39 %)"],
        ["b", "mnist, staircase", "-6.0 (30 %)", "–", "–"],
    ]
    assert mixed_ranks.write([]) == []


def row_of(text, title):
    """Return the cells of the last row that begins with a title."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {title} |")]
    return rows[-1][2:]


def interval(values, scale=1, suffix=""):
    """Write mean and 95 % t interval of the mean, by SciPy."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values)) / np.array(scale)
    return f"{np.mean(values) / scale:+.1f} [{low:+.1f}, {high:+.1f}]{suffix}"


def test_differences_in_what_clients_have_and_in_what_it_takes():
    first = column(
        paper_tables.FIRST, [TARGET] * 3, [(0.6, 0.2), (0.7, 0.3), (0.9, 0.3)], [(0.9, 0.8)] * 3, (4, 2e9, 5e6)
    )
    other = column("other", [TARGET] * 3, [(0.5, 0.4)] * 3, [(0.9, 0.6), (0.8, 0.6), (0.8, 0.5)], (2, 1.5e9, 8e6))
    never = column("never", [TARGET, TARGET, TARGET - 0.01], [(0.5, 0.4)] * 2, [(0.9, 0.6)] * 2)
    text = paper_tables.write("mnist", "staircase", [first, other, never], seeds=3)
    wanted = [[10, 20, 40], [-20, -10, -10], [0, 10, 10], [20, 20, 30]]
    assert row_of(text, f"{paper_tables.FIRST} minus other") == [
        *(interval(values) for values in wanted),
        interval([2, 4, 6]),
        interval([0.5e9, 1e9, 1.5e9], 1e9, " G"),
        interval([-3e6, -6e6, -9e6], 1e6, " M"),
    ]
    cells = row_of(text, f"{paper_tables.FIRST} minus never")
    assert cells[0] == "+15.0 (n = 2) (2 of 3 seeds)"
    assert cells[4:] == ["–"] * 3


def test_who_shares_nothing_is_compared_by_the_clients():
    first = column(paper_tables.FIRST, [0.5] * 2, [(0.6, 0.2)] * 2, [(0.6, 0.2)] * 2)
    alone = column("alone", [0.5] * 2, [(0.4, 0.1)] * 2, [(0.4, 0.1)] * 2)
    alone = alone._replace(runs={seed: run._replace(accuracy=np.array([])) for seed, run in alone.runs.items()})
    text = paper_tables.write("mnist", "staircase", [first, alone], seeds=2)
    assert "| alone | 2 |" not in text
    assert row_of(text, f"{paper_tables.FIRST} minus alone")[:2] == ["+20.0 (n = 2)", "+10.0 (n = 2)"]


def test_who_has_all_examples_has_no_clients():
    run = column("central", [0.5], [(0.6, 0.2)], [(0.6, 0.2)]).runs[0]
    alone = paper._alone({0: run})[0]
    assert alone.clients == {}
    assert np.isnan(alone.bytes).all()
    assert alone.final == 0.5


def test_columns_that_nobody_ran_are_named():
    columns = [column(paper_tables.FIRST, [0.5]), column("one", []), column("two", [])]
    text = paper_tables.write("mnist", "staircase", columns, seeds=5)
    assert "Not run yet: one; two." in text
    assert "| one |" not in text


def written(path):
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


TWO_CORES = (
    "--dataset cifar10 --model cnn --splits staircase --groups main,by_hand,flexlora --rounds 10 --seeds 2 "
    f"--learning-rate 0.03 --out {paper.RESULTS / 'two_cores'}"
)


@pytest.mark.parametrize("options", ["", TWO_CORES], ids=["usual", "two cores"])
def test_the_tables_of_the_paper_are_what_its_cells_say(options):
    plan = paper.make_plan(paper.options_of(options.split()))
    found, _ = paper.run_plan(paper.everything(plan), grid.NOTHING)
    assert plan.folder.with_suffix(".md").read_text(encoding="utf-8") == paper.tables(plan, found)
    assert written(plan.folder.with_suffix(".json"))["tables"] == json.loads(json.dumps(paper.numbers(found)))


def test_the_tables_of_the_study_are_what_its_cells_say():
    whole, table, rates = study.read_all(study.make_plan(study.options_of([])))
    pairs = answers.best_pairs(table, whole.rules, whole.splits, len(whole.seeds))
    found = {
        "study": study.tables(whole, table, pairs),
        "study-confirm": study.confirmed(whole, pairs, rates, grid.NOTHING),
    }
    for name, text in found.items():
        assert (study.RESULTS / f"{name}.md").read_text(encoding="utf-8") == text
    there = written(study.RESULTS / "study.json")
    assert {key: there[key] for key in ("points", "learning_rates")} == json.loads(
        json.dumps(study.numbers(table, rates))
    )


def test_benchmarks_readme_holds_the_tables_of_the_results():
    readme.main(["--check"])


def test_the_readme_leaves_the_widest_tables_out(tmp_path):
    (tmp_path / "paper.md").write_text(
        f"## a, b\n\none\n\n### {paper_tables.TARGETS}\n\ntwo\n\n### Other\n\nthree\n\n## c, d\n\nfour\n"
    )
    assert readme.paper_block(tmp_path) == "#### a, b\n\none\n\n**Other.** three\n\n#### c, d\n\nfour"
    (tmp_path / "study.md").write_text("# t\n\n" + "".join(f"### {name}\n\nx\n\n" for name in readme.STUDY))
    with pytest.raises(SystemExit, match=r"study-confirm.md: expected tables, got no file"):
        readme.study_block(tmp_path)
    (tmp_path / "study-confirm.md").write_text("### another pair minus\n\ny\n")
    with pytest.raises(SystemExit, match=f"expected the table '{re.escape(readme.CONFIRMED)}'"):
        readme.study_block(tmp_path)


def test_a_block_is_replaced_between_its_markers():
    text = "before\n<!-- a -->\nold\n<!-- end of a -->\nafter"
    assert readme.filled(text, {"a": "new"}) == "before\n<!-- a -->\n\nnew\n\n<!-- end of a -->\nafter"
    for broken in ("no markers", "<!-- end of a --> <!-- a -->"):
        with pytest.raises(ValueError, match="expected the markers <!-- a --> and <!-- end of a -->"):
            readme.filled(broken, {"a": "new"})


NUMBER = r"[-+]?\d+(?:\.\d+)?"
PROSE = [
    ("README.md", "## What the study says", "## What is there"),
    ("benchmarks/README.md", "## paper.py", "## aggregators.py"),
]


@pytest.mark.parametrize(("name", "begin", "end"), PROSE, ids=["README", "benchmarks"])
def test_differences_in_the_prose_stand_in_a_table(name, begin, end):
    tables = [path.read_text(encoding="utf-8") for path in paper.RESULTS.rglob("*.md")]
    triples = {
        tuple(map(float, one)) for text in tables for one in re.findall(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]", text)
    }
    ps = {p for text in tables for p in re.findall(r", p ([\d.e-]+)", text)}
    text = (Path(__file__).parents[2] / name).read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    prose = " ".join(re.sub(r"<!-- (?!end).*?<!-- end.*?-->", "", text, flags=re.DOTALL).split())
    said = re.findall(rf"({NUMBER})(?: [A-Za-z]+){{0,2}} \[({NUMBER}), ({NUMBER})\]", prose)
    assert len(said) > 30
    for one in said:
        assert stands(one, triples), one
    for p in re.findall(r"corrected p (?:of )?(\d[\d.e-]*\d)", prose):
        assert p in ps, p


def stands(said, triples):
    """Tell whether a mean and its interval are a table's, perhaps the other way round, or rounded more."""
    digits = max(len(part.partition(".")[2]) for part in said)
    mean, low, high = map(float, said)
    for triple in triples:
        one, *rest = (round(value, digits) for value in triple)
        if any((sign * one, *sorted(sign * value for value in rest)) == (mean, low, high) for sign in (1, -1)):
            return True
    return False
