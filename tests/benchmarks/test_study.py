"""The studies on cells that nobody had to train: what they run, write and answer."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.study import (
    all_rules,
    cells,
    columns,
    paired,
    paper,
    privacy,
    questions,
    runs,
    sketch_error,
    svd_border,
    text_finetune,
)
from benchmarks.study import policies_by_rules as study
from benchmarks.study.cell_file import CellFile
from tests.benchmarks.fake_cells import TINY, fake_cell, pretend


@pytest.fixture
def pretended(monkeypatch):
    return pretend(monkeypatch)


def test_what_matters_most_comes_first():
    jobs = list(columns.jobs(["fashion_mnist", "mnist"], list(columns.SPLITS)))
    assert jobs[0] == ("fashion_mnist", "staircase", "main")
    assert len(set(jobs)) == len(jobs)
    assert [columns.GROUPS[job.group].tier for job in jobs] == sorted(columns.GROUPS[job.group].tier for job in jobs)
    for job in columns.jobs(["fashion_mnist_mini"], list(columns.SPLITS)):
        columns.experiment_of(job).validate()
    by_hand = columns.experiment_of(columns.Job("fashion_mnist_mini", "staircase", "by_hand"))
    assert by_hand.ratios == pytest.approx(np.arange(1, 11) / 10)


def test_the_paper_is_written_once(pretended, tmp_path, capsys):
    paper.main(["--quick", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["paper_mini.jsonl", "paper_mini.md"]
    said = capsys.readouterr().out
    groups = [
        group for name, group in columns.GROUPS.items() if not name.startswith("same_rate")
    ]  # all rates are the same
    assert said.count("| 2 of 2 |") == sum(len(group.titles) for group in groups)
    assert "AutoRank + RBLA minus each" in said
    ran = len(pretended)
    paper.main(["--quick", "--out", str(tmp_path)])
    assert len(pretended) == ran == len(set(pretended))


def test_autorank_runs_at_the_uniform_ranks_rate_too(tmp_path, monkeypatch, capsys):
    ran = {}

    def run(experiment, _, name):
        ran[name] = experiment
        return fake_cell(experiment, lambda policy: 0.01 if policy == "autorank" else 0.03)

    monkeypatch.setattr(cells, "_run", run)
    paper.main(["--quick", "--groups", "main,same_rate,permuted", "--splits", "staircase", "--out", str(tmp_path)])
    assert "| AutoRank at the uniform rank's learning rate + RBLA | 2 of 2 | 0.03 |" in capsys.readouterr().out
    rates = {one.rank_policies: one.learning_rate for name, one in ran.items() if "seed0" in name}
    assert rates[("uniform",)] == 0.03
    assert rates[("shuffled",)] == rates[("reversed",)] == 0.01
    same = [one.learning_rate for name, one in ran.items() if "/same_rate-" in name]
    assert same == [0.03]


@pytest.mark.usefixtures("pretended")
def test_what_is_not_there_is_not_pretended(tmp_path, capsys):
    paper.main(["--quick", "--out", str(tmp_path), "--cells", "*/main*"])
    said = capsys.readouterr().out
    assert "| AutoRank + RBLA | 2 of 2 |" in said
    assert "Not run yet: ranks by hand + RBLA; " in said
    assert "| ranks by hand + RBLA | 0" not in said
    paper.main(["--quick", "--out", str(tmp_path / "none"), "--report"])
    assert "No column is complete yet." in capsys.readouterr().out


def test_a_part_of_the_paper_does_not_replace_the_whole(pretended, tmp_path):
    paper.main(["--quick", "--out", str(tmp_path)])
    file = tmp_path / "paper_mini.md"
    whole, ran = file.read_text(), len(pretended)
    for part in (["--groups", "local"], ["--splits", "central"], ["--cells", "*/main*"]):
        paper.main(["--quick", "--out", str(tmp_path), *part])
        assert file.read_text() == whole
    assert len(pretended) == ran
    more = ["--out", str(tmp_path), "--learning-rate", "0.1", "--seeds", "1", "--groups", "main"]
    paper.main([*more, "--dataset", "mnist", "--splits", "staircase"])
    paper.main([*more, "--dataset", "cifar10", "--splits", "dirichlet-0.1-10"])
    text = (tmp_path / "paper.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")][:2] == [
        "## mnist, staircase", "## cifar10, dirichlet-0.1-10",
    ]  # fmt: skip


def test_mistakes_in_words():
    with pytest.raises(SystemExit, match=r"splits: expected some of .*, got stairs; did you mean staircase\?"):
        paper.main(["--splits", "stairs"])
    with pytest.raises(SystemExit, match=r"rules: expected some of .*, got raflore; did you mean raflora\?$"):
        study.main(["--rules", "raflore", "--report"])
    with pytest.raises(SystemExit, match=r"dataset: expected some of fashion_mnist, mnist, .*, got fashion_mnist_mini"):
        paper.main(["--dataset", "fashion_mnist_mini", "--report"])
    with pytest.raises(SystemExit, match="dataset: expected none beside --quick, which has its own, got mnist"):
        paper.main(["--quick", "--dataset", "mnist", "--report"])


@pytest.mark.parametrize(
    ("script", "setting"),
    [(paper, "--seeds 1"), (paper, "--rounds 3"), (paper, "--local-epochs 2"), (paper, "--model cnn"),
     (paper, "--learning-rate 0.1"), (study, "--rounds 3"), (study, "--seeds 1"), (study, "--splits staircase")],
)  # fmt: skip
def test_other_settings_do_not_replace_what_is_published(script, setting, monkeypatch, tmp_path, pretended):
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=f"out: expected a folder of its own beside {setting.split()[0]}, got "):
        script.main(["--report", "--out", str(tmp_path), *setting.split()])
    script.main(["--report", "--out", str(tmp_path / "own"), *setting.split()])
    assert not pretended


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("script", [paper, study])
def test_what_matches_no_cell_and_a_time_that_is_none(script, tmp_path):
    options = ["--quick", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"^cells: expected a pattern that matches names of cells, got zzz"):
        script.main([*options, "--cells", "zzz*"])
    script.main(options)
    with pytest.raises(SystemExit, match=r"names of cells such as \S+, got zzz\*: none does"):
        script.main([*options, "--cells", "zzz*"])
    for minutes in ("-1", "nan"):
        with pytest.raises(SystemExit, match=f"^limit-minutes: expected 0 or more, got {minutes}"):
            script.main([*options, "--limit-minutes", minutes])


@pytest.mark.parametrize("script", [paper, study])
def test_an_interrupt_is_one_line(script, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "_run", interrupted)
    with pytest.raises(SystemExit, match=r"^interrupted; what is finished is kept$"):
        script.main(["--quick", "--out", str(tmp_path)])


@pytest.mark.parametrize("script", [paper, study])
@pytest.mark.parametrize("number", ["0", "-1"])
def test_counts_start_at_one(script, number, tmp_path):
    for what in ("seeds", "rounds"):
        with pytest.raises(SystemExit, match=f"^{what}: expected 1 or more, got {number}$"):
            script.main(["--quick", "--report", "--out", str(tmp_path), f"--{what}", number])


def test_a_learning_rate_of_zero_is_not_a_rate_to_be_tuned(tmp_path, monkeypatch):
    def run(experiment, *_):
        experiment.validate()
        return fake_cell(experiment)

    monkeypatch.setattr(cells, "_run", run)
    with pytest.raises(SystemExit, match="learning-rate: expected a number above 0"):
        paper.main(["--quick", "--learning-rate", "0", "--out", str(tmp_path)])


def test_differences_are_corrected_for_the_number_of_rows():
    rng = np.random.default_rng(3)
    one, other, third = ({m: dict(enumerate(rng.normal(0.1, 0.1, 5))) for m in runs.MEASURES} for _ in range(3))
    found = [{m: paired.difference(one[m], side.get(m, {})) for m in runs.MEASURES} for side in (other, third, {})]
    rows = paired.cells(found, runs.MEASURES)
    ps = [
        stats.ttest_rel(*(list(side["final"].values()) for side in (one, theirs))).pvalue for theirs in (other, third)
    ]
    for row, corrected in zip(rows, paired.holm(ps), strict=False):
        assert row["final accuracy"].endswith(f", p {corrected:.2g}")
    assert rows[0]["first fifth of the rounds"] == paired.in_points(found[0]["early"])
    assert rows[2] == dict.fromkeys(runs.MEASURES.values(), "–")


@pytest.mark.parametrize("script", [paper, study, all_rules])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_dataset_that_is_not_at_hand_is_named(script, damaged, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORANK_JAX_DATA", str(tmp_path))
    if damaged:
        (tmp_path / "fashion_mnist.npz").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(SystemExit, match=r"^dataset.*: expected a (complete npz )?file"):
        script.main(["--out", str(tmp_path / "out")])


@pytest.mark.usefixtures("pretended")
def test_the_study_answers(tmp_path, capsys):
    study.main(["--quick", "--confirm", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    for part in (
        "AutoRank minus a uniform rank at equal bytes\n",
        "by setting",
        "Best pair",
        "fresh seeds, see below",
        "fashion_mnist_mini, fresh seeds: autorank + ",
    ):
        assert part in said
    fresh = [
        cell["options"]
        for name, cell in CellFile(tmp_path / "policies_by_rules_mini.jsonl").cells().items()
        if name.startswith("fresh-fashion_mnist_mini/")
    ]
    assert {options["first_seed"] for options in fresh} == {study.FRESH}
    study.main(["--quick", "--report", "--out", str(tmp_path)])
    assert said.strip().endswith(capsys.readouterr().out.strip())  # older rich ends an empty display by blank lines


def test_a_part_of_the_study_does_not_replace_the_whole(pretended, tmp_path, capsys):
    def said():
        return capsys.readouterr().out.strip()

    study.main(["--quick", "--out", str(tmp_path)])
    whole, ran = said(), len(pretended)
    assert "size alone, raflora, " in whole
    study.main(["--quick", "--out", str(tmp_path), "--settings", "all criteria"])
    said()
    study.main(["--quick", "--out", str(tmp_path), "--rules", "raflora", "--settings", "floor 0.5"])
    assert whole.endswith(said())
    assert len(pretended) == ran
    study.main(["--quick", "--out", str(tmp_path), "--rules", "ffa_lora", "--settings", "all criteria"])
    assert "| ffa_lora, staircase |" in said()


def test_the_study_begins_with_what_matters_most(pretended, tmp_path):
    part = ["--rules", "rbla,flexlora", "--splits", "staircase,dirichlet-0.4-10", "--settings", "all criteria"]
    study.main([*part, "--rounds", "2", "--seeds", "1", "--out", str(tmp_path)])
    places = list(dict.fromkeys(name.split("-lr")[0].split("-tune")[0] for name in pretended))
    tuned = [place for place in places if not place.endswith("_criteria")]
    assert places[0] == "staircase/rbla"
    assert places.index("staircase/rbla-all_criteria") < places.index("dirichlet-0.4-10/rbla")
    assert len([place for place in places if place.endswith("_criteria")]) == 4
    assert {place.rsplit("/")[0] for place in tuned} == {"staircase", "dirichlet-0.4-10"}


def test_programs_are_shared_with_the_confirmation(tmp_path, monkeypatch):
    folders = {}

    def run(experiment, *_):
        folders.setdefault(experiment.first_seed, set()).add(study.harness.jax.config.jax_compilation_cache_dir)
        return fake_cell(experiment)

    monkeypatch.setattr(cells, "_run", run)
    study.main(["--quick", "--confirm", "--out", str(tmp_path)])
    assert folders[study.FRESH] == folders[0]
    assert None not in folders[0]


def test_the_study_runs_all_criteria_everywhere_and_settings_where_they_count():
    given = study.argparse.Namespace(quick=False, rules="", splits="", settings="", rounds=None, seeds=None, out=Path())
    whole = study.make_plan(given)
    cells = study.order(whole)
    wide = len(study.RULES) * len(study.STUDIED)
    assert len(set(cells)) == len(cells) == wide + study.NARROW**2 * (len(study.SETTINGS) - 1)
    assert {setting for _, setting, _ in cells[:wide]} == {study.ALL}
    assert all(split in study.STUDIED[:2] and rule in study.RULES[:2] for rule, _, split in cells[wide:])
    for rule, setting, split in cells:
        experiment = study.experiment_of(whole._replace(dataset="fashion_mnist_mini"), rule, setting, split)
        experiment.validate()
        assert ("uniform_bytes" in experiment.rank_policies) == (setting not in study.CRITERIA_ALONE)


def test_answers_are_the_differences_of_the_cells():
    rng = np.random.default_rng(0)
    base = runs.runs_of(fake_cell(TINY))["full"][0]

    def gained(gain):
        return {s: base._replace(accuracy=np.array([0.5 + gain + 0.001 * rng.normal()])) for s in range(5)}

    table = {
        questions.Point(policy, "rbla", questions.ALL, split): gained(gain)
        for split, gains in (("a", (0.2, 0.1)), ("b", (0.1, 0.2)), ("c", (0.1, 0.1)))
        for policy, gain in zip(("autorank", "uniform_bytes"), gains, strict=True)
    }
    asked = questions.questions(["rbla"], [questions.ALL], ["a", "b", "c"])[0]
    text = questions.answer(table, asked, ["a", "b", "c"], 5)
    assert "Final accuracy: higher on rbla, a; lower on rbla, b; no difference shown" in text
    assert "mean of 3 splits" in text
    assert questions.answer({}, asked, ["a", "b", "c"], 5) == ""
    best = questions.best_pairs(table, ["rbla"], ["a", "b", "c"], 5)
    assert {pair[0].policy for pair in best} == {"autorank", "uniform_bytes"}
    assert questions.best_pairs(table, ["rbla"], ["a", "b", "c"], 6) == []
    for split in "abc":
        dear = {seed: run._replace(bytes=2 * run.bytes) for seed, run in gained(0.4).items()}
        table[questions.Point("full", "rbla", questions.ALL, split)] = dear
    assert {pair[0].policy for pair in questions.best_pairs(table, ["rbla"], ["a", "b", "c"], 5)} == {
        "autorank", "uniform_bytes",
    }  # fmt: skip


def test_what_is_confirmed_is_the_best_pair_and_the_best_with_scored_ranks():
    one, other, third = (
        questions.Point(policy, rule, questions.ALL, "all")
        for policy, rule in (("uniform_bytes", "rbla"), ("autorank", "raflora"), ("autorank", "rbla"))
    )
    assert study.winners([(one, 0.9), (other, 0.8), (third, 0.7)]) == (one, other)
    assert study.winners([(other, 0.9), (one, 0.8), (third, 0.7)]) == (other,)


def test_every_rule_is_held_against_a_uniform_rank(pretended, tmp_path, capsys):
    all_rules.main(["--quick", "--seeds", "4", "--rules", "rbla,flora", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert pretended == [f"{split}-{rule}" for rule in ("rbla", "flora") for split in all_rules.SPLITS]
    grid = all_rules.make_cells(["rbla", "flora"], quick=True, rounds=20, seeds=4)
    found = all_rules.run_rules(grid, CellFile(tmp_path / "all_rules_mini.jsonl"), cells.NOTHING)
    pairs = [
        [
            [all_rules.finals(found, split, rule, policy)[seed] for seed in range(4)]
            for policy in ("autorank", "uniform_bytes")
        ]
        for rule in ("rbla", "flora")
        for split in all_rules.SPLITS
    ]
    ps = paired.holm([stats.ttest_rel(*pair).pvalue for pair in pairs])
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| `") and ", p " in line]
    written = [cell for row in rows for cell in row[1:]]
    for (one, other), p, cell in zip(pairs, ps, written, strict=True):
        assert cell.startswith(f"{100 * np.mean(np.subtract(one, other)):+.1f} [")
        assert f", p {p:.2g} (" in cell


def test_accuracy_over_budgets_is_told_and_drawn(tmp_path, pretended, monkeypatch, capsys):
    titles, draw = [], privacy.draw
    monkeypatch.setattr(privacy, "draw", lambda *a: titles.append(a[1]) or draw(*a))
    grid = privacy.make_cells(quick=True, seeds=2)
    grid["epsilon-inf"].validate()
    privacy.main(["--quick", "--seeds", "2", "--out", str(tmp_path)])
    assert pretended == ["epsilon-1", "epsilon-2", "epsilon-4", "epsilon-8", "epsilon-inf"]
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| ε", "| 1", "| 2", "| 4", "| 8", "| ∞"]
    found = privacy.run_budgets(grid, CellFile(tmp_path / "privacy_mini.jsonl"), cells.NOTHING)
    for row, budget in zip(rows[1:], found, strict=True):
        own = [list(privacy.finals(found, budget, policy).values()) for policy in privacy.POLICIES]
        assert [float(cell.split()[0]) for cell in row[1:4]] == pytest.approx([100 * np.mean(a) for a in own], abs=0.06)
        assert row[4].startswith(f"{100 * (np.mean(own[0]) - np.mean(own[1])):+.1f}")
    assert titles == ["50 clients, 10 % a round, 3 rounds"]
    assert (tmp_path / "privacy_mini.png").stat().st_size > 0


def test_nothing_to_confirm(tmp_path):
    with pytest.raises(SystemExit, match="run the study first"):
        study.main(["--quick", "--report", "--confirm", "--out", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize(("script", "argument"), [(paper, "--groups=local"), (study, "--rules=rbla")])
def test_scripts_run_quickly(script, argument, tmp_path, capsys):
    script.main(["--quick", "--seeds", "1", "--rounds", "2", argument, "--splits", "staircase", "--out", str(tmp_path)])
    assert "\n| " in capsys.readouterr().out


@pytest.mark.slow
def test_both_ways_to_the_svd_are_timed(tmp_path, capsys):
    svd_border.main(["--quick", "--json", str(tmp_path / "results.json")])
    content = json.loads((tmp_path / "results.json").read_text())
    content = content["border"]
    assert [row["layer"] for row in content["rows"]] == ["64 × 48", "64 × 48", "96 × 64", "96 × 64"]
    assert all(row["gap"] < 1e-4 < row["dense_seconds"] + row["factored_seconds"] for row in content["rows"])
    assert {"jax", "python"} <= set(content["versions"])
    assert "| 96 × 64 |" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["svd_border", "text_finetune", "sketch_error"])
def test_published_rows_are_printed(script, capsys):
    scripts, arguments = (
        {"svd_border": svd_border, "text_finetune": text_finetune, "sketch_error": sketch_error},
        ["--report"],
    )
    module = scripts[script]
    module.main(module.parse(arguments) if hasattr(module, "parse") else arguments)
    said = capsys.readouterr().out
    file = {"text_finetune": "texts"}.get(script, "svds")
    content = json.loads((svd_border.RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    rows = content[{"svd_border": "border", "sketch_error": "rows"}.get(script, script)]
    rows = rows if script == "sketch_error" else rows["rows"]
    assert said.count("\n| ") >= len(rows)
