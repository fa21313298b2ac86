"""The studies' statistics, cells and answers, and both scripts on cells that nobody had to train."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import aggregators
import answers
import curves
import grid
import paired
import paper
import plan
import study
import tuning
from test_report import make_results

from autorank_jax.configuration import Experiment
from autorank_jax.rounds import DivergedError, Record

TINY = Experiment(
    dataset="synthetic",
    split="iid",
    clients=2,
    hidden=(4,),
    rank_policies=("full",),
    rounds=1,
    local_epochs=1,
    rank_levels=1,
)


def fake_cell(experiment, best=lambda _: 0.03):
    """Return a cell as if it had been run: accuracies that a seed and a name determine, falling beside a best rate."""
    cell = {what: {} for what in ("summary", "accuracy", "flops", "bytes", "clients", "scores", "diverged")}
    n, clients = experiment.rounds, experiment.clients
    shared = experiment.aggregators[0] != "local_only"
    for seed in experiment.all_seeds:
        rng = np.random.default_rng(seed)
        matrix, ratios = rng.random((clients, 5)), {p: np.full(clients, 0.5).tolist() for p in experiment.rank_policies}
        cell["scores"][str(seed)] = {"criteria": list("abcde"), "size": [10] * clients, "matrix": matrix.tolist()}
        cell["scores"][str(seed)] |= {"weights": None, "closeness": None, "ratios": ratios}
        for number, policy in enumerate(experiment.rank_policies):
            top = 0.8 - 0.02 * number + 0.01 * rng.random() - 0.1 * abs(np.log(experiment.learning_rate / best(policy)))
            curve = [round(top * (1 - 0.5**r), 4) if shared else None for r in range(1, n + 1)]
            own = {kind: 0.5 + 0.1 * rng.random() for kind in ("mean", "weighted_mean", "worst")}
            for what, value in (("accuracy", curve), ("flops", [1e9 * r for r in range(n)]), ("bytes", [1e6] * n)):
                cell[what].setdefault(policy, {})[str(seed)] = value
            cell["clients"].setdefault(policy, {})[str(seed)] = {"before": own, "after": own}
    return cell | {"config": json.loads(json.dumps(dataclasses.asdict(experiment)))}


@pytest.fixture
def pretended(monkeypatch):
    """Count the cells that would be trained."""
    names = []

    def run(experiment, _, name):
        names.append(name)
        return fake_cell(experiment)

    monkeypatch.setattr(grid, "_run", run)
    return names


@pytest.mark.parametrize("n", [2, 5, 12])
def test_paired_differences_are_scipys(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.7, 0.1, (2, n))
    found = paired.difference(dict(enumerate(a)), dict(enumerate(b)) | {99: 0.0})
    oracle = stats.ttest_rel(a, b)
    interval = oracle.confidence_interval(0.95)
    np.testing.assert_allclose(found[:4], [np.mean(a - b), interval.low, interval.high, oracle.pvalue], rtol=1e-9)
    assert found.seeds == n


def test_differences_of_few_or_equal_seeds():
    assert paired.difference({0: 1.0}, {1: 1.0}) is None
    assert paired.difference({0: 0.75}, {0: 0.5}) == (0.25, None, None, None, 1)
    assert paired.difference({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5}).p == 1
    assert paired.in_points(paired.difference({0: 0.75}, {0: 0.5})) == "+25.0 (one seed)"
    assert paired.in_points(None) == "–"


def test_holm_rejects_what_its_steps_reject():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ps = (rng.random(6) ** 3).tolist()
        corrected = paired.holm(ps)
        for level in (0.01, 0.05, 0.2):
            rejected, order = set(), np.argsort(ps)
            for step, place in enumerate(order):  # the procedure, not the formula
                if ps[place] > level / (len(ps) - step):
                    break
                rejected.add(int(place))
            assert {n for n, p in enumerate(corrected) if p <= level} == rejected
    assert paired.holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06], abs=1e-12)


def test_an_interrupted_grid_goes_on(pretended, tmp_path, monkeypatch):
    cells = {f"part/{seed}": dataclasses.replace(TINY, first_seed=seed) for seed in range(3)}
    run = grid._run

    def stops(experiment, progress, name):
        if name == "part/2":
            raise KeyboardInterrupt
        return run(experiment, progress, name)

    monkeypatch.setattr(grid, "_run", stops)
    with pytest.raises(KeyboardInterrupt):
        grid.run_cells(cells, tmp_path)
    monkeypatch.setattr(grid, "_run", run)
    assert len(grid.run_cells(cells, tmp_path)) == 3
    assert pretended == ["part/0", "part/1", "part/2"]
    (tmp_path / "part/1.json").write_text('{"half')
    cells["part/0"] = dataclasses.replace(cells["part/0"], rounds=2)
    assert len(grid.run_cells(cells, tmp_path, grid.Bounds.within(0))) == 1  # no time for the damaged, the changed
    assert len(grid.run_cells(cells, tmp_path, grid.Bounds(pattern="*/0"))) == 2
    grid.run_cells(cells, tmp_path)
    assert pretended[3:] == ["part/0", "part/1"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x81", b"{}", b"[]", b"null", b'{"config": 1}', b'{"half'])
def test_a_cell_that_does_not_read_is_not_there(content, tmp_path):
    (tmp_path / "one.json").write_bytes(content)
    assert grid.read_cell(tmp_path / "one.json", TINY) is None


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_a_file_that_is_not_written_whole_leaves_nothing(stop, tmp_path, monkeypatch):
    path = tmp_path / "one.json"
    grid.harness.write_json(path, {"whole": True})

    def dump(_, file, **__):
        file.write('{"half')
        raise stop

    monkeypatch.setattr(grid.harness.json, "dump", dump)
    with pytest.raises(stop):
        grid.harness.write_json(path, {})
    assert [one.name for one in tmp_path.iterdir()] == ["one.json"]
    assert json.loads(path.read_text()) == {"whole": True}


def test_a_real_cell_holds_what_the_tables_need(tmp_path):
    experiment = dataclasses.replace(TINY, rank_policies=("autorank", "full"), personal=True, probe_epochs=1, rounds=2)
    cell = grid.run_cells({"one": experiment}, tmp_path)["one"]
    again = json.loads((tmp_path / "one.json").read_text())
    assert again == json.loads(json.dumps(cell))
    run = curves.runs_of(cell)["full"][0]
    assert run.final == cell["accuracy"]["full"]["0"][-1]
    assert run.flops[1] == pytest.approx(2 * run.flops[0], rel=1e-5)
    assert 0 <= run.clients["before"]["worst"] <= run.clients["before"]["mean"] <= 1
    assert (run.ratio_by_clients, run.diverged) == (1.0, False)
    assert np.array(cell["scores"]["0"]["matrix"]).shape == (2, 5)
    old = {key: cell[key] for key in ("config", "summary", "accuracy")}
    assert aggregators.finals(old, "full") == [run.final]


def test_policies_after_one_that_diverges_are_run(monkeypatch, tmp_path):
    whole = make_results()
    first = whole.runs[0]._replace(rows=whole.runs[0].rows[:1])

    asked = []

    def run(experiment, **_):
        asked.append((experiment.rank_policies, experiment.first_seed, experiment.seeds))
        if experiment.rank_policies[0] == "autorank" and experiment.first_seed == 0:
            lost = Record("autorank", "rbla", 0, first.rows)
            raise DivergedError("the loss is lost", lost, whole._replace(runs=(first,)))
        wanted = [run for run in whole.runs if run.policy in experiment.rank_policies]
        return whole._replace(runs=tuple(run for run in wanted if run.seed in experiment.all_seeds))

    monkeypatch.setattr(grid, "run_experiment", run)
    experiment = dataclasses.replace(TINY, rank_policies=("autorank", "full"), rounds=3, seeds=2)
    cell = grid.run_cells({"wild": experiment}, tmp_path)["wild"]
    assert asked == [(("autorank", "full"), 0, 2), (("autorank",), 1, 1), (("full",), 0, 2)]
    assert cell["diverged"] == {"autorank": "the loss is lost"}
    assert aggregators.finals(cell, "autorank") == [0.7, curves.GUESSING]
    runs = curves.runs_of(cell)
    assert runs["autorank"][0].accuracy.tolist() == [0.2, 0.1, 0.1]
    assert runs["autorank"][1].final == 0.7
    assert [runs["full"][seed].final for seed in (0, 1)] == [0.96, 0.4]
    assert [run.diverged for run in (*runs["autorank"].values(), *runs["full"].values())] == [True, False, False, False]
    alone = {**cell["config"], "aggregators": ["local_only"]}
    assert len(curves.runs_of(cell | {"config": alone})["autorank"][0].accuracy) == 0


def test_accuracy_at_equal_flops():
    cell = fake_cell(TINY)
    run = curves.runs_of(cell)["full"][0]._replace(diverged=False)
    dear = run._replace(accuracy=np.array([0.4, 0.6]), flops=np.array([30.0, 40.0]))
    cheap = run._replace(accuracy=np.array([0.3, 0.5]), flops=np.array([10.0, 20.0]))
    np.testing.assert_allclose(cheap.at_flops(np.array([0, 5, 10, 15, 99])), [0.1, 0.2, 0.3, 0.4, 0.5])
    fallen = cheap._replace(diverged=True, flops=np.array([10.0, np.nan]))
    np.testing.assert_allclose(fallen.at_flops(np.array([5, 10, 15])), [0.2, 0.3, 0.1])
    ones, others = curves.measured({0: dear, 1: dear}, {0: cheap, 2: cheap}, "early_flops")
    assert (ones, others) == ({0: pytest.approx(0.4)}, {0: pytest.approx(0.5)})
    assert curves.measured({0: cheap, 2: cheap}, {0: dear, 1: dear}, "early_flops") == (others, ones)
    ones, others = curves.measured({0: dear}, {0: cheap}, "final_flops")
    assert (ones, others) == ({0: pytest.approx(0.3)}, {0: pytest.approx(0.5)})


def test_numbers_of_a_curve():
    cell = fake_cell(dataclasses.replace(TINY, rounds=10, eval_every=2))
    cell["accuracy"]["full"]["0"] = [None, 0.2, None, 0.5, None, 0.6, None, 0.4, None, 0.55]
    run = curves.runs_of(cell)["full"][0]
    assert run.rounds.tolist() == [2, 4, 6, 8, 10]
    assert (run.final, run.best, run.area, run.early) == pytest.approx((0.55, 0.6, 0.45, 0.2))
    assert [run.until(t, "rounds") for t in (0.5, 0.6, 0.7)] == [4, 6, None]
    assert run.until(0.5, "flops") == 3e9
    other = run._replace(accuracy=run.accuracy - 0.15)
    assert curves.until({0: run, 1: other}, 0.4, "rounds") == "5 ± 1.4"
    assert curves.until({0: run, 1: other}, 0.6, "rounds") == "1 of 2 seeds"


@pytest.mark.usefixtures("pretended")
def test_the_best_rate_on_validation_examples_is_chosen(tmp_path):
    experiment = plan.experiment_of(plan.Job("fashion_mnist_mini", "staircase", "main"))
    choices = tuning.choose_rates(experiment, tuning.Grid(), tmp_path, "x", grid.Bounds())
    assert {choice.rate for choice in choices.values()} == {0.03}
    assert not any(choice.edge for choice in choices.values())
    configs = [json.loads(path.read_text())["config"] for path in tmp_path.glob("*.json")]
    asked = (0.1, tuning.FIRST_SEED, experiment.rounds)
    assert {(c["validation"], c["first_seed"], c["rounds"]) for c in configs} == {asked}
    assert tuning.choose_rates(experiment, tuning.Grid((0.1, 0.3)), tmp_path, "y", grid.Bounds.within(0)) == {}


@pytest.mark.parametrize(("best", "chosen", "edge"), [(0.003, 0.003, False), (0.3, 0.3, True), (1e-5, 0.001, True)])
def test_a_policy_whose_best_rate_is_at_an_end_tries_further(best, chosen, edge, tmp_path, monkeypatch):
    ran = []

    def run(experiment, _, name):
        ran.append(name)
        return fake_cell(experiment, lambda policy: best if policy == "autorank" else 0.03)

    monkeypatch.setattr(grid, "_run", run)
    experiment = dataclasses.replace(TINY, rank_policies=("autorank", "full"), rounds=4)
    choices = tuning.choose_rates(experiment, tuning.Grid(), tmp_path, "x", grid.Bounds())
    assert (choices["autorank"].rate, choices["autorank"].edge) == (chosen, edge)
    assert (choices["full"].rate, choices["full"].edge) == (0.03, False)
    assert all("autorank" in name for name in ran[3:])
    tried = sorted(map(float, choices["autorank"].accuracy))
    assert tried == [rate for rate in tuning.LADDER if min(tried) <= rate <= max(tried)]
    assert len(ran) == len(tried)


def test_a_rate_has_to_hold_on_more_seeds(tmp_path, monkeypatch):
    """Full rank is best at 0.1 for the first tuning seed and guesses for the second; AutoRank is best at 0.03."""
    ran = {}

    def run(experiment, _, name):
        ran[name] = experiment
        unlucky = experiment.learning_rate > (0.2 if experiment.first_seed == tuning.FIRST_SEED else 0.05)
        cell = fake_cell(experiment, lambda policy: 0.03 if policy == "autorank" else 0.1)
        if unlucky:
            cell["accuracy"]["full"] = {seed: [0.1] * 4 for seed in cell["accuracy"]["full"]}
        return cell

    monkeypatch.setattr(grid, "_run", run)
    experiment = dataclasses.replace(TINY, rank_policies=("autorank", "full"), rounds=4)
    once = tuning.choose_rates(experiment, tuning.Grid(), tmp_path / "a", "x", grid.Bounds())
    assert {policy: choice.rate for policy, choice in once.items()} == {"autorank": 0.03, "full": 0.1}
    ran.clear()
    twice = tuning.choose_rates(experiment, tuning.Grid(more_seeds=2), tmp_path / "b", "x", grid.Bounds())
    assert {policy: choice.rate for policy, choice in twice.items()} == {"autorank": 0.03, "full": 0.03}
    more = [one for name, one in ran.items() if name.endswith("-more")]
    assert {(one.rank_policies, one.learning_rate) for one in more} == {
        (("autorank",), 0.03), (("full",), 0.1), (("full",), 0.03),
    }  # fmt: skip
    assert {(one.first_seed, one.seeds) for one in more} == {(tuning.FIRST_SEED + 1, 2)}


def test_a_rate_that_diverges_without_a_server_model_guesses(tmp_path, monkeypatch):
    def run(experiment, *_):
        cell = fake_cell(experiment)
        return cell | ({"clients": {}} if experiment.learning_rate == 0.1 else {})

    monkeypatch.setattr(grid, "_run", run)
    experiment = dataclasses.replace(TINY, aggregators=("local_only",), rounds=4)
    choice = tuning.choose_rates(experiment, tuning.Grid(), tmp_path, "x", grid.Bounds())["full"]
    assert choice.accuracy["0.1"] == curves.GUESSING
    assert choice.rate < 0.1


@pytest.mark.parametrize(
    ("mistakes", "best"), [((0.2, 0.1, 0.15), 0.03), ((0.102, 0.1, 0.3), 0.01), ((0.3, 0.0, 0.0), 0.03)]
)
def test_of_equal_rates_the_smallest_is_chosen(mistakes, best):
    assert tuning._best({rate: [1 - m] for rate, m in zip(tuning.Grid().rates, mistakes, strict=True)}) == best


def test_policies_of_one_rate_may_share_a_cell(pretended, tmp_path):
    experiment = dataclasses.replace(TINY, rank_policies=("autorank", "full", "uniform"), rounds=4)
    rates = dict(zip(experiment.rank_policies, (0.03, 0.01, 0.03), strict=True))
    choices = {policy: tuning.Choice(rate, {}, False) for policy, rate in rates.items()}
    how = {"seeds": range(2), "together": False, "bounds": grid.Bounds()}
    shared, cells = tuning.run_tuned(experiment, choices, tmp_path, "x", **how, apart=False)
    assert pretended == ["x-lr0.01-seed0", "x-lr0.03-seed0", "x-lr0.01-seed1", "x-lr0.03-seed1"]
    assert [cell["config"]["rank_policies"] for cell in cells[:2]] == [["full"], ["autorank", "uniform"]]
    assert {policy: sorted(one.runs) for policy, one in shared.items()} == {policy: [0, 1] for policy in rates}
    tuning.run_tuned(experiment, choices, tmp_path, "x", **how)
    assert len(pretended) == 4 + 6


def test_what_matters_most_comes_first():
    jobs = list(plan.jobs(["fashion_mnist", "mnist"], list(plan.SPLITS)))
    assert jobs[0] == ("fashion_mnist", "staircase", "main")
    assert len(set(jobs)) == len(jobs)
    assert [plan.GROUPS[job.group].tier for job in jobs] == sorted(plan.GROUPS[job.group].tier for job in jobs)
    for job in plan.jobs(["fashion_mnist_mini"], list(plan.SPLITS)):
        plan.experiment_of(job).validate()
    by_hand = plan.experiment_of(plan.Job("fashion_mnist_mini", "staircase", "by_hand"))
    assert by_hand.ratios == pytest.approx(np.arange(1, 11) / 10)


PICTURES = ["paper_mini-fashion_mnist_mini-staircase.png", "paper_mini-ranks.png", "paper_mini.json"]
PICTURES += ["paper_mini-fashion_mnist_mini-staircase-controls.png"]


def test_the_paper_is_written_once(pretended, tmp_path, capsys):
    paper.main(["--quick", "--out", str(tmp_path)])
    assert all((tmp_path / name).stat().st_size > 0 for name in PICTURES)
    said = capsys.readouterr().out
    groups = [group for name, group in plan.GROUPS.items() if name != "same_rate"]  # all rates are the same
    assert said.count("| 2 of 2 |") == sum(len(group.titles) for group in groups)
    assert "AutoRank + RBLA minus each" in said
    ran = len(pretended)
    paper.main(["--quick", "--out", str(tmp_path)])
    assert len(pretended) == ran == len(set(pretended))


def test_autorank_runs_at_one_ranks_rate_too(tmp_path, monkeypatch, capsys):
    ran = {}

    def run(experiment, _, name):
        ran[name] = experiment
        return fake_cell(experiment, lambda policy: 0.01 if policy == "autorank" else 0.03)

    monkeypatch.setattr(grid, "_run", run)
    paper.main(["--quick", "--groups", "main,same_rate,dealt", "--splits", "staircase", "--out", str(tmp_path)])
    assert "| AutoRank at one rank's learning rate + RBLA | 2 of 2 | 0.03 |" in capsys.readouterr().out
    rates = {one.rank_policies: one.learning_rate for name, one in ran.items() if "seed0" in name}
    assert rates[("uniform",)] == 0.03
    assert rates[("shuffled",)] == rates[("reversed",)] == 0.01
    same = [one.learning_rate for name, one in ran.items() if "/same_rate-" in name]
    assert same == [0.03]


@pytest.mark.usefixtures("pretended")
def test_what_is_not_there_is_not_pretended(tmp_path, capsys):
    paper.main(["--quick", "--out", str(tmp_path), "--cells", "*/main*"])
    said = capsys.readouterr().out
    assert "| ranks by hand + RBLA | 0 of 2 | 0.03 | – | – |" in said
    paper.main(["--quick", "--out", str(tmp_path / "none"), "--report"])
    assert "No column is complete yet." in capsys.readouterr().out


@pytest.fixture
def undrawn(monkeypatch):
    """Draw no pictures: they take most of the time."""
    for name in ("accuracy_curves", "heat_map", "ranks_against_complexity"):
        monkeypatch.setattr(paper.pictures, name, lambda *_, **__: None)


@pytest.mark.usefixtures("undrawn")
def test_a_part_of_the_paper_does_not_replace_the_whole(pretended, tmp_path):
    paper.main(["--quick", "--out", str(tmp_path)])
    files = [tmp_path / "paper_mini.md", tmp_path / "paper_mini.json"]
    whole, ran = [path.read_text() for path in files], len(pretended)
    for part in (["--groups", "local"], ["--splits", "central"], ["--cells", "*/main*"]):
        paper.main(["--quick", "--out", str(tmp_path), *part])
        assert [path.read_text() for path in files] == whole
    assert len(pretended) == ran
    more = ["--out", str(tmp_path), "--learning-rate", "0.1", "--seeds", "1", "--groups", "main"]
    paper.main([*more, "--dataset", "mnist", "--splits", "staircase"])
    paper.main([*more, "--dataset", "cifar10", "--splits", "dirichlet-0.1-10"])
    tables = json.loads((tmp_path / "paper.json").read_text())["tables"]
    assert set(tables) == {"mnist, staircase", "cifar10, dirichlet-0.1-10"}


def test_mistakes_in_words():
    with pytest.raises(SystemExit, match="splits: expected some of staircase"):
        paper.main(["--splits", "stairs"])
    with pytest.raises(SystemExit, match=r"dataset: expected some of fashion_mnist, mnist, .*, got fashion_mnist_mini"):
        paper.main(["--dataset", "fashion_mnist_mini", "--report"])
    with pytest.raises(SystemExit, match="dataset: expected none beside --quick, which has its own, got mnist"):
        paper.main(["--quick", "--dataset", "mnist", "--report"])


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

    monkeypatch.setattr(grid, "_run", run)
    with pytest.raises(SystemExit, match="learning-rate: expected a number above 0"):
        paper.main(["--quick", "--learning-rate", "0", "--out", str(tmp_path)])


def test_differences_are_corrected_for_the_number_of_rows():
    rng = np.random.default_rng(3)
    one, other, third = ({m: dict(enumerate(rng.normal(0.1, 0.1, 5))) for m in curves.MEASURES} for _ in range(3))
    found = [{m: paired.difference(one[m], side.get(m, {})) for m in curves.MEASURES} for side in (other, third, {})]
    rows = paired.cells(found, curves.MEASURES)
    ps = [
        stats.ttest_rel(*(list(side["final"].values()) for side in (one, theirs))).pvalue for theirs in (other, third)
    ]
    for row, corrected in zip(rows, paired.holm(ps), strict=False):
        assert row["final accuracy"].endswith(f", p {corrected:.2g}")
    assert rows[0]["first fifth of the rounds"] == paired.in_points(found[0]["early"])
    assert rows[2] == dict.fromkeys(curves.MEASURES.values(), "–")


@pytest.mark.parametrize("script", [paper, study, aggregators])
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
        "AutoRank minus one rank at equal bytes\n",
        "by setting",
        "Best pair",
        "fresh seeds, and with it the best",
    ):
        assert part in said
    configs = [json.loads(path.read_text())["config"] for path in tmp_path.glob("study_mini-confirm-*/*/*.json")]
    assert {c["first_seed"] for c in configs} == {study.FRESH}
    assert (tmp_path / "study_mini-rules.png").stat().st_size > 0


@pytest.mark.usefixtures("undrawn")
def test_a_part_of_the_study_does_not_replace_the_whole(pretended, tmp_path):
    study.main(["--quick", "--out", str(tmp_path)])
    files = [tmp_path / "study_mini.md", tmp_path / "study_mini.json"]
    whole, ran = [path.read_text() for path in files], len(pretended)
    assert "size alone, raflora, " in whole[0]
    study.main(["--quick", "--out", str(tmp_path), "--settings", "all criteria"])
    study.main(["--quick", "--out", str(tmp_path), "--rules", "raflora", "--settings", "floor 0.5"])
    assert [path.read_text() for path in files] == whole
    assert len(pretended) == ran
    study.main(["--quick", "--out", str(tmp_path), "--rules", "ffa_lora", "--settings", "all criteria"])
    assert "| ffa_lora, staircase |" in files[0].read_text()


@pytest.mark.usefixtures("undrawn")
def test_the_study_begins_with_what_matters_most(pretended, tmp_path):
    part = ["--rules", "rbla,flexlora", "--splits", "staircase,dirichlet-0.4-10", "--settings", "all criteria"]
    study.main([*part, "--rounds", "2", "--seeds", "1", "--out", str(tmp_path)])
    places = list(dict.fromkeys(name.split("-lr")[0].split("-tune")[0] for name in pretended))
    tuned = [place for place in places if not place.endswith("_criteria")]
    assert places[0] == "staircase/rbla"
    assert places.index("staircase/rbla-all_criteria") < places.index("dirichlet-0.4-10/rbla")
    assert len([place for place in places if place.endswith("_criteria")]) == 4
    assert {place.rsplit("/")[0] for place in tuned} == {"staircase", "dirichlet-0.4-10"}


@pytest.mark.usefixtures("undrawn")
def test_programs_are_shared_with_the_confirmation(tmp_path, monkeypatch):
    folders = {}

    def run(experiment, *_):
        folders.setdefault(experiment.first_seed, set()).add(study.harness.jax.config.jax_compilation_cache_dir)
        return fake_cell(experiment)

    monkeypatch.setattr(grid, "_run", run)
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
    base = curves.runs_of(fake_cell(TINY))["full"][0]

    def runs(gain):
        return {s: base._replace(accuracy=np.array([0.5 + gain + 0.001 * rng.normal()])) for s in range(5)}

    table = {
        answers.Point(policy, "rbla", answers.ALL, split): runs(gain)
        for split, gains in (("a", (0.2, 0.1)), ("b", (0.1, 0.2)), ("c", (0.1, 0.1)))
        for policy, gain in zip(("autorank", "uniform_bytes"), gains, strict=True)
    }
    asked = answers.questions(["rbla"], [answers.ALL], ["a", "b", "c"])[0]
    text = answers.answer(table, asked, ["a", "b", "c"], 5)
    assert "Final accuracy: higher on rbla, a; lower on rbla, b; no difference shown" in text
    assert "mean of 3 splits" in text
    assert answers.answer({}, asked, ["a", "b", "c"], 5) == ""
    best = answers.best_pairs(table, ["rbla"], ["a", "b", "c"], 5)
    assert {pair[0].policy for pair in best} == {"autorank", "uniform_bytes"}
    assert answers.best_pairs(table, ["rbla"], ["a", "b", "c"], 6) == []
    for split in "abc":
        dear = {seed: run._replace(bytes=2 * run.bytes) for seed, run in runs(0.4).items()}
        table[answers.Point("full", "rbla", answers.ALL, split)] = dear
    assert {pair[0].policy for pair in answers.best_pairs(table, ["rbla"], ["a", "b", "c"], 5)} == {
        "autorank", "uniform_bytes",
    }  # fmt: skip


def test_what_is_confirmed_is_the_best_pair_and_the_best_with_scored_ranks():
    one, other, third = (
        answers.Point(policy, rule, answers.ALL, "all")
        for policy, rule in (("uniform_bytes", "rbla"), ("autorank", "raflora"), ("autorank", "rbla"))
    )
    assert study.winners([(one, 0.9), (other, 0.8), (third, 0.7)]) == (one, other)
    assert study.winners([(other, 0.9), (one, 0.8), (third, 0.7)]) == (other,)


def test_nothing_to_confirm(tmp_path):
    with pytest.raises(SystemExit, match="run the study first"):
        study.main(["--quick", "--report", "--confirm", "--out", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize(("script", "argument"), [(paper, "--groups=main,local"), (study, "--rules=rbla")])
def test_scripts_run_quickly(script, argument, tmp_path):
    script.main(["--quick", "--seeds", "1", "--rounds", "2", argument, "--splits", "staircase", "--out", str(tmp_path)])
    assert next(iter(tmp_path.glob("*.md"))).stat().st_size > 0
