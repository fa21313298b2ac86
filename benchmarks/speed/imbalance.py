"""Seconds per round against size imbalance: the queue engine stays flat, the plain vmapped round rises.

100 clients share the 5,000 images of the embedded Fashion-MNIST subset; their amounts are log-normal, σ from 0 to 2,
so that the total work is the same throughout. Model, local step, ranks and aggregation rule are the same on both sides.

Command:  python -m benchmarks.speed.imbalance            (about one minute on two CPU cores)
Writes:   benchmarks/speed/results/imbalance.json and imbalance.png, the picture of the README
Expect:   seconds of the queue within a factor of 2 over all σ, the lockstep round about seven times slower at σ = 2
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import optax
from flax import nnx
from matplotlib import pyplot as plt

from autorank_jax import aggregators, datasets, federated
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.engine.lane_count import choose_lanes
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.federated import partition
from autorank_jax.models.vision import MLP
from benchmarks import harness
from benchmarks.speed.baselines import make_lockstep

CLIENTS, BATCH_SIZE, MAX_RANK = 100, 16, 32
RESULTS = Path(__file__).parent / "results"


def measure(sigma: float, repeats: int) -> harness.Row:
    """Time one round of both engines at one imbalance."""
    dataset = datasets.load_dataset("fashion_mnist_mini")
    parts = partition.quantity(dataset.y_train, CLIENTS, sigma=sigma, seed=0)
    data = federated.from_parts(dataset.x_train, dataset.y_train, parts)
    task = task_from_nnx(MLP((784, 200, 200, 10), rngs=nnx.Rngs(0)), max_rank=MAX_RANK)
    local = make_local_training(task, optax.sgd(0.01, momentum=0.9), batch_size=BATCH_SIZE)
    rule = aggregators.rbla()
    ranks = {path: jnp.full(CLIENTS, MAX_RANK) for path in task.server.trainable.adapters}
    state, key = init_state(task.server, rule, ranks), jax.random.key(0)
    longest = -(-int(data.size.max()) // BATCH_SIZE)
    lanes = choose_lanes(data, task, batch_size=BATCH_SIZE)
    queue, _ = harness.compiled(make_round(local, rule, lanes=lanes), key, state, data)
    lockstep, _ = harness.compiled(make_lockstep(local, rule, steps=longest), key, state, data)
    competitors = {"queue": lambda: queue(key, state, data), "lockstep": lambda: lockstep(key, state, data)}
    seconds = {name: harness.summary(s) for name, s in harness.alternate(competitors, repeats).items()}
    steps = int(jnp.sum(-(-data.size // BATCH_SIZE)))
    return {
        "sigma": sigma,
        "largest_over_mean": float(data.size.max() / data.size.mean()),
        "lanes": lanes,
        "client_steps": steps,
        **{f"{name}_seconds": s["median"] for name, s in seconds.items()},
        **{f"{name}_spread": s["spread"] for name, s in seconds.items()},
        "lockstep_over_queue": seconds["lockstep"]["median"] / seconds["queue"]["median"],
    }


def draw(rows: list[harness.Row], path: Path) -> None:
    """Draw the picture of the README."""
    sigma = [row["sigma"] for row in rows]
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for name, label, colour in (
        ("lockstep", "plain vmapped round", "#D55E00"),
        ("queue", "autorank_jax: lanes pulling from a queue", "#0072B2"),
    ):
        seconds = [row[f"{name}_seconds"] for row in rows]
        axes.plot(sigma, seconds, marker="o", color=colour, linewidth=2)
        side = (0, 10) if name == "lockstep" else (0, -16)
        axes.annotate(label, (sigma[-1], seconds[-1]), side, textcoords="offset points", ha="right", color=colour)
    axes.set_xlabel("imbalance of client sizes, σ of the log-normal")
    axes.set_ylabel("seconds per round")
    axes.set_ylim(bottom=0, top=1.15 * max(row["lockstep_seconds"] for row in rows))
    axes.set_xticks(sigma)
    axes.set_title(f"{CLIENTS} clients, the same 5,000 examples in every round", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two imbalances, three repeats")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for imbalance.json and imbalance.png")
    options = parser.parse_args()
    mpl.use("Agg")
    sigmas, repeats = ((0.0, 2.0), 3) if options.quick else ((0.0, 0.5, 1.0, 1.5, 2.0), options.repeats)
    rows = [measure(sigma, repeats) for sigma in sigmas]
    columns = ["sigma", "largest_over_mean", "lanes", "queue_seconds", "lockstep_seconds", "lockstep_over_queue"]
    print(harness.markdown_table(rows, columns))
    content = {"rows": rows, "versions": harness.versions(), "device": harness.device()}
    harness.write_json(options.out / "imbalance.json", content)
    draw(rows, options.out / "imbalance.png")
    print(f"wrote {options.out / 'imbalance.json'} and imbalance.png")


if __name__ == "__main__":
    main()
