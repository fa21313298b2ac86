"""The pictures of the studies show the numbers that they are given, on the axes that they name."""

import answers
import mixed_ranks
import numpy as np
import paper
import pictures
import plan
import pytest
import study
from answers import Point
from curves import runs_of

from tests.benchmarks.fake_cells import TINY, fake_cell

RUN = runs_of(fake_cell(TINY))["full"][0]


@pytest.fixture
def drawn(monkeypatch):
    """Collect figures in place of writing them."""
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, _: figures.append(figure))
    return figures


def run(finals):
    """Return a run of two evaluations."""
    axes = {"rounds": np.array([2, 4]), "flops": np.array([3e9, 7e9]), "bytes": np.array([5e6, 9e6])}
    return RUN._replace(accuracy=np.array(finals), **axes)


def test_accuracy_over_rounds_flops_and_bytes(drawn, tmp_path):
    pictures.accuracy_curves({"a": {0: run([0.2, 0.4]), 1: run([0.4, 0.8])}}, tmp_path / "a.png", "title")
    for axes, x in zip(drawn[0].axes, ([2, 4], [3e9, 7e9], [5e6, 9e6]), strict=True):
        np.testing.assert_allclose(axes.lines[0].get_xdata(), x)
        np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.3, 0.6])
        band = axes.collections[0].get_paths()[0].vertices
        assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.2, 0.8))


def test_a_column_keeps_its_colour_where_others_are_missing(drawn, tmp_path):
    runs = {0: run([0.2, 0.4])}
    pictures.accuracy_curves({"a": runs, "b": {}, "c": runs}, tmp_path / "a.png", "title")
    assert [line.get_color() for line in drawn[0].axes[0].lines] == [pictures.PALETTE[0], pictures.PALETTE[2]]


def test_every_column_with_a_server_is_in_a_picture(drawn, tmp_path):
    titles = [
        t
        for g in plan.GROUPS.values()
        if "central" not in g.splits and g.rule != "local_only"
        for t in g.titles.values()
    ]
    paper.draw({title: {0: run([0.2, 0.4])} for title in titles}, tmp_path / "paper", "mnist, staircase")
    named = {text.get_text() for figure in drawn for text in figure.legends[0].get_texts()}
    assert named == set(titles)
    assert all(len(names) <= pictures.MOST_LINES for names in plan.PICTURES.values())


def test_what_is_shown_has_a_star(drawn, tmp_path):
    values, shown = np.array([[1.0, -2.0]]), np.array([[False, True]])
    how = {"title": "", "label": "", "differences": True, "shown": shown}
    pictures.heat_map(values, ["a"], ["b", "c"], tmp_path / "a.png", **how)
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["+1.0", "-2.0*"]


def test_every_criterion_has_its_own_panel(drawn, tmp_path):
    scores = {"criteria": ["size", "classes"], "matrix": [[10, 2], [30, 5]], "ratios": {"autorank": [0.1, 1.0]}}
    pictures.ranks_against_complexity({"staircase": {"scores": {"0": scores}}}, tmp_path / "a.png")
    for axes, points in zip(drawn[0].axes, ([(10, 0.1), (30, 1.0)], [(2, 0.1), (5, 1.0)]), strict=True):
        np.testing.assert_allclose(axes.collections[0].get_offsets(), points)


def test_a_point_for_every_run_of_mixed_ranks(drawn, tmp_path):
    runs = [mixed_ranks.MixedRun(name, "staircase", "a", 0, 0.2, by) for name, by in (("x", -0.5), ("y", 0.01))]
    pictures.accuracy_over_coverage(runs, tmp_path / "a.png")
    for axes, point in zip(drawn[0].axes, ((0.2, -50), (0.2, 1)), strict=True):
        np.testing.assert_allclose(axes.collections[0].get_offsets(), [point])
        assert axes.get_xscale() == "log"
        assert axes.get_xlim()[0] < 0.2 < axes.get_xlim()[1]


def test_the_grid_is_one_minus_other():
    table = {
        Point("autorank", "rbla", answers.ALL, "staircase"): {0: run([0.2, 0.7]), 1: run([0.2, 0.5])},
        Point("uniform_bytes", "rbla", answers.ALL, "staircase"): {0: run([0.2, 0.4]), 1: run([0.2, 0.4])},
    }
    one, other = (point._replace(split="") for point in table)
    grid = answers.grid_of(table, [(one, other), (other, one)], ["staircase", "dirichlet-0.4-10"])
    np.testing.assert_allclose(grid, [[20, np.nan], [-20, np.nan]])


def test_settings_are_compared_with_all_criteria(monkeypatch, tmp_path):
    maps = {}
    monkeypatch.setattr(pictures, "heat_map", lambda values, rows, *_, **about: maps.update({rows[0]: (values, about)}))
    monkeypatch.setattr(pictures, "accuracy_curves", lambda *_: None)
    small = study.make_plan(study.options_of(["--quick", "--out", str(tmp_path)]))
    small = small._replace(rules=("rbla",), settings=(answers.ALL, "floor 0.5"), splits=("staircase",))
    found = {("autorank", answers.ALL): 0.7, ("autorank", "floor 0.5"): 0.6, ("uniform_bytes", answers.ALL): 0.4}
    study.draw(small, {Point(p, "rbla", s, "staircase"): {0: run([0.2, final])} for (p, s), final in found.items()})
    np.testing.assert_allclose(maps["rbla"][0], [[30]])
    np.testing.assert_allclose(maps["floor 0.5"][0], [[-10]])
    assert maps["rbla"][1]["differences"]
