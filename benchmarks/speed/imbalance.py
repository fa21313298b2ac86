"""Seconds per round against size imbalance: the queue engine stays flat, the plain vmapped round rises.

100 clients share the 5,000 images of the embedded Fashion-MNIST subset; their amounts are log-normal, σ from 0 to 2,
so that the total work is the same throughout. Model, local step, ranks and aggregation rule are the same on both sides.

Command:  python -m benchmarks.speed.imbalance --json benchmarks/speed/results/imbalance.json
Hardware: two CPU cores, about one minute
Expect:   seconds of the queue within a factor of 2 over all σ, the lockstep round about seven times slower at σ = 2
"""

from typing import Any

from matplotlib.figure import Figure

from autorank_jax import datasets
from autorank_jax.cli.figures import PALETTE
from autorank_jax.federated import partition
from benchmarks import harness, script
from benchmarks.speed import workloads
from benchmarks.speed.competitors import make_engine, make_ours

CLIENTS, BATCH_SIZE, MAX_RANK = 100, 16, 32
SIGMAS = (0.0, 0.5, 1.0, 1.5, 2.0)
COLUMNS = {
    "σ": "sigma",
    "largest client over mean": "largest_over_mean",
    "lanes": "lanes",
    "seconds, queue": "queue_seconds",
    "± queue": "queue_spread",
    "seconds, lockstep": "lockstep_seconds",
    "± lockstep": "lockstep_spread",
    "lockstep / queue": "lockstep_over_queue",
}


def measure(sigma: float, repeats: int) -> harness.Row:
    """Time one round of both engines at one imbalance."""
    dataset = datasets.load_dataset("fashion_mnist_mini")
    parts = partition.quantity(dataset.y_train, CLIENTS, sigma=sigma, seed=0)
    data = workloads.clients_of(dataset, parts)
    model = workloads.mlp(workloads.SIZES, (MAX_RANK,) * 3)
    ranks = workloads.uniform_ranks(model, data)
    workload = workloads.workload_of("imbalance", model, data, ranks, batch_size=BATCH_SIZE, momentum=0.9)
    entries = {"queue": make_ours(workload, workload.lanes), "lockstep": make_engine("lockstep", workload)}
    turns = harness.alternate({name: entry.run for name, entry in entries.items()}, repeats)
    seconds = {name: harness.summary(times) for name, times in turns.items()}
    return {
        "sigma": sigma,
        "largest_over_mean": float(data.size.max() / data.size.mean()),
        "lanes": entries["queue"].detail["lanes"],
        "client_steps": int((-(-data.size // BATCH_SIZE)).sum()),
        **{f"{name}_seconds": s["median"] for name, s in seconds.items()},
        **{f"{name}_spread": s["spread"] for name, s in seconds.items()},
        "lockstep_over_queue": seconds["lockstep"]["median"] / seconds["queue"]["median"],
    }


def tables(content: script.Content) -> dict[str, str]:
    """Lay out the seconds of both engines."""
    return {"imbalance": script.table(content["rows"], COLUMNS)}


def draw(content: script.Content) -> Figure:
    """Draw seconds per round over the size of the largest client."""
    rows = content["rows"]
    figure = Figure(figsize=(6.6, 4.1), layout="constrained")
    axes = figure.subplots()
    largest = [row["largest_over_mean"] for row in rows]
    for name, label, colour, below in (
        ("lockstep", "hand-written jit(vmap(scan)):\neveryone waits for the largest client", PALETTE[1], 1.0),
        ("queue", "autorank_jax: lanes pull clients from a queue", PALETTE[0], -1.0),
    ):
        seconds = [row[f"{name}_seconds"] for row in rows]
        axes.errorbar(
            largest, seconds, [row[f"{name}_spread"] for row in rows], color=colour, marker="o", linewidth=2, capsize=3
        )
        at = (largest[-1], seconds[-1]) if below < 0 else (largest[-2], seconds[-2])
        side: dict[str, Any] = {"ha": "right", "va": "top" if below < 0 else "bottom"}
        axes.annotate(label, at, (-6, 12 * below), textcoords="offset points", color=colour, **side)
    axes.set(xlabel="examples of the largest client, as a multiple of the mean", ylabel="seconds per round")
    axes.set_ylim(bottom=0, top=1.15 * max(row["lockstep_seconds"] for row in rows))
    script.entitle(
        figure,
        "The same work, shared ever less evenly among 100 clients",
        f"5,000 images in every round, equal results. {script.hardware(content)}, one device; median of "
        f"{content['repeats']} turns,\nbars: half-width of the middle half.",
    )
    return figure


@harness.mistakes_in_words()
def main() -> None:
    """Measure, print, write."""
    options = script.make_parser(__doc__, quick="two imbalances, three turns", repeats=7).parse_args()
    sigmas, repeats = (SIGMAS[::4], 3) if options.quick else (SIGMAS, options.repeats)
    rows = [measure(sigma, repeats) for sigma in sigmas]
    script.publish({"rows": rows, "repeats": repeats, **script.about()}, options.json, tables, draw)


if __name__ == "__main__":
    main()
