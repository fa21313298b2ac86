"""What a rule costs: seconds of a round under each rule over those under the first, with the same local training.

Beside workloads of `rounds` there is `wide`: one layer of 4096 × 4096 at rank 64 and two clients of one step each, so
that nearly all of a round is what the server does. `private` is RBLA under differential privacy: every client's update
clipped, noise on the sums. One device.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.speed.rule_cost [--rules rbla private] [--json FILE]
Hardware: two CPU cores; ten minutes
Time and numbers to expect: see benchmarks/speed/README.md
"""

from collections.abc import Sequence

from autorank_jax import aggregators
from autorank_jax.adapters.lora import max_ranks
from autorank_jax.engine.simulation import init_state
from autorank_jax.types import Aggregator
from benchmarks import harness, script
from benchmarks.speed import competitors, workloads
from benchmarks.speed.workloads import Workload

WORKLOADS, QUICK = ("lognormal", "transformer", "wide"), ("tiny",)
RULES = ("rbla", "raflora", "flexlora", "florist", "lora_fair", "private")


def make_wide() -> Workload:
    """Return the workload whose rounds are the server's."""
    model = workloads.mlp((4096, 4096, 10), (64, 8))
    data = workloads.few_shot_clients(2, 1, features=4096)
    return workloads.workload_of("wide", model, data, workloads.uniform_ranks(model, data), batch_size=1)


def make_private(workload: Workload) -> Aggregator:
    """Return RBLA with clipping and noise, for rounds of everybody."""
    ranks, widest = workload.state.ranks, max_ranks(workload.task.server.trainable)
    return aggregators.with_differential_privacy(
        aggregators.rbla(),
        clip=1.0,
        noise_multiplier=1.0,
        denominator=workload.data.size.shape[0],
        owners=aggregators.expected_owners(ranks, widest, 1.0),
    )


def under(workload: Workload, name: str) -> Workload:
    """Return a workload under another rule."""
    rule = make_private(workload) if name == "private" else aggregators.make_rule(name)
    state = init_state(workload.task.server, rule, workload.state.ranks, learning_rate=workloads.LEARNING_RATE)
    return workload._replace(rule=rule, state=state)


def measure(workload: Workload, rules: Sequence[str], repeats: int) -> list[harness.Row]:
    """Let the rules take turns, the first of them the yardstick, and return a row for each."""
    entries = {}
    for name in rules:
        print(f"{workload.name}: compiling {name} …", flush=True)
        entries[name] = competitors.make_ours(under(workload, name), workload.lanes)
    print(f"{workload.name}: {repeats} turns …", flush=True)
    seconds = harness.alternate({name: entry.run for name, entry in entries.items()}, repeats)
    base = harness.summary(seconds[rules[0]])["median"]
    rows = []
    for name, times in seconds.items():
        found = harness.summary(times)
        rows.append({"workload": workload.name, "rule": name, **found, "over the first": found["median"] / base})
    return rows


def tables(content: script.Content) -> dict[str, str]:
    """Lay out seconds and ratios, a row per workload and rule."""
    columns = ("workload", "rule", "median", "spread", "over the first")
    return {"seconds per round by rule": harness.markdown_table(content["rows"], columns)}


@harness.mistakes_in_words()
def main() -> None:
    """Measure."""
    parser = script.make_parser(__doc__, quick="one small workload, one turn", repeats=5)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES, help="the first is the yardstick")
    options = parser.parse_args()
    content = {"rows": [], "repeats": 1 if options.quick else options.repeats, **script.about()}
    for name in QUICK if options.quick else WORKLOADS:
        workload = make_wide() if name == "wide" else workloads.make_workload(name, quick=options.quick)
        content["rows"] += measure(workload, options.rules, content["repeats"])
        script.publish(content, options.json, tables, None)


if __name__ == "__main__":
    main()
