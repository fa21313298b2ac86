"""Runs that train for nothing stop, however few rounds they have."""

import pytest

from autorank_jax.checkpoint import save_state
from autorank_jax.cli.tables import comparison_tables, footnotes
from autorank_jax.experiment.checkpoints import Checkpoints, last_good, with_rounds
from autorank_jax.experiment.config import ConfigurationError, Experiment
from autorank_jax.experiment.position import check_progress
from autorank_jax.experiment.results import DivergedError, Record
from tests.cli.cases import make_results, make_run, printed


def rows(*excluded):
    """Rounds of two clients, some of which sent nothing finite."""
    run = make_run("full", 0, [0.5] * len(excluded))
    return tuple(
        row._replace(excluded=count, reported=2 - count, train_loss=None if count == 2 else 1.0)
        for row, count in zip(run.rows, excluded, strict=True)
    )


@pytest.mark.parametrize(
    ("excluded", "rounds", "lost"),
    [
        ((2,), 1, "for 1 round in round 1"),
        ((2, 2), 2, "for 2 rounds in round 2"),
        ((2, 2, 2), 9, "for 3 rounds in round 3"),
        ((2, 2), 3, None),
        ((2, 1), 2, None),
        ((2, 2, 1), 3, None),
    ],
)
def test_a_run_in_which_nobody_sends_anything_finite_stops(excluded, rounds, lost):
    so_far, experiment = Record("full", "rbla", 0, rows(*excluded)), Experiment(rounds=rounds)
    if lost is None:
        check_progress(so_far, experiment)
        return
    with pytest.raises(DivergedError, match=f"no client has sent a finite update {lost}; probably the learning rate"):
        check_progress(so_far, experiment)


def record(policy, rounds, over=True):
    return Record(policy, "rbla", 0, rows(*[0] * rounds), over)


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ((record("full", 4),), {"rounds": 6}, None),
        ((record("full", 3, over=False),), {"rounds": 4, "eval_every": 7}, None),
        ((record("full", 3, over=False),), {"rounds": 9, "eval_every": 7}, None),
        ((record("full", 3, over=False),), {"rounds": 3}, "more than the 3 that are done, got 3"),
        ((record("full", 4),), {"rounds": 9, "eval_every": 3}, "4 as before, as the last of them is tested"),
        (
            (record("full", 4),),
            {"rounds": 9, "dp_epsilon": 1.0},
            "4 as before, as --dp-epsilon found its noise for so many",
        ),
        ((record("full", 4), record("autorank", 1)), {"rounds": 9}, "the state of full with rbla, seed 0 is not kept"),
    ],
)
def test_more_rounds_are_refused_where_they_make_another_result(records, options, message):
    before = 4 if options["rounds"] != 4 else 5
    if message:
        with pytest.raises(ConfigurationError, match=message):
            with_rounds(records, Experiment(**options), before)
        return
    (found,) = with_rounds(records, Experiment(**options), before)
    assert found == records[0]._replace(over=False)


def test_the_last_good_checkpoint_is_one_of_the_run_that_failed(tmp_path):
    records = [record("full", 2)._asdict() | {"rows": []}]
    save_state(tmp_path, {}, step=2, config={}, extra={"records": records, "seconds": {}, "about": {}})
    kept = Checkpoints(tmp_path)
    assert last_good(kept, record("full", 3)) == f"the last good checkpoint is {tmp_path}/step_00000002"
    assert last_good(kept, record("autorank", 1)) == "no checkpoint of it was saved"
    assert last_good(None, record("full", 3)) == "no checkpoint of it was saved"


def test_excluded_clients_are_in_the_table():
    results = make_results()
    assert "excluded" not in printed(*comparison_tables(results)) + " ".join(footnotes(results))
    runs = tuple(run._replace(rows=rows(2, 1, 0)) if run.policy == "full" else run for run in results.runs)
    text = printed(*comparison_tables(results._replace(runs=runs)))
    assert [line.split()[-4:] for line in text.splitlines() if "excluded" in line] == [["0", "%", "50", "%"]]
    assert [line.split()[-2:] for line in text.splitlines() if "without any update" in line] == [["0", "1"]]
    assert "probably as the learning rate is too large" in " ".join(footnotes(results._replace(runs=runs)))
