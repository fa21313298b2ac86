"""What a rule costs: seconds of a round under each rule over those under RBLA, the same clients and local training.

Beside workloads of `rounds` there is `wide`: one layer of 4096 × 4096 at rank 64 and two clients of one step each, so
that nearly all of a round is what the server does. One device.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.speed.rule_cost [--json FILE]
Hardware: two CPU cores; ten minutes
Time and numbers to expect: see benchmarks/speed/README.md
"""

from autorank_jax import aggregators
from autorank_jax.engine.simulation import init_state
from benchmarks import harness, script
from benchmarks.speed import competitors, workloads
from benchmarks.speed.workloads import Workload

WORKLOADS, QUICK = ("lognormal", "transformer", "wide"), ("tiny",)
RULES = ("rbla", "raflora", "flexlora", "florist", "lora_fair")


def make_wide() -> Workload:
    """Return the workload whose rounds are the server's."""
    model = workloads.mlp((4096, 4096, 10), (64, 8))
    data = workloads.few_shot_clients(2, 1, features=4096)
    return workloads.workload_of("wide", model, data, workloads.uniform_ranks(model, data), batch_size=1)


def under(workload: Workload, name: str) -> Workload:
    """Return a workload under another rule."""
    rule = aggregators.make_rule(name)
    state = init_state(workload.task.server, rule, workload.state.ranks, learning_rate=workloads.LEARNING_RATE)
    return workload._replace(rule=rule, state=state)


def measure(workload: Workload, repeats: int) -> list[harness.Row]:
    """Let the rules take turns, and return a row for each."""
    entries = {}
    for name in RULES:
        print(f"{workload.name}: compiling {name} …", flush=True)
        entries[name] = competitors.make_ours(under(workload, name), workload.lanes)
    print(f"{workload.name}: {repeats} turns …", flush=True)
    seconds = harness.alternate({name: entry.run for name, entry in entries.items()}, repeats)
    base = harness.summary(seconds[RULES[0]])["median"]
    rows = []
    for name, times in seconds.items():
        found = harness.summary(times)
        rows.append({"workload": workload.name, "rule": name, **found, "over rbla": found["median"] / base})
    return rows


def tables(content: script.Content) -> dict[str, str]:
    """Lay out seconds and ratios, a row per workload and rule."""
    columns = ("workload", "rule", "median", "spread", "over rbla")
    return {"seconds per round by rule": harness.markdown_table(content["rows"], columns)}


@harness.mistakes_in_words()
def main() -> None:
    """Measure."""
    options = script.make_parser(__doc__, quick="one small workload, one turn", repeats=5).parse_args()
    content = {"rows": [], "repeats": 1 if options.quick else options.repeats, **script.about()}
    for name in QUICK if options.quick else WORKLOADS:
        workload = make_wide() if name == "wide" else workloads.make_workload(name, quick=options.quick)
        content["rows"] += measure(workload, content["repeats"])
        script.publish(content, options.json, tables, None)


if __name__ == "__main__":
    main()
