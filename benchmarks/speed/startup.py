"""How long a user waits: the command line of release 0.1.0 and of the working tree, in turns, every run a new process.

`--help`, `data list`, and the default run until its first table, until its last program is compiled, and until its end;
with an empty cache of compiled programs and with that of the run before. Release 0.1.0 has no such cache.

Command:  python -m benchmarks.speed.startup --json benchmarks/speed/results/startup.json
          python -m benchmarks.speed.startup --quick                  (one turn of a run of one round)
Hardware: two CPU cores, quiet; 15 to 30 minutes
Expected: see benchmarks/speed/README.md
"""

import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import harness, script

ROOT = Path(__file__).parents[2]
RELEASE = "6d09100"
"""The commit of 0.1.0."""
MARKS = {"first table": "Clients under seed", "compiled": "Compiled one round"}
"""Stages of a run, and how the line begins that ends them; where several do, the last."""
COMMANDS = {"help": ["--help"], "data list": ["data", "list"]}
STAGES = (*COMMANDS, *MARKS, "end", "user CPU")


def check_out(folder: Path) -> Path:
    """Put the files of the release into a folder."""
    packed = subprocess.run(["git", "archive", RELEASE], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def watch(tree: Path, arguments: Sequence[str], cache: Path) -> dict[str, float]:
    """Run the command line of a tree; return the seconds until each stage and its end, and of user CPU."""
    unset = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PYTHONPATH": str(tree), "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(cache), "COLUMNS": "100"}
    begin, before, seen = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, {}
    command = [sys.executable, "-m", "autorank_jax", *arguments]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            for stage, words in MARKS.items():
                if line.startswith(words):
                    seen[stage] = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} in {tree} ended with {process.returncode}")
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    return {**seen, "end": time.perf_counter() - begin, "user CPU": cpu}


def measure(tree: Path, run: Sequence[str], cache: Path) -> dict[str, dict[str, float]]:
    """Start everything once: with an empty cache of compiled programs, and with what that leaves."""
    single = {stage: watch(tree, arguments, cache)["end"] for stage, arguments in COMMANDS.items()}
    return {"empty": single | watch(tree, run, cache), "filled": watch(tree, run, cache)}


def compare(turns: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]) -> list[harness.Row]:
    """Return a row for each version, cache and stage: median, spread, and 0.1.0's median over it."""
    rows: list[harness.Row] = []
    for version, found in turns.items():
        for cache in found[0]:
            for stage in (stage for stage in STAGES if stage in found[0][cache]):
                seconds = [turn[cache][stage] for turn in found]
                rows.append({"version": version, "cache": cache, "stage": stage, **harness.summary(seconds)})
    base = {(row["cache"], row["stage"]): row["median"] for row in rows if row["version"] == "0.1.0"}
    return [row | {"times faster": base[row["cache"], row["stage"]] / row["median"]} for row in rows]


def tables(content: script.Content) -> dict[str, str]:
    """Return the table of stored results: a row for each stage, both versions side by side, median ± spread."""
    found = {(row["stage"], row["cache"], row["version"]): row for row in content["rows"]}
    rows: list[harness.Row] = []
    for stage in STAGES:
        row: harness.Row = {"seconds": stage}
        for cache in ("empty", "filled"):
            ours = found.get((stage, cache, "working tree"))
            for version in ("0.1.0", "working tree"):
                one = found.get((stage, cache, version))
                name = {"0.1.0": "release 0.1.0"}.get(version, version)
                row[f"{name}, {cache} cache"] = one and f"{one['median']:.3g} ± {one['spread']:.2g}"
            row["times faster" if cache == "empty" else "times faster, filled"] = ours and ours["times faster"]
        rows.append(row)
    return {"start-up, seconds": harness.markdown_table(rows, list(rows[0]))}


@harness.mistakes_in_words()
def main() -> None:
    """Measure both versions in turns."""
    parser = script.make_parser(__doc__, quick="one turn of a run of one round", repeats=5)
    options = parser.parse_args()
    run = ["run", "--out", "out", *(["--rounds", "1"] if options.quick else [])]
    turns: dict[str, list[dict[str, dict[str, float]]]] = {"0.1.0": [], "working tree": []}
    with tempfile.TemporaryDirectory() as scratch:
        trees = {"0.1.0": check_out(Path(scratch) / "release"), "working tree": ROOT}
        for turn in range(1 if options.quick else options.repeats):
            for version, tree in trees.items():
                print(f"turn {turn + 1}: {version}", flush=True)
                turns[version].append(measure(tree, run, Path(scratch) / f"cache-{version}-{turn}"))
    content = {"rows": compare(turns), "repeats": len(turns["0.1.0"]), **script.about()}
    script.publish(content, options.json, tables, None)


if __name__ == "__main__":
    main()
