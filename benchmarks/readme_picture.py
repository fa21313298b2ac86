"""The picture of the repository's README: clients, the ranks that AutoRank gives them, and what they reach.

Command:  python -m benchmarks.readme_picture        (--quick: two rounds, one seed)
Hardware: any; three minutes on two CPU cores.
Writes:   benchmarks/readme.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from autorank_jax.cli.figures import PALETTE, PERCENT, STYLE
from autorank_jax.experiment import Experiment, Results, Run, Scores, run_experiment

OPTIONS = Experiment(rank_policies=("autorank", "uniform_bytes"), rounds=20, local_epochs=1, seeds=5, rank_levels=4)
NAMES = {"autorank": "AutoRank's ranks", "uniform_bytes": "one rank for all, same bytes"}
TARGET = Path(__file__).parent / "readme.png"


def draw_clients(axes: Any, scores: Scores, widest: int) -> None:
    """Draw what every client has, class by class, and its rank above."""
    clients, classes = scores.label_counts.shape
    colours = mpl.colormaps["viridis"](np.linspace(0.05, 0.97, classes))
    bottom = np.zeros(clients)
    for label in range(classes):
        axes.bar(range(clients), scores.label_counts[:, label], bottom=bottom, width=0.78, color=colours[label])
        bottom += scores.label_counts[:, label]
    ranks = max(scores.ranks["autorank"].values(), key=lambda rank: rank.max())
    for client, rank in enumerate(ranks):
        axes.text(client, bottom[client] + 0.015 * bottom.max(), f"{rank}", ha="center", fontweight="bold")
    axes.set(
        xlabel="client", ylabel="examples, coloured by class", title=f"LoRA rank of every client, at most {widest}"
    )
    axes.set_xticks(range(clients))
    axes.grid(visible=False, axis="x")


def draw_accuracy(axes: Any, runs: Sequence[Run]) -> None:
    """Draw the mean over seeds of the test accuracy by round, with a band from the lowest to the highest seed."""
    for colour, (policy, name) in zip(PALETTE, NAMES.items(), strict=False):
        values = np.array([[row.accuracy for row in run.rows] for run in runs if run.policy == policy], float)
        rounds = np.arange(1, values.shape[1] + 1)
        axes.plot(rounds, values.mean(axis=0), color=colour, linewidth=2, label=name)
        axes.fill_between(rounds, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="round", ylabel="test accuracy", title="Accuracy of the common model")
    axes.yaxis.set_major_formatter(PERCENT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right")


def draw(results: Results) -> Figure:
    """Draw both panels with a caption."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_clients(left, results.scores[0], max(rank.max() for rank in results.scores[0].ranks["autorank"].values()))
        draw_accuracy(right, results.runs)
        config, seeds = results.config, len(results.scores)
        caption = (
            f"{config['dataset']}, {config['split']} split, {config['clients']} clients, {config['aggregators'][0]}, "
            f"{config['local_epochs']} local epoch; mean and range of {seeds} seeds; left: seed {OPTIONS.first_seed}"
        )
        figure.supxlabel(caption, fontsize=9, color="#555555")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, one seed")
    parser.add_argument("--png", type=Path, default=TARGET)
    options = parser.parse_args(arguments)
    experiment = OPTIONS
    if options.quick:
        experiment = Experiment(rank_policies=OPTIONS.rank_policies, rounds=2, local_epochs=1, seeds=1, rank_levels=4)
    results = run_experiment(experiment, on_round=lambda end: print(end.row.policy, end.row.seed, end.row.round))
    draw(results).savefig(options.png, dpi=130, facecolor="white")


if __name__ == "__main__":
    main()
