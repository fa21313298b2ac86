"""The studies' statistics, cells, curves and learning rates."""

import dataclasses
import fcntl
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import stats

from autorank_jax.experiment import DivergedError, run_experiment
from autorank_jax.experiment.results import Record
from benchmarks import harness
from benchmarks.study import cells, columns, paired, runs, tuning
from benchmarks.study.cell_file import CellFile, options_of
from tests.benchmarks.fake_cells import TINY, fake_cell, pretend
from tests.cli.cases import make_results


@pytest.fixture
def file(tmp_path):
    return CellFile(tmp_path / "cells.jsonl")


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


def test_an_interrupted_grid_goes_on(pretended, file, monkeypatch):
    grid = {f"part/{seed}": dataclasses.replace(TINY, first_seed=seed) for seed in range(3)}
    run = cells._run

    def stops(experiment, progress, name):
        if name == "part/2":
            raise KeyboardInterrupt
        return run(experiment, progress, name)

    monkeypatch.setattr(cells, "_run", stops)
    with pytest.raises(KeyboardInterrupt):
        cells.run_cells(grid, file)
    monkeypatch.setattr(cells, "_run", run)
    assert len(cells.run_cells(grid, CellFile(file.path))) == 3
    assert pretended == ["part/0", "part/1", "part/2"]
    lines = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(b"".join([*lines[:2], lines[2][:50], b"\n", *lines[3:]]))
    damaged = CellFile(file.path)
    assert len(cells.run_cells(grid, damaged, cells.Bounds.within(0))) == 2  # no time for the damaged
    assert len(cells.run_cells(grid, damaged, cells.Bounds(pattern="*/0"))) == 2
    cells.run_cells(grid, damaged)
    assert pretended[3:] == ["part/1"]
    assert len(cells.run_cells(grid, CellFile(file.path), cells.NOTHING)) == 3


def test_a_cell_of_other_options_is_not_lost(file, pretended):
    cells.run_cells({"one": TINY}, file)
    before = file.path.read_bytes()
    other = {"one": dataclasses.replace(TINY, rounds=2)}
    assert cells.run_cells(other, file, cells.NOTHING) == {}
    with pytest.raises(SystemExit, match=r"expected one to be a cell of rounds 2, got one of 1; .* another --out"):
        cells.run_cells(other, file)
    assert pretended == ["one"]
    assert file.path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x81", b"{}", b"[]", b"null", b'{"options": 1}', b'{"half'])
@pytest.mark.parametrize("place", ["alone", "after", "between"])
def test_a_cell_that_does_not_read_is_not_there(content, place, file):
    if place != "alone":
        file.append("other", fake_cell(TINY))
    with file.path.open("ab") as lines:
        lines.write(content + b"\n" * (place == "between"))
    assert cells.read_cell(CellFile(file.path), "one", TINY) is None
    CellFile(file.path).append("one", fake_cell(TINY))
    for reader in (file, CellFile(file.path)):
        assert cells.read_cell(reader, "one", TINY) == fake_cell(TINY)
        assert set(reader.cells()) == {"one"} | ({"other"} if place != "alone" else set())


def test_cells_differ_from_shared_options_alone(file):
    """What cells share is written once; every cell is read with all its options."""
    for seed in range(3):
        file.append(
            f"cell {seed}", fake_cell(dataclasses.replace(TINY, first_seed=seed, learning_rate=0.1 * (seed + 1)))
        )
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [set(line) & {"shared", "cell"} for line in lines] == [{"shared"}, {"cell"}, {"cell"}, {"cell"}]
    assert [sorted(line["options"]) for line in lines[1:]] == [[], *[["first_seed", "learning_rate"]] * 2]
    read = CellFile(file.path).cells()
    assert [cell["options"]["first_seed"] for cell in read.values()] == [0, 1, 2]
    assert all(set(cell["options"]) == set(options_of(TINY)) for cell in read.values())


def test_the_later_cell_of_a_name_counts(file):
    file.append("one", fake_cell(TINY))
    file.append("one", fake_cell(dataclasses.replace(TINY, rounds=3)))
    assert CellFile(file.path).cell("one")["options"]["rounds"] == 3


def test_a_cell_that_is_not_written_whole_is_run_again(file):
    """Whoever dies while writing leaves half a line, which takes no other cell with it."""
    file.append("one", fake_cell(TINY))
    line = json.dumps({"cell": "two", **fake_cell(TINY)}).encode()
    with file.path.open("ab") as lines:
        lines.write(line[: len(line) // 2])
    assert list(CellFile(file.path).cells()) == ["one"]
    file.append("three", fake_cell(TINY))
    assert list(CellFile(file.path).cells()) == ["one", "three"]


def test_two_writers_lose_no_cell(file):
    """Who appends while another process writes its line waits for the end of it."""
    file.append("one", fake_cell(TINY))
    line = json.dumps({"cell": "two", **fake_cell(TINY)}).encode() + b"\n"
    with ThreadPoolExecutor(1) as pool, file.path.open("ab", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(line[:100])
        third = pool.submit(CellFile(file.path).append, "three", fake_cell(TINY))
        time.sleep(0.2)
        assert not third.done()
        assert list(CellFile(file.path).cells()) == ["one"]
        other.write(line[100:])
        fcntl.flock(other, fcntl.LOCK_UN)
        third.result(timeout=60)
    assert list(file.cells()) == list(CellFile(file.path).cells()) == ["one", "two", "three"]


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_a_file_that_is_not_written_whole_leaves_nothing(stop, tmp_path, monkeypatch):
    path = tmp_path / "one.json"
    harness.write_json(path, {"whole": True})

    def replace(*_):
        raise stop

    monkeypatch.setattr(type(path), "replace", replace)
    with pytest.raises(stop):
        harness.write_json(path, {})
    assert [one.name for one in tmp_path.iterdir()] == ["one.json"]
    assert json.loads(path.read_text()) == {"whole": True}


def test_survivors_do_not_speak_for_clients_that_diverged():
    cell = fake_cell(TINY)
    assert runs.runs_of(cell)["full"][0].clients.keys() == {"before", "after"}
    own = cell["runs"]["full"]["0"]["clients"]
    own["before"] = own["before"] | {"mean": 1.0, "diverged": 1}
    assert runs.runs_of(cell)["full"][0].clients.keys() == {"after"}


@pytest.mark.slow
def test_a_real_cell_holds_what_the_tables_need(file, monkeypatch):
    experiment = dataclasses.replace(
        TINY, rank_policies=("autorank", "full"), personal=True, probe_epochs=2, rounds=3, eval_every=2
    )
    kept = []

    def run(*given, **named):
        kept.append(run_experiment(*given, **named))
        return kept[-1]

    monkeypatch.setattr(cells, "run_experiment", run)
    cell = cells.run_cells({"one": experiment}, file)["one"]
    assert CellFile(file.path).cell("one") == cell
    (results,) = kept
    found = runs.runs_of(cell)
    for one in results.runs:
        run, rows = found[one.policy][0], [one.rows[1], one.rows[2]]
        assert run.rounds.tolist() == [2, 3]
        np.testing.assert_allclose(run.accuracy, [row.accuracy for row in rows], rtol=1e-5)
        np.testing.assert_allclose(run.flops, [row.train_flops for row in rows], rtol=1e-5)
        np.testing.assert_allclose(run.bytes, [row.bytes for row in rows], rtol=1e-5)
        np.testing.assert_allclose((run.probe, run.slowest), (one.probe_flops, one.costs.slowest_client), rtol=1e-5)
        np.testing.assert_allclose(run.ratio_by_clients, one.ratio_by_clients, rtol=1e-5)
        np.testing.assert_allclose(run.ratio_by_examples, one.ratio_by_examples, rtol=1e-5)
        for when, measures in one.clients.items():
            for measure, value in measures.items():
                assert run.clients[when][measure] == pytest.approx(value, rel=1e-5)
        assert not run.diverged
    assert found["autorank"][0].probe > 0
    assert found["full"][0].ratio_by_clients == 1


def test_costs_of_equal_rounds_are_one_number():
    assert cells.added([7.0, 9.0, 11.0], 5.0) == 2.0
    assert cells.added([7.0, 9.0, 12.0], 5.0) == [2.0, 2.0, 3.0]
    assert cells.added([]) == []
    cell = fake_cell(dataclasses.replace(TINY, rounds=3))
    cell["runs"]["full"]["0"] |= {"flops": 2.0, "probe": 5.0, "bytes": [1.0, 2.0, 4.0]}
    run = runs.runs_of(cell)["full"][0]
    assert run.flops.tolist() == [7, 9, 11]
    assert run.bytes.tolist() == [1, 3, 7]


def test_policies_after_one_that_diverges_are_run(monkeypatch, file):
    whole = make_results()
    first = whole.runs[0]._replace(rows=whole.runs[0].rows[:1])

    asked = []

    def run(experiment, **_):
        asked.append((experiment.rank_policies, experiment.first_seed, experiment.seeds))
        config = options_of(experiment)
        if experiment.rank_policies[0] == "autorank" and experiment.first_seed == 0:
            lost = Record("autorank", "rbla", 0, first.rows)
            raise DivergedError("the loss is lost", lost, whole._replace(runs=(first,), config=config))
        wanted = [run for run in whole.runs if run.policy in experiment.rank_policies]
        return whole._replace(runs=tuple(run for run in wanted if run.seed in experiment.all_seeds), config=config)

    monkeypatch.setattr(cells, "run_experiment", run)
    experiment = dataclasses.replace(TINY, rank_policies=("autorank", "full"), rounds=3, seeds=2)
    cell = cells.run_cells({"wild": experiment}, file)["wild"]
    assert asked == [(("autorank", "full"), 0, 2), (("autorank",), 1, 1), (("full",), 0, 2)]
    lost = cell["runs"]["autorank"]["0"]
    assert (lost["diverged"], lost["rounds"]) == ("the loss is lost", 1)
    found = runs.runs_of(cell)
    assert found["autorank"][0].accuracy.tolist() == [0.2, runs.GUESSING, runs.GUESSING]
    assert np.isnan(found["autorank"][0].flops).tolist() == [False, True, True]
    assert found["autorank"][1].final == 0.7
    assert [found["full"][seed].final for seed in (0, 1)] == [0.96, 0.4]
    whether = [run.diverged for run in (*found["autorank"].values(), *found["full"].values())]
    assert whether == [True, False, False, False]
    alone = {**cell["options"], "aggregators": ["local_only"]}
    assert len(runs.runs_of(cell | {"options": alone})["autorank"][0].accuracy) == 0


def test_accuracy_at_equal_flops():
    cell = fake_cell(TINY)
    run = runs.runs_of(cell)["full"][0]._replace(diverged=False)
    dear = run._replace(accuracy=np.array([0.4, 0.6]), flops=np.array([30.0, 40.0]))
    cheap = run._replace(accuracy=np.array([0.3, 0.5]), flops=np.array([10.0, 20.0]))
    np.testing.assert_allclose(cheap.at_flops(np.array([0, 5, 10, 15, 99])), [0.1, 0.2, 0.3, 0.4, 0.5])
    probed = cheap._replace(probe=5.0)
    np.testing.assert_allclose(probed.at_flops(np.array([2, 5, 7.5, 10])), [0.1, 0.1, 0.2, 0.3])
    fallen = cheap._replace(diverged=True, flops=np.array([10.0, np.nan]))
    np.testing.assert_allclose(fallen.at_flops(np.array([5, 10, 15])), [0.2, 0.3, 0.1])
    ones, others = runs.measured({0: dear, 1: dear}, {0: cheap, 2: cheap}, "early_flops")
    assert (ones, others) == ({0: pytest.approx(0.4)}, {0: pytest.approx(0.5)})
    assert runs.measured({0: cheap, 2: cheap}, {0: dear, 1: dear}, "early_flops") == (others, ones)
    ones, others = runs.measured({0: dear}, {0: cheap}, "final_flops")
    assert (ones, others) == ({0: pytest.approx(0.3)}, {0: pytest.approx(0.5)})


def test_numbers_of_a_curve():
    cell = fake_cell(dataclasses.replace(TINY, rounds=10, eval_every=2))
    cell["runs"]["full"]["0"] |= {"accuracy": [0.2, 0.5, 0.6, 0.4, 0.55], "flops": 1.5e9}
    run = runs.runs_of(cell)["full"][0]
    assert run.rounds.tolist() == [2, 4, 6, 8, 10]
    assert (run.final, run.best, run.area, run.early) == pytest.approx((0.55, 0.6, 0.45, 0.2))
    assert [run.until(t, "rounds") for t in (0.5, 0.6, 0.7)] == [4, 6, None]
    assert run.until(0.5, "flops") == 3e9
    other = run._replace(accuracy=run.accuracy - 0.15)
    assert runs.until({0: run, 1: other}, 0.4, "rounds") == "5 ± 1.4"
    assert runs.until({0: run, 1: other}, 0.6, "rounds") == "1 of 2 seeds"


@pytest.mark.usefixtures("pretended")
def test_the_best_rate_on_validation_examples_is_chosen(file):
    experiment = columns.experiment_of(columns.Job("fashion_mnist_mini", "staircase", "main"))
    choices = tuning.choose_rates(experiment, tuning.Grid(), file, "x", cells.Bounds())
    assert {choice.rate for choice in choices.values()} == {0.03}
    assert not any(choice.edge for choice in choices.values())
    configs = [cell["options"] for cell in file.cells().values()]
    asked = (0.1, tuning.FIRST_SEED, experiment.rounds)
    assert {(c["validation"], c["first_seed"], c["rounds"]) for c in configs} == {asked}
    assert tuning.choose_rates(experiment, tuning.Grid((0.1, 0.3)), file, "y", cells.Bounds.within(0)) == {}


@pytest.mark.parametrize(("best", "chosen", "edge"), [(0.003, 0.003, False), (0.3, 0.3, True), (1e-5, 0.001, True)])
def test_a_policy_whose_best_rate_is_at_an_end_tries_further(best, chosen, edge, file, monkeypatch):
    ran = []

    def run(experiment, _, name):
        ran.append(name)
        return fake_cell(experiment, lambda policy: best if policy == "autorank" else 0.03)

    monkeypatch.setattr(cells, "_run", run)
    experiment = dataclasses.replace(TINY, rank_policies=("autorank", "full"), rounds=4)
    choices = tuning.choose_rates(experiment, tuning.Grid(), file, "x", cells.Bounds())
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
            for one in cell["runs"].get("full", {}).values():
                one["accuracy"] = [0.1] * len(one["accuracy"])
        return cell

    monkeypatch.setattr(cells, "_run", run)
    experiment = dataclasses.replace(TINY, rank_policies=("autorank", "full"), rounds=4)
    once = tuning.choose_rates(experiment, tuning.Grid(), CellFile(tmp_path / "a"), "x", cells.Bounds())
    assert {policy: choice.rate for policy, choice in once.items()} == {"autorank": 0.03, "full": 0.1}
    ran.clear()
    twice = tuning.choose_rates(experiment, tuning.Grid(more_seeds=2), CellFile(tmp_path / "b"), "x", cells.Bounds())
    assert {policy: choice.rate for policy, choice in twice.items()} == {"autorank": 0.03, "full": 0.03}
    more = [one for name, one in ran.items() if name.endswith("-more")]
    assert {(one.rank_policies, one.learning_rate) for one in more} == {
        (("autorank",), 0.03), (("full",), 0.1), (("full",), 0.03),
    }  # fmt: skip
    assert {(one.first_seed, one.seeds) for one in more} == {(tuning.FIRST_SEED + 1, 2)}


def test_a_rate_that_diverges_without_a_server_model_guesses(file, monkeypatch):
    def run(experiment, *_):
        cell = fake_cell(experiment)
        if experiment.learning_rate == 0.1:
            cell["runs"]["full"]["1000"]["clients"] = {}
        return cell

    monkeypatch.setattr(cells, "_run", run)
    experiment = dataclasses.replace(TINY, aggregators=("local_only",), rounds=4)
    choice = tuning.choose_rates(experiment, tuning.Grid(), file, "x", cells.Bounds())["full"]
    assert choice.accuracy["0.1"] == runs.GUESSING
    assert choice.rate < 0.1


@pytest.mark.parametrize(
    ("mistakes", "best"), [((0.2, 0.1, 0.15), 0.03), ((0.102, 0.1, 0.3), 0.01), ((0.3, 0.0, 0.0), 0.03)]
)
def test_of_equal_rates_the_smallest_is_chosen(mistakes, best):
    assert tuning._best({rate: [1 - m] for rate, m in zip(tuning.Grid().rates, mistakes, strict=True)}) == best


def test_policies_of_one_rate_may_share_a_cell(pretended, file):
    experiment = dataclasses.replace(TINY, rank_policies=("autorank", "full", "uniform"), rounds=4)
    rates = dict(zip(experiment.rank_policies, (0.03, 0.01, 0.03), strict=True))
    choices = {policy: tuning.Choice(rate, {}, False) for policy, rate in rates.items()}
    how = {"seeds": range(2), "together": False, "bounds": cells.Bounds()}
    shared = tuning.run_tuned(experiment, choices, file, "x", **how, apart=False)
    assert pretended == ["x-lr0.01-seed0", "x-lr0.03-seed0", "x-lr0.01-seed1", "x-lr0.03-seed1"]
    policies = [cell["options"]["rank_policies"] for cell in file.cells().values()]
    assert policies[:2] == [["full"], ["autorank", "uniform"]]
    assert {policy: sorted(one.runs) for policy, one in shared.items()} == {policy: [0, 1] for policy in rates}
    tuning.run_tuned(experiment, choices, file, "x", **how)
    assert len(pretended) == 4 + 6
