"""The tables of the studies are those of their result files, and what the prose says stands in them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.study import (
    all_rules,
    cells,
    claims,
    columns,
    dialogues,
    equal_flops,
    fresh_flops,
    mixed_ranks,
    paper,
    paper_tables,
    privacy,
    probes,
    questions,
    runs,
    text_tables,
)
from benchmarks.study import policies_by_rules as study
from benchmarks.study.cell_file import CellFile
from benchmarks.study.options import RESULTS
from tests.benchmarks.fake_cells import TINY, fake_cell

TARGET = columns.DATASETS["mnist"].targets[-1]
BASE = runs.runs_of(fake_cell(TINY))["full"][0]


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
    found = {}
    for seed, final in enumerate(finals):
        clients = {"before": own[seed], "after": after[seed]} if seed < len(own) else {}
        found[seed] = BASE._replace(
            rounds=np.array([1, rounds * (seed + 1)]),
            accuracy=np.array([0.3, final]),
            flops=np.array([1, flops * (seed + 1)]),
            bytes=np.array([1, sent * (seed + 1)]),
            clients={when: dict(zip(("mean", "worst"), pair, strict=True)) for when, pair in clients.items()},
        )
    return paper_tables.Column(title, None, found)


def test_further_columns_are_compared_with_each_other():
    one, other = columns.CONTRASTS[0]
    three = [column(other, (0.6, 0.7, 0.8)), column(one, (0.7, 0.8, 0.91)), column("by size", (0.8, 0.8, 0.8))]
    text = paper_tables.write("mnist", "staircase", three, seeds=3)
    assert f"| {one} minus {other} | 3 | +10.3 [" in text
    assert "minus by size" not in text


def test_what_the_clients_of_the_highest_rank_hold():
    cell = fake_cell(TINY)
    cell["size"]["0"] = [10, 30, 20]
    cell["runs"]["full"]["0"]["ratios"] = [0.9, 0.2, 0.9]
    assert runs.runs_of(cell)["full"][0].behind == pytest.approx(0.5)
    mixed = BASE._replace(behind=0.25)
    own = {seed: mixed._replace(accuracy=np.array([0.1, 0.6 + 0.1 * seed])) for seed in range(3)}
    uniform = {seed: BASE._replace(accuracy=np.array([0.1, 0.75])) for seed in range(2)}
    three = [
        paper_tables.Column(title, None, found)
        for title, found in ((columns.AUTHOR[2], uniform), (columns.AUTHOR[0], own), ("AutoRank + raFLoRA", own))
    ]
    points = mixed_ranks.mixed_runs({("mnist", "staircase"): three})
    wanted = [("mnist", "staircase", columns.AUTHOR[0], seed, 0.25) for seed in range(2)]
    assert [point[:5] for point in points] == wanted
    np.testing.assert_allclose([point.difference for point in points], [-0.15, -0.05])


def test_losses_are_told_by_what_the_clients_of_the_highest_rank_hold():
    found = [(0, 0.012, -0.5), (1, 0.2, -0.02), (2, 0.39, 0.01), (0, 0.3, -0.06)]
    four = [mixed_ranks.MixedRun("mnist", "staircase", "b" if n == 3 else "a", *run) for n, run in enumerate(found)]
    (text,) = mixed_ranks.write(four)
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
    three = [column(paper_tables.FIRST, [0.5]), column("one", []), column("two", [])]
    text = paper_tables.write("mnist", "staircase", three, seeds=5)
    assert "Not run yet: one; two." in text
    assert "| one |" not in text


TWO_CORES = (
    "--dataset cifar10 --model cnn --splits staircase --groups main,by_hand,flexlora --rounds 10 --seeds 2 "
    f"--learning-rate 0.03 --out {RESULTS / 'two_cores'}"
)
HUNDRED_ROUNDS = (
    "--dataset cifar10 --model cnn --splits staircase --groups main --rounds 100 --seeds 1 --learning-rate 0.03 "
    f"--out {RESULTS / 'hundred_rounds'}"
)


def paper_tables_of(options):
    """Return the file of the paper's cells under some options, and their tables."""
    plan = paper.make_plan(paper.options_of(options.split()))
    return plan.file.path, paper.tables(plan, paper.run_plan(paper.everything(plan), cells.NOTHING))


def test_the_tables_of_the_paper_are_what_its_cells_say():
    path, text = paper_tables_of("")
    assert path.with_suffix(".md").read_text(encoding="utf-8") == text


def study_tables():
    """Return the tables of the study of policies and rules."""
    whole, table, rates = study.read_all(study.make_plan(study.options_of([])))
    pairs = questions.best_pairs(table, whole.rules, whole.splits, len(whole.seeds))
    return study.tables(whole, table, pairs, rates)


NUMBER = r"[-+]?\d+(?:\.\d+)?"
ROOT = Path(__file__).parents[2]


def documents():
    """Return what the study says, as one text."""
    return "\n".join(
        (ROOT / "benchmarks/study" / name).read_text(encoding="utf-8") for name in ("README.md", "rules.md")
    )


@pytest.fixture(scope="module")
def tables():
    """Return all generated tables as one text."""
    parts = [
        paper_tables_of("")[1],
        paper_tables_of(TWO_CORES)[1],
        paper_tables_of(HUNDRED_ROUNDS)[1],
        study_tables(),
        all_rules.tables(all_rules.read(RESULTS)),
    ]
    private = privacy.run_budgets(
        privacy.make_cells(quick=False, seeds=privacy.SEEDS), CellFile(RESULTS / "privacy.jsonl"), cells.NOTHING
    )
    costs = json.loads((RESULTS / "costs.json").read_text(encoding="utf-8"))
    parts += [equal_flops.table(costs["equal_flops"]["cells"]), probes.table(costs["probes"]["cells"])]
    parts += [fresh_flops.table(fresh_flops.published())]
    return "\n".join(
        [
            *parts,
            text_tables.tables(text_tables.published()),
            privacy.table(private),
            dialogues.table(dialogues.published()),
            claims.table(claims.claims(claims.read())),
        ]
    )


def test_numbers_in_the_prose_stand_in_a_table(tables):
    triples = {tuple(map(float, one)) for one in re.findall(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]", tables)}
    ps = set(re.findall(r", p ([\d.e-]+)", tables))
    means = set(re.findall(r"(\d+\.\d) ± (\d+\.\d)", tables))
    prose = " ".join(documents().split())
    said = re.findall(rf"({NUMBER})(?: [A-Za-z]+){{0,2}} \[({NUMBER}), ({NUMBER})\]", prose)
    assert len(said) >= 80
    assert len(said) == len(re.findall(rf"\[{NUMBER}, {NUMBER}\]", prose))
    for one in said:
        assert stands(one, triples), one
    for p in re.findall(r"corrected p (?:of )?(\d[\d.e-]*\d)", prose):
        assert p in ps, p
    for one in re.findall(r"(\d+\.\d) ± (\d+\.\d)", prose):
        assert one in means, one


def test_counts_of_mixed_ranks_in_the_prose_are_those_of_the_runs():
    plan = paper.make_plan(paper.options_of([]))
    bands = mixed_ranks.bands(mixed_ranks.mixed_runs(paper.complete(paper.run_plan(plan, cells.NOTHING))))
    (under_5, all_5), (under_20, all_20), (under_40, all_40), (above, all_above) = (
        (band.fallen, len(band.runs)) for band in bands
    )
    assert (under_5, under_20) == (all_5, all_20)
    text = " ".join((ROOT / "benchmarks/study/README.md").read_text(encoding="utf-8").split())
    words = {1: "one", 5: "five"}
    for said in (
        f"all {all_5} runs (shuffled or reversed)",
        f"with 5 to 20 % all {all_20} (",
        f"with 20 to 40 % {words[under_40]} of {all_40} lose more than 5, above {words[above]} of {all_above}.",
    ):
        assert said in text


def test_files_that_the_readme_shows_are_there_and_no_others():
    shown = set(re.findall(r"\]\((results/[^)]+\.(?:png|md))\)", documents()))
    there = {
        path.relative_to(RESULTS.parent).as_posix() for path in RESULTS.rglob("*") if path.suffix in (".png", ".md")
    }
    assert shown == {path for path in there if "_mini" not in path}


def stands(said, triples):
    """Tell whether a mean and its interval are a table's, perhaps the other way round, or rounded more."""
    digits = max(len(part.partition(".")[2]) for part in said)
    mean, low, high = map(float, said)
    for triple in triples:
        one, *rest = (round(value, digits) for value in triple)
        if any((sign * one, *sorted(sign * value for value in rest)) == (mean, low, high) for sign in (1, -1)):
            return True
    return False
