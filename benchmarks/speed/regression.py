"""Say whether the engine got slower than what the repository holds: ratios against `lockstep` and `centralised`.

Ratios of competitors that take turns in one run mean something on any machine of the same kind; single times do not.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.speed.regression
Hardware: as `device` in benchmarks/speed/results/rounds.json says, and quiet
Exit:     1 if a ratio fell by more than 15 %, 2 if there is nothing to compare with
"""

import argparse
from pathlib import Path

from benchmarks import harness, script
from benchmarks.speed import rounds, workloads

COMMITTED = Path(__file__).parent / "results" / "rounds.json"
WORKLOADS = ("tiny", "staircase", "lognormal", "equal")
COMPETITORS = ("lockstep", "centralised")
TOLERANCE = 0.15


def compare(
    committed: dict[str, dict[str, float]], measured: dict[str, dict[str, float]], tolerance: float
) -> list[harness.Row]:
    """Return a row for each ratio that both hold; `worse` where it fell by more than the tolerance."""
    return [
        {
            "workload": workload,
            "competitor": competitor,
            "committed": committed[workload][competitor],
            "measured": ratio,
            "change": ratio / committed[workload][competitor] - 1,
            "worse": ratio < (1 - tolerance) * committed[workload][competitor],
        }
        for workload, ratios in measured.items()
        for competitor, ratio in ratios.items()
        if competitor in committed.get(workload, {})
    ]


@harness.mistakes_in_words()
def main() -> None:
    """Measure anew, compare, and exit with 1 where something got worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=rounds.listed, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share that a ratio may fall by")
    parser.add_argument("--committed", type=Path, default=COMMITTED)
    options = parser.parse_args()
    if not options.committed.exists():
        print(f"nothing to compare with: run python -m benchmarks.speed.rounds --json {options.committed}")
        raise SystemExit(2)
    committed = script.read(options.committed)["ratios"]
    asked = {"workloads": options.workloads, "competitors": COMPETITORS, "repeats": (str(options.repeats),)}
    settings = rounds.parse([word for name, words in asked.items() for word in (f"--{name}", ",".join(words))])
    rounds.use_devices(settings)
    measured = {}
    for name in settings.workloads:
        print(f"{name} …", flush=True)
        measured[name] = rounds.measure(workloads.make_workload(name), settings)["ratios"]
    rows = compare(committed, measured, options.tolerance)
    print(harness.markdown_table(rows, ["workload", "competitor", "committed", "measured", "change", "worse"]))
    if not rows:
        raise SystemExit(2)
    raise SystemExit(1 if any(row["worse"] for row in rows) else 0)


if __name__ == "__main__":
    main()
