"""The studies' statistics, cells, curves and learning rates."""

import dataclasses
import json

import aggregators
import curves
import grid
import numpy as np
import paired
import plan
import pytest
import tuning
from scipy import stats

from autorank_jax.experiment.position import DivergedError, Record
from autorank_jax.experiment.run import run_experiment
from tests.benchmarks.fake_cells import TINY, fake_cell, pretend
from tests.cli.test_files import make_results


@pytest.fixture
def pretended(monkeypatch):
    return pretend(monkeypatch)


@pytest.mark.parametrize("n", [3, 5, 12])
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
    two = paired.difference({0: 0.75, 1: 0.5}, {0: 0.5, 1: 0.25})
    assert two == (0.25, None, None, None, 2)  # not certain, though they agree
    equal = dict.fromkeys(range(3), 0.5)
    assert paired.difference(equal, equal).p == 1
    assert paired.in_points(paired.difference({0: 0.75}, {0: 0.5})) == "+25.0 (n = 1)"
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
    assert len(grid.run_cells(cells, tmp_path, grid.Bounds.within(0))) == 2  # no time for the damaged
    assert len(grid.run_cells(cells, tmp_path, grid.Bounds(pattern="*/0"))) == 2
    grid.run_cells(cells, tmp_path)
    assert pretended[3:] == ["part/1"]


def test_a_cell_of_other_options_is_not_lost(tmp_path, pretended):
    grid.run_cells({"one": TINY}, tmp_path)
    before = (tmp_path / "one.json").read_bytes()
    other = {"one": dataclasses.replace(TINY, rounds=2)}
    assert grid.run_cells(other, tmp_path, grid.NOTHING) == {}
    with pytest.raises(SystemExit, match=r"one.json: expected a cell of rounds 2, got one of 1; .* another --out"):
        grid.run_cells(other, tmp_path)
    assert pretended == ["one"]
    assert (tmp_path / "one.json").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x81", b"{}", b"[]", b"null", b'{"config": 1}', b'{"half'])
def test_a_cell_that_does_not_read_is_not_there(content, tmp_path):
    (tmp_path / "one.json").write_bytes(content)
    assert grid.read_cell(tmp_path / "one.json", TINY) is None


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_a_file_that_is_not_written_whole_leaves_nothing(stop, tmp_path, monkeypatch):
    path = tmp_path / "one.json"
    grid.harness.write_json(path, {"whole": True})

    def replace(*_):
        raise stop

    monkeypatch.setattr(type(path), "replace", replace)
    with pytest.raises(stop):
        grid.harness.write_json(path, {})
    assert [one.name for one in tmp_path.iterdir()] == ["one.json"]
    assert json.loads(path.read_text()) == {"whole": True}


def test_survivors_do_not_speak_for_clients_that_diverged():
    cell = fake_cell(TINY)
    assert curves.runs_of(cell)["full"][0].clients.keys() == {"before", "after"}
    own = cell["clients"]["full"]["0"]
    own["before"] = own["before"] | {"mean": 1.0, "diverged": 1}
    assert curves.runs_of(cell)["full"][0].clients.keys() == {"after"}


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
    results = run_experiment(experiment)
    scores = results.scores[0]
    for one in results.runs:
        for what, wanted in (("flops", "train_flops"), ("bytes", "bytes")):
            rows = [getattr(row, wanted) for row in one.rows]
            np.testing.assert_allclose(cell[what][one.policy]["0"], rows, rtol=1e-5)
        np.testing.assert_allclose(cell["scores"]["0"]["ratios"][one.policy], scores.ratios[one.policy], rtol=1e-5)
    for what in ("weights", "closeness"):
        np.testing.assert_allclose(cell["scores"]["0"][what], getattr(scores, what), rtol=1e-5)
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
    probed = cheap._replace(probe=5.0)
    np.testing.assert_allclose(probed.at_flops(np.array([2, 5, 7.5, 10])), [0.1, 0.1, 0.2, 0.3])
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
