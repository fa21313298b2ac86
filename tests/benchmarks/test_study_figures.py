"""The figures of the study show the numbers that they are given, and colour only what is shown."""

import matplotlib as mpl
import numpy as np
import pytest

from autorank_jax.cli.figures import STYLE
from benchmarks.study import all_rules, columns, figures, forest, mixed_ranks, paired, panels, questions
from benchmarks.study.forest import HIGHER, LOWER, UNSURE, UNTESTED, Forest, Mark
from benchmarks.study.paper_tables import Column
from benchmarks.study.questions import ALL, Point
from benchmarks.study.runs import runs_of
from tests.benchmarks.fake_cells import TINY, fake_cell

RUN = runs_of(fake_cell(TINY))["full"][0]


def run(finals):
    """Return a run of two evaluations."""
    axes = {"rounds": np.array([2, 4]), "flops": np.array([3e9, 7e9]), "bytes": np.array([5e6, 9e6])}
    return RUN._replace(accuracy=np.array(finals), **axes)


def seeds(*finals):
    """Return runs by seed with these final accuracies."""
    return {seed: run([0.2, final]) for seed, final in enumerate(finals)}


def drawn_marks(axes):
    """Return the marks of a panel: place, colour, face and marker by row."""
    found = {}
    for line in axes.lines:
        if line.get_marker() not in ("None", None):
            (x,), (y,) = line.get_data()
            found[y] = (x, line.get_color(), line.get_markerfacecolor(), line.get_marker())
    return found


def test_a_forest_shows_differences_with_their_intervals():
    rows = Forest.empty()
    rows.heading("group")
    rows.row("higher", Mark(paired.Difference(0.02, 0.01, 0.03, 0.001, 5), True))
    rows.row("lower", Mark(paired.Difference(-0.02, -0.03, -0.01, 0.001, 5), True))
    rows.row("unsure", Mark(paired.Difference(0.01, -0.01, 0.03, 0.4, 5), False))
    rows.row("untested", Mark(paired.Difference(0.01, 0.005, 0.015, 0.01, 5), None))
    rows.row("few", Mark(paired.Difference(0.01, None, None, None, 2)))
    rows.row("far", Mark(paired.Difference(0.5, 0.4, 0.6, 0.001, 5), True))
    rows.row("missing", Mark(None))
    figure = forest.draw_forest(rows, ["panel"], title="title", note="note", width=6)
    (axes,) = figure.axes
    marks = drawn_marks(axes)
    assert {y: mark[0] for y, mark in marks.items()} == pytest.approx({1: 2, 2: -2, 3: 1, 4: 1, 5: 1, 6: 3})
    assert [marks[y][1:] for y in (1, 2)] == [(HIGHER, HIGHER, "o"), (LOWER, LOWER, "o")]
    assert [marks[y][1:] for y in (3, 5)] == [(UNSURE, "white", "o")] * 2
    assert marks[4][1] == UNTESTED
    assert marks[6][3] == ">"
    intervals = {line.get_ydata()[0]: line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2}
    assert sorted(intervals)[1:] == [1, 2, 3, 4, 6]  # 0 is the line at zero
    np.testing.assert_allclose(intervals[2], [-3, -1])
    texts = [text.get_text().strip() for text in axes.texts]
    assert texts == ["+50.0", "not measured"]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "group", "higher", "lower", "unsure", "untested", "few", "far", "missing",
    ]  # fmt: skip


def test_the_legend_explains_the_marks_that_are_there():
    rows = Forest.empty()
    rows.row("a", Mark(paired.Difference(0.01, -0.01, 0.03, 0.4, 5), False))
    figure = forest.draw_forest(rows, ["panel"], title="", note="5 seeds", width=6)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["no difference shown"]
    assert legend.get_title().get_text() == "5 seeds"
    rows.row("b", Mark(paired.Difference(0.01, -0.04, 0.06, 0.4, 5), False))
    (legend,) = forest.draw_forest(rows, ["panel"], title="", note="5 seeds", width=6).legends
    assert legend.get_title().get_text() == "5 seeds;\nintervals are cut at the frame"


def test_the_papers_figure_shows_what_its_tables_correct():
    rng = np.random.default_rng(0)
    titles = [columns.AUTHOR[0], columns.AUTHOR[2], "full rank + RBLA", panels.PRODUCTS]
    tops = dict(zip(titles, (0.7, 0.75, 0.7, 0.701), strict=True))
    own = [Column(t, None, seeds(*(tops[t] + 0.005 * rng.normal(size=5)))) for t in titles]
    with mpl.rc_context(STYLE):
        figure = figures.draw_paper({("mnist", "staircase"): own}, 5)
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    marks = {
        labels[int(y)]: mark for y, mark in drawn_marks(axes).items() if y < labels.index("AutoRank + raFLoRA minus")
    }
    finals = {column.title: {seed: one.final for seed, one in column.runs.items()} for column in own}
    found = [paired.difference(finals[titles[0]], finals[title]) for title in titles[1:]]
    ps = paired.holm([one.p for one in found])
    for title, one, p in zip(titles[1:], found, ps, strict=True):
        assert marks[title][0] == pytest.approx(100 * one.mean)
        assert marks[title][1] == ((HIGHER if one.mean > 0 else LOWER) if p < 0.05 else UNSURE)
    assert {mark[1] for mark in marks.values()} == {LOWER, UNSURE}


def test_every_column_is_a_row_of_the_papers_figure():
    titles = [t for group in columns.GROUPS.values() if group.rule != "local_only" for t in group.titles.values()]
    own = [Column(title, None, seeds(0.5, 0.6, 0.7)) for title in titles]
    figure = figures.draw_paper({("mnist", "staircase"): own}, 3)
    labels = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    assert set(titles) - {columns.AUTHOR[0]} <= labels


def test_curves_are_differences_coloured_where_the_interval_leaves_zero():
    one = {seed: run([0.5 + 0.001 * seed, 0.5 + 0.1 * seed]) for seed in range(3)}
    other = {seed: run([0.6, 0.6]) for seed in range(3)}
    own = [Column(columns.AUTHOR[0], None, one), Column(columns.AUTHOR[2], None, other)]
    figure = panels.draw_over_rounds({("mnist", "staircase"): own}, 3)
    axes = figure.axes[0]
    zero, mean, higher, lower = axes.lines
    np.testing.assert_allclose(mean.get_xdata(), [2, 4])
    np.testing.assert_allclose(mean.get_ydata(), [-9.9, 0], atol=1e-9)
    assert zero.get_ydata() == [0, 0]
    assert (higher.get_color(), lower.get_color()) == (HIGHER, LOWER)
    assert np.isnan(higher.get_ydata()).all()
    np.testing.assert_allclose(lower.get_ydata(), [-9.9, np.nan])
    assert [text.get_text() for text in figure.axes[1].texts] == ["not measured"]


def test_a_point_for_every_run_of_mixed_ranks_and_counts_above():
    shares, differences = (0.02, 0.1, 0.11, 0.3), (-0.5, -0.06, -0.04, 0.01)
    runs = [
        mixed_ranks.MixedRun("mnist", "staircase", columns.AUTHOR[0], seed, *one)
        for seed, one in enumerate(zip(shares, differences, strict=True))
    ]
    axes = panels.draw_mixed_ranks(runs, 4).axes[0]
    points = [tuple(one.get_offsets()[0]) for one in axes.collections]
    np.testing.assert_allclose(points, list(zip(shares, 100 * np.array(differences), strict=True)))
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] < 0.02 < axes.get_xlim()[1]
    assert [t.get_text() for t in axes.texts] == [
        "1 of 1 runs", "1 of 2 runs", "0 of 1 runs", "more than 5 points behind:",
    ]  # fmt: skip


def answer_rows(first, changed):
    """Return AutoRank's answers in the study's first and fifth question."""
    table = {
        Point("autorank", "rbla", ALL, "staircase"): seeds(*first),
        Point("uniform_bytes", "rbla", ALL, "staircase"): seeds(0.4, 0.41, 0.42),
        Point("autorank", "rbla", "floor 0.5", "staircase"): seeds(*changed),
    }
    asked = questions.questions(["rbla"], [ALL, "floor 0.5"], ["staircase"])
    return [questions.answers(table, question, ["staircase"]) for question in asked]


def test_rules_and_settings_are_compared_as_their_titles_say():
    gain, *_, changed, _ = answer_rows((0.7, 0.711, 0.72), (0.6, 0.611, 0.623))
    (row,) = gain
    assert row.differences["final"].mean == pytest.approx(0.3, abs=1e-3)
    assert row.shown
    marks = [drawn_marks(axes)[1] for axes in figures.draw_rules(gain, {}, "").axes]
    assert [mark[1] for mark in marks] == [HIGHER, UNTESTED, UNTESTED]
    assert [(row.one.setting, row.shown, row.differences["final"].mean < 0) for row in changed] == [
        ("floor 0.5", True, True)
    ]


def test_every_rule_has_a_mark_for_each_kind_of_ranks():
    found = {
        (split, "rbla", policy): seeds(0.5 + 0.1 * n, 0.6 + 0.1 * n)
        for split in all_rules.SPLITS
        for n, policy in enumerate(all_rules.POLICIES)
    }
    for axes in panels.draw_all_rules(found, "").axes:
        places = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
        np.testing.assert_allclose(places, [55, 65, 75, 85])


def test_published_figures_are_drawn_from_the_result_files():
    """Each has its results: a panel for every split, and what the README says of it in its title."""
    drawn = figures.figures()
    assert set(drawn) == {path.stem for path in figures.RESULTS.glob("*.png")}
    figure = drawn["paper"]()
    places = [
        f"{dataset}\n{split} split" for dataset in ("Fashion-MNIST", "MNIST") for split in ("staircase", "random")
    ]
    assert [axes.get_title() for axes in figure.axes] == places
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    marks = drawn_marks(figure.axes[0])
    for title, mean, wanted in (
        (columns.AUTHOR[2], -2.7, LOWER),
        ("AutoRank + FlexLoRA", -2.0, UNSURE),  # p 0.056 after correction, less before it
    ):
        x, colour, *_ = marks[labels.index(title)]
        assert (round(x, 1), colour) == (mean, wanted)
