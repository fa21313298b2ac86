"""Runs that train for nothing stop, however few rounds they have."""

import pytest

from autorank_jax.cli.tables import comparison_tables, footnotes
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.position import DivergedError, Record, check_progress
from tests.cli.test_files import make_results, make_run, printed


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
    record, experiment = Record("full", "rbla", 0, rows(*excluded)), Experiment(rounds=rounds)
    if lost is None:
        check_progress(record, experiment)
        return
    with pytest.raises(DivergedError, match=f"no client has sent a finite update {lost}; probably the learning rate"):
        check_progress(record, experiment)


def test_excluded_clients_are_in_the_table():
    results = make_results()
    assert "excluded" not in printed(*comparison_tables(results)) + " ".join(footnotes(results))
    runs = tuple(run._replace(rows=rows(2, 1, 0)) if run.policy == "full" else run for run in results.runs)
    text = printed(*comparison_tables(results._replace(runs=runs)))
    assert [line.split()[-4:] for line in text.splitlines() if "excluded" in line] == [["0", "%", "50", "%"]]
    assert [line.split()[-2:] for line in text.splitlines() if "without any update" in line] == [["0", "1"]]
    assert "probably as the learning rate is too large" in " ".join(footnotes(results._replace(runs=runs)))
