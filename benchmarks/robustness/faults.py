"""What faults cost: accuracy under drop-out for the main rules, what each kind of fault leaves behind, and a soak.

Ten clients with label mixes of α = 0.3 and log-normal amounts share the embedded Fashion-MNIST subset; MLP 784-64-10,
ranks between 1 and the maximum by size. Accuracies are means over the last three of 30 rounds and over three seeds.

Command:  python -m benchmarks.robustness.faults --json benchmarks/robustness/results/faults.json
          with --soak: 10,000 rounds of a tiny federation under all faults at once, in the same file
Hardware: one CPU core; minutes on two
Expect:   no fault ever leaves a number that is not finite; figures are in benchmarks/robustness/README.md
"""

import gc
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

from autorank_jax import aggregators, datasets, federated
from autorank_jax.adapters.lora import max_ranks
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.cli.figures import PALETTE
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.evaluation.metrics import make_evaluate
from autorank_jax.federated import faults, partition
from autorank_jax.models.vision import MLP
from autorank_jax.ranks import policies
from autorank_jax.types import Aggregator, Array, FederatedData, Key, RoundInfo, State
from benchmarks import script
from benchmarks.harness import Row

CLIENTS, SHARES = 10, (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
RULES = ("rbla", "zero_pad", "flexlora", "raflora", "owner_merge")
BROKEN = np.arange(CLIENTS) == 3
COUNTS = ("participants", "dropped", "excluded", "cut_short")
COUNTED = {
    "clients invited": "participants",
    "dropped out": "dropped",
    "excluded": "excluded",
    "cut short": "cut_short",
}
FAULTS = {"fault": "fault"} | COUNTED | {
    "rounds without change": "rounds without change", "all finite": "finite", "accuracy %": "accuracy %",
}  # fmt: skip
SOAK = {"rounds": "rounds"} | COUNTED | {
    name: name
    for name in (
        "compilations", "MiB after a tenth", "MiB at the end", "live arrays after a tenth", "live arrays at the end",
    )
} | {"all finite": "finite"}  # fmt: skip


class Federation(NamedTuple):
    """Everything but the rule and the faults."""

    task: Any
    data: FederatedData
    ranks: dict[str, Array]
    dataset: datasets.Dataset


def make_federation(seed: int) -> Federation:
    """Make the clients and the model of a seed."""
    dataset = datasets.load_dataset("fashion_mnist_mini")
    parts = partition.dirichlet_lognormal(dataset.y_train, CLIENTS, alpha=0.3, sigma=1.0, seed=seed)
    data = federated.from_parts(dataset.x_train, dataset.y_train, parts, classes=10)
    task = task_from_nnx(MLP((784, 64, 10), rngs=nnx.Rngs(seed)), max_rank=32)
    ratios, _ = policies.by_size()(jax.random.key(seed), federated.client_stats(data))
    return Federation(task, data, policies.ranks_from_ratios(ratios, max_ranks(task.server.trainable)), dataset)


def training(federation: Federation) -> Any:
    """Make the local training."""
    return make_local_training(federation.task, optax.sgd(0.02, momentum=0.9), batch_size=32)


def start(federation: Federation, rule: Aggregator) -> State:
    """Make the state before the first round."""
    return init_state(federation.task.server, rule, federation.ranks)


def sweep_drop_out(rounds: int, seeds: int, names: tuple[str, ...]) -> list[Row]:
    """Measure accuracy under every share of drop-out; a rule compiles once, the share is data."""
    federations = [make_federation(seed) for seed in range(seeds)]
    rows: list[Row] = []
    for name in names:
        rule = aggregators.make_rule(name)

        def one(key: Key, state: State, data: FederatedData, share: Array) -> tuple[State, RoundInfo, Array]:
            train = make_round(training(federations[0]), rule, faults=[faults.drop_out(share)])  # noqa: B023
            state, info = train(key, state, data)
            evaluate = make_evaluate(federations[0].task, federations[0].dataset.x_test, federations[0].dataset.y_test)
            return state, info, evaluate(state)["accuracy"]

        program = jax.jit(one)
        row: Row = {"rule": name}
        for share in SHARES:
            finals, dropped, invited = [], 0, 0
            for seed, federation in enumerate(federations):
                state, curve = start(federation, rule), []
                for _ in range(rounds):
                    state, info, accuracy = program(jax.random.key(seed), state, federation.data, jnp.asarray(share))
                    curve.append(float(accuracy))
                    dropped, invited = dropped + int(info.dropped), invited + int(info.participants)
                finals.append(statistics.fmean(curve[-3:]))
            row[f"{share:.0%}"] = 100 * statistics.fmean(finals)
            row[f"sd {share:.0%}"] = 100 * statistics.stdev(finals) if seeds > 1 else 0.0
            row[f"dropped {share:.0%}"] = dropped / invited
        rows.append(row)
        print(name, {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}, flush=True)
    return rows


def try_faults(rounds: int) -> list[Row]:
    """Inject one kind of fault after the other, and tell what happened."""
    federation, rule = make_federation(0), aggregators.rbla()
    nobody = np.zeros((rounds, CLIENTS), bool)
    nobody[2:4] = True
    cases: dict[str, tuple[list[faults.Fault], bool]] = {
        "none": ([], False),
        "30 % drop out": ([faults.drop_out(0.3)], False),
        "client 3 sends NaN": ([], True),
        "half have a budget of 5 steps": ([faults.limit_steps(5, probability=0.5)], False),
        "nobody comes to rounds 3 and 4": ([faults.drop_out_schedule(nobody)], False),
        "all of these": (
            [faults.drop_out(0.3), faults.limit_steps(5, probability=0.5), faults.drop_out_schedule(nobody)],
            True,
        ),
    }
    evaluate = jax.jit(make_evaluate(federation.task, federation.dataset.x_test, federation.dataset.y_test))
    rows = []
    for name, (struck, nan) in cases.items():
        local = training(federation)
        local = faults.with_nan_clients(local, BROKEN) if nan else local
        program = jax.jit(make_round(local, rule, faults=struck))
        state, infos, unchanged = start(federation, rule), [], 0
        for _ in range(rounds):
            new, info = program(jax.random.key(0), state, federation.data)
            same = all(
                np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (new.server, state.server)), strict=True)
            )
            state, unchanged = new, unchanged + same
            infos.append(info)
        total = {f: sum(int(getattr(i, f)) for i in infos) for f in COUNTS}
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.server))
        rows.append(
            {"fault": name, **total, "rounds without change": unchanged}
            | {"finite": finite, "accuracy %": 100 * float(evaluate(state)["accuracy"])}
        )
        print(rows[-1], flush=True)
    return rows


def soak(rounds: int) -> Row:
    """Run many rounds of a tiny federation with all faults on; watch memory, live arrays and compilations."""
    rng, clients, traced = np.random.default_rng(0), 20, []
    x, y = rng.normal(size=(400, 8)).astype(np.float32), rng.integers(0, 3, 400).astype(np.int32)
    data = federated.from_client_ids(x, y, rng.integers(0, clients, 400), classes=3)
    task, rule = task_from_nnx(MLP((8, 8, 3), rngs=nnx.Rngs(0)), max_rank=3), aggregators.rbla()
    local = make_local_training(task, optax.sgd(0.05), batch_size=8)
    local = faults.with_nan_clients(local, np.arange(clients) % 10 == 0)
    struck = [faults.drop_out(0.3), faults.limit_steps(2, probability=0.2)]
    round_fn = make_round(local, aggregators.with_norm_clipping(rule, 1.0), faults=struck)

    @jax.jit
    def program(key: Key, state: State, data: FederatedData) -> tuple[State, RoundInfo]:
        traced.append(1)
        return round_fn(key, state, data)

    state = init_state(task.server, rule, {path: np.arange(clients) % 3 + 1 for path in task.server.trainable.adapters})
    memory, arrays, counts = {}, {}, np.zeros(4, int)
    for number in range(1, rounds + 1):
        state, info = program(jax.random.key(0), state, data)
        counts += [int(getattr(info, name)) for name in COUNTS]
        if number in (rounds // 10, rounds):
            gc.collect()
            memory[number], arrays[number] = resident_mib(), len(jax.live_arrays())
    (before, after), (few, many) = memory.values(), arrays.values()
    return {"rounds": rounds, "compilations": len(traced)} | dict(zip(COUNTS, counts.tolist(), strict=True)) | {
        "MiB after a tenth": before, "MiB at the end": after, "live arrays after a tenth": few,
        "live arrays at the end": many, "finite": all(np.isfinite(a).all() for a in jax.tree.leaves(state.server)),
    }  # fmt: skip


def resident_mib() -> float:
    """Return the memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def tables(content: script.Content) -> dict[str, str]:
    """Lay out what is there of faults, drop-out and soak."""
    found = {}
    if "faults" in content:
        found["faults"] = script.table(content["faults"], FAULTS)
        shares = [f"{share:.0%}" for share in SHARES]
        rows = [
            {"rule": row["rule"]} | {s: f"{row[s]:.1f} ± {row[f'sd {s}']:.1f}" for s in shares}
            for row in content["drop_out"]
        ]
        found["drop-out"] = script.table(rows, {name: name for name in ("rule", *shares)})
    if "soak" in content:
        found["soak"] = script.table([content["soak"]["row"]], SOAK)
    return found


def draw(content: script.Content) -> Figure:
    """Draw accuracy against drop-out."""
    figure, rows = Figure(figsize=(7.4, 4.4), layout="constrained"), content.get("drop_out", [])
    axes = figure.subplots()
    for place, (row, colour) in enumerate(zip(rows, PALETTE, strict=False)):
        mean, deviation = ([row[f"{prefix}{share:.0%}"] for share in SHARES] for prefix in ("", "sd "))
        at = [100 * share + 0.9 * (place - (len(rows) - 1) / 2) for share in SHARES]  # beside one another
        axes.errorbar(at, mean, deviation, marker="o", capsize=2, elinewidth=1, color=colour, label=row["rule"])
    axes.set(xlabel="clients that drop out of a round, %", ylabel="test accuracy, %")
    axes.legend(title="aggregation rule", loc="center left", bbox_to_anchor=(1, 0.5))
    script.entitle(
        figure,
        "What drop-out costs, by aggregation rule",
        f"Ten clients of a Fashion-MNIST subset; mean of the last three of {content['rounds']} rounds, bars: ± "
        f"standard deviation of {content['seeds']} seeds.\n{script.hardware(content)}.",
    )
    return figure


def main() -> None:
    """Run what the options ask for; what a file holds of the others stays."""
    parser = script.make_parser(__doc__, quick="few rounds, one seed, two rules")
    parser.add_argument("--soak", action="store_true", help="the soak, and nothing else")
    options = parser.parse_args()
    content = script.read(options.json)
    if options.soak:
        content["soak"] = script.about() | {"row": soak(1000 if options.quick else 10_000)}
    else:
        rounds, seeds, names, few = (6, 1, RULES[:2], 6) if options.quick else (30, 3, RULES, 20)
        content |= script.about() | {"rounds": rounds, "seeds": seeds, "fault_rounds": few}
        content |= {"faults": try_faults(few), "drop_out": sweep_drop_out(rounds, seeds, names)}
    script.publish(content, options.json, tables, draw if "drop_out" in content else None)


if __name__ == "__main__":
    main()
