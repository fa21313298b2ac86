"""Pictures of an experiment: accuracy against rounds and FLOPs, label mixes and ranks."""

import io
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from autorank_jax.cli.tables import EQUAL, about
from autorank_jax.experiment.results import SCORES, Results, Run, Scores, accuracies, run_names, si

# Okabe and Ito: told apart with every common colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
}
SHOWN_CLIENTS = 30
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g} %")


class Curve(NamedTuple):
    """One line of a picture, and its band where there are several seeds."""

    name: str
    runs: Sequence[Run]  # a seed each
    colour: str
    dash: Any


def accuracy_figure(results: Results) -> Figure:
    """Draw test accuracy against rounds, and against training FLOPs with the probe, with a band of ±1 sd over seeds."""
    policies, aggregators = (list(results.config[key]) for key in ("rank_policies", "aggregators"))
    curves = [
        Curve(
            name,
            runs,
            PALETTE[policies.index(runs[0].policy) % len(PALETTE)],
            DASHES[aggregators.index(runs[0].aggregator) % len(DASHES)],
        )
        for name, runs in run_names(results).items()
    ]
    return curves_figure(curves, about(results), score=SCORES[results.score])


def curves_figure(curves: Sequence[Curve], caption: str, *, score: str = "accuracy") -> Figure:
    """Draw curves against rounds and against training FLOPs."""
    with mpl.rc_context({**STYLE, "text.parse_math": False}):  # names are folders', with $ in them or not
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        by_round, by_flops = figure.subplots(1, 2, sharey=True)
        handles = []
        for name, runs, colour, dash in curves:
            rounds, flops, mean, deviation = _curve(runs)
            for axes, x in ((by_round, rounds), (by_flops, flops)):
                axes.plot(
                    x, mean, color=colour, linestyle=dash, linewidth=2, marker="o", markersize=3 if len(x) <= 40 else 0
                )
                if len(runs) > 1:
                    low, high = mean - deviation, np.minimum(mean + deviation, 1)
                    low = np.maximum(low, 0) if score == "accuracy" else low
                    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            handles.append(Line2D([], [], color=colour, linestyle=dash, linewidth=2, label=_label(name)))
        title = score[:1].upper() + score[1:]
        by_round.set(xlabel="round", ylabel=f"test {score}", title=f"{title} by round")
        by_flops.set(
            xlabel="training FLOPs of all clients, probe included",
            title=f"{title} by training cost",
        )
        last = max((row.round for curve in curves for run in curve.runs for row in run.rows), default=1)
        by_round.set_xlim(0, last + max(0.3, last / 20))  # also where there is one round
        by_flops.set_xlim(left=0)
        by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_round.yaxis.set_major_formatter(PERCENT)
        by_flops.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
        longest = max(len(curve.name) for curve in curves)
        figure.legend(
            handles=handles, loc="outside lower center", ncols=max(1, min(len(handles), 4, 120 // (longest + 6)))
        )
        figure.suptitle(caption, x=0.01, ha="left", fontsize=9, color="#555555")
    return figure


def _label(name: str) -> str:
    """Return a name that a legend shows: without half characters, and not hidden for its first underscore."""
    return f"{' ' * name.startswith('_')}{name}".encode(errors="replace").decode()


def _curve(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return rounds, mean FLOPs, mean accuracy and its deviation, where every seed has an accuracy."""
    measured = [dict(accuracies(run)) for run in runs]
    rounds = sorted(set.intersection(*(set(curve) for curve in measured)))
    values = np.array([[curve[number] for number in rounds] for curve in measured])
    flops = np.array([[run.rows[number - 1].train_flops for number in rounds] for run in runs])
    deviation = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(rounds))
    return np.array(rounds), flops.mean(axis=0), values.mean(axis=0), deviation


def ranks_figure(scores: Scores, *, seeds: int = 1) -> Figure:
    """Draw each client's label mix as a bar as high as its data, and beneath it every policy's rank ratio and rank.

    Of many clients, an even selection from the smallest to the largest is shown.

    Args:
        scores: of one seed.
        seeds: of the whole run; where there are several, the title says which one this is.
    """
    chosen = _shown(scores)
    policies = list(scores.ratios)
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(np.clip(0.62 * len(chosen) + 2, 6.5, 14), 4.4 + 0.32 * len(policies)), layout="constrained"
        )
        bars, table = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 0.32 * len(policies) + 0.25])
        _draw_labels(bars, scores, chosen)
        seed = f"\nSeed {scores.seed}, one of {seeds}; other seeds have other clients" if seeds > 1 else ""
        bars.set_title(f"Label mix of every client, and the rank it is given{seed}")
        _draw_ranks(table, scores, chosen)
        names = [str(client) for client in chosen]
        table.set_xticks(range(len(chosen)), names, fontsize=9 if len(chosen) <= 20 else 8)
        table.set_xlabel(
            "client" if len(chosen) == len(scores.size) else f"client ({len(chosen)} of {len(scores.size)})"
        )
    return figure


def _shown(scores: Scores) -> np.ndarray:
    clients = len(scores.size)
    if clients <= SHOWN_CLIENTS:
        return np.arange(clients)
    by_size = np.argsort(scores.size, kind="stable")
    return by_size[np.linspace(0, clients - 1, SHOWN_CLIENTS).round().astype(int)]


def _draw_labels(axes: Any, scores: Scores, chosen: np.ndarray) -> None:
    counts = scores.label_counts[chosen]
    classes = counts.shape[1]
    colours = mpl.colormaps["viridis"](np.linspace(0.05, 0.97, classes))
    bottom = np.zeros(len(chosen))
    for label in range(classes):
        axes.bar(
            range(len(chosen)), counts[:, label], bottom=bottom, width=0.78, color=colours[label], edgecolor="white",
            linewidth=0.4, label=str(label),
        )  # fmt: skip
        bottom += counts[:, label]
    axes.set_ylabel("examples")
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", length=0)
    if classes <= 20:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1], labels[::-1], title="class", loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=8,
            title_fontsize=9, handlelength=1, handleheight=1, labelspacing=0.35,
        )  # fmt: skip


def _draw_ranks(axes: Any, scores: Scores, chosen: np.ndarray) -> None:
    policies = list(scores.ratios)
    ratios = np.array([scores.ratios[policy][chosen] for policy in policies])
    axes.imshow(ratios, aspect="auto", cmap="Blues", vmin=0, vmax=1.25)
    for row, policy in enumerate(policies):
        if not scores.ranks[policy]:  # whole weights are trained
            continue
        widest = max(scores.ranks[policy].values(), key=lambda ranks: ranks.max())[chosen]
        for column, rank in enumerate(widest):
            colour = "white" if ratios[row, column] > 0.7 else "#222222"
            size = 9 if len(chosen) <= 20 else 7.5
            axes.text(column, row, str(rank), ha="center", va="center", color=colour, fontsize=size)
    axes.set_yticks(range(len(policies)), [EQUAL.get(policy, policy) for policy in policies])
    axes.set_ylabel("rank of the\nwidest layer,\nshade: ratio")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def to_png(figure: Figure) -> bytes:
    """Return a picture as PNG."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn for it
        figure.savefig(image, dpi=150, format="png", facecolor="white")
    return image.getvalue()
