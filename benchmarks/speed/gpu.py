"""One accelerator, everything: agreement with the CPU, speed by lanes, a million clients, language models, options.

Every part runs in a process of its own under a limit of seconds, the most important first; each row is written as soon
as it is there, those of `speed` after a first turn of all. Called again on the same device with the same versions, it
goes on with the parts that are not finished; `--again` measures all anew.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.speed.gpu --json benchmarks/speed/results/gpu.json
          (`--rehearse`: all parts, tiny, on a CPU and without data)
Hardware: one GPU with JAX for CUDA; no network
Time:     at most `--seconds` (540), compilation included
Writes:   JSON after every row, in the end a picture beside it
"""

import argparse
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks import harness, script
from benchmarks.speed.gpu_parts import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEGABYTE = 1e6
COLUMNS: dict[str, dict[str, str]] = {
    "agreement": {
        "rule": "rule",
        "relative difference": "difference",
        "agrees": "agrees",
        "seconds to compile": "compile_seconds",
    },
    "speed": {
        "workload": "workload",
        "competitor": "competitor",
        "samples per second": "samples_per_second",
        "seconds per round": "seconds_per_round",
        "± seconds": "spread_seconds",
        "of centralised": "of_centralised",
        "seconds to compile": "compile_seconds",
        "MB by the compiler": "peak_mb",
        "difference": "difference",
        "choose_lanes' choice": "mark",
        "turns": "turns",
        "failed": "failed",
    },
    "scale": {
        "clients": "clients",
        "seconds per round": "seconds_per_round",
        "µs per example": "microseconds_per_example",
        "seconds to compile": "compile_seconds",
        "MB by the compiler": "peak_mb",
    },
    "language": {
        "workload": "workload",
        "competitor": "competitor",
        "lanes": "lanes",
        "ranks": "rank",
        "tokens a round": "tokens",
        "tokens per second": "tokens_per_second",
        "seconds per round": "seconds_per_round",
        "seconds to compile": "compile_seconds",
        "MB by the compiler": "peak_mb",
        "all finite": "finite",
    },
    "graphs": {
        "workload": "workload",
        "CUDA graphs": "graphs",
        "first run, seconds": "first_seconds",
        "seconds per round": "seconds_per_round",
        "equal bits": "equal_bits",
        "failed": "failed",
    },
    "precision": {
        "workload": "workload",
        "products": "precision",
        "seconds per round": "seconds_per_round",
        "relative difference": "difference",
    },
    "svd": {
        "side": "size",
        "algorithm": "algorithm",
        "seconds": "seconds",
        "relative difference": "difference",
        "failed": "failed",
    },
    "compilation": {
        "workload": "workload",
        "rank levels": "rank_levels",
        "seconds, cold": "cold_seconds",
        "seconds, warm": "warm_seconds",
    },
}
"""The table of each kind of part: heading and field."""


def run_part(part: str, *, rehearse: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """Run a part in its own process; yield what it prints, and in the end `{"end": reason}`, None where it finished."""
    command = [sys.executable, "-m", "benchmarks.speed.gpu_parts", part, *(["--rehearse"] if rehearse else [])]
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if rehearse else {})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    end, late, buffer = time.monotonic() + seconds, False, b""
    with process, selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while not late:
            late = not waiting.select(max(0.0, end - time.monotonic()))
            read = b"" if late else os.read(process.stdout.fileno(), 1 << 16)
            if not read:
                break
            *lines, buffer = (buffer + read).split(b"\n")
            yield from (json.loads(line) for line in lines if line.startswith(b"{"))
        if late:
            process.kill()
        code = process.wait()
    yield {"end": "out of time" if late else None if code == 0 else f"ended with exit code {code}"}


def measure(content: script.Content, options: argparse.Namespace) -> script.Content:
    """Run the parts that are not finished; `content` is written after every row."""
    begin = time.monotonic()
    content = begun(content, options)
    for part in options.parts:
        left = options.seconds - (time.monotonic() - begin)
        if part in content["finished"] or left <= 0:
            print(f"{part}: {'finished already' if left > 0 else 'no time left'}", flush=True)
            continue
        print(f"{part} …", flush=True)
        others = [row for row in content["rows"] if row["part"] != part]
        before = [row for row in content["rows"] if row["part"] == part]
        started, rows = time.monotonic(), list[harness.Row]()
        for said in run_part(part, rehearse=options.rehearse, seconds=min(left, options.most)):
            if "about" in said:
                content |= said["about"]
            elif "row" in said:
                rows = replaced(rows, {"part": part} | said["row"])
                content["rows"] = others + (before if len(rows) < len(before) else rows)
            elif said["end"] is None:
                content["rows"] = others + rows
                content["finished"].append(part)
                content["ended"].pop(part, None)
            else:
                content["ended"][part] = said["end"]
            harness.write_json(options.json, content)
        print(f"  {content['ended'].get(part, 'finished')}, {time.monotonic() - started:.0f} s", flush=True)
    return content


def begun(content: script.Content, options: argparse.Namespace) -> script.Content:
    """Return results to go on from: none, where those given are of another device, other versions, or a rehearsal."""
    fresh: script.Content = {"rows": [], "finished": [], "ended": {}, "rehearse": options.rehearse}
    if not content["rows"] or options.seconds <= 0:
        return fresh | content
    said = run_part("nothing", rehearse=options.rehearse, seconds=min(60, options.seconds))
    about = next((line["about"] for line in said if "about" in line), {})
    same = made(content) == made(fresh | about)
    if not same:
        print("what is there is of another device or version, or a rehearsal: beginning anew", flush=True)
    return content if same else fresh


def made(content: script.Content) -> Any:
    """Return what results depend on beside the code: rehearsal or not, versions, device."""
    device = {name: value for name, value in content.get("device", {}).items() if name != "date"}
    return content.get("rehearse"), content.get("versions"), device


def replaced(rows: list[harness.Row], row: harness.Row) -> list[harness.Row]:
    """Append a row in place of an earlier one of the same competitor, if any."""
    name = row.get("workload"), row.get("competitor")
    return [old for old in rows if name[1] is None or (old.get("workload"), old.get("competitor")) != name] + [row]


def tables(content: script.Content) -> dict[str, str]:
    """Lay out a table for each kind of part, and what did not finish."""
    found = {}
    for kind, columns in COLUMNS.items():
        rows = [prepared(row, content) for row in content["rows"] if row["part"].partition(" ")[0] == kind]
        if rows:
            found[kind] = script.table(rows, {h: f for h, f in columns.items() if any(f in row for row in rows)})
    if content["ended"]:
        found["not finished"] = "\n".join(f"- {part}: {why}" for part, why in content["ended"].items())
    return found


def prepared(row: harness.Row, content: script.Content) -> harness.Row:
    """Add what a table shows in other units."""
    row = row | ({"peak_mb": row["peak_bytes"] / MEGABYTE} if row.get("peak_bytes") else {})
    if "chosen" in row:
        yardstick = {r["workload"]: r["samples_per_second"] for r in content["rows"] if is_yardstick(r)}
        if row["workload"] in yardstick:
            row["of_centralised"] = row["samples_per_second"] / yardstick[row["workload"]]
        row["mark"] = "yes" if row["chosen"] else ""
    return row


def is_yardstick(row: harness.Row) -> bool:
    """Return whether a row is of the yardstick that was measured: one shared model, no clients."""
    return row.get("competitor") == "centralised" and "failed" not in row


def draw(content: script.Content) -> "Figure":
    """Draw speed relative to the yardstick by lanes, and seconds an example by clients."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # whose absence must stop no measurement

    from autorank_jax.cli.figures import PALETTE  # noqa: PLC0415

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rows = [prepared(row, content) for row in content["rows"]]
    names = list(dict.fromkeys(row["workload"] for row in rows if "of_centralised" in row))
    for number, name in enumerate(names):
        ours = [r for r in rows if r.get("workload") == name and "lanes" in r and "of_centralised" in r]
        colour = PALETTE[number % len(PALETTE)]
        left.plot([r["lanes"] for r in ours], [r["of_centralised"] for r in ours], marker="o", color=colour, label=name)
        for row in ours:
            if row["chosen"]:
                left.plot(row["lanes"], row["of_centralised"], "o", ms=10, mfc="none", color=colour)
    left.axhline(1, color="#888888", lw=0.8)
    left.set(xscale="log", xlabel="clients side by side (ring: the default)", ylabel="speed / speed without clients")
    if names:
        left.legend(frameon=False, fontsize=8)
    many = [row for row in rows if row["part"] == "scale"]
    right.plot(
        [r["clients"] for r in many], [r["microseconds_per_example"] for r in many], marker="o", color=PALETTE[0]
    )
    right.set(xscale="log", xlabel="clients", ylabel="µs per example")
    for axes in (left, right):
        axes.set_ylim(0, None)
    script.entitle(
        figure,
        "One accelerator: speed by lanes, and cost by clients",
        f"{script.hardware(content)}; medians of turns taken in one process for each workload.",
    )
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="all parts, tiny, on a CPU and without data")
    parser.add_argument("--json", type=script.Path, help="file for the results; the picture goes beside it")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=540, help="for all parts together, 540")
    parser.add_argument("--most", type=float, default=150, help="for one part, 150")
    parser.add_argument("--again", action="store_true", help="measure finished parts anew")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"expected parts among {', '.join(PARTS)}, got {', '.join(unknown)}")
    return options


@harness.mistakes_in_words()
def main() -> None:
    """Measure, print, write."""
    options = parse()
    content = {"rows": [], "finished": [], "ended": {}} | (script.read(options.json) if not options.again else {})
    content = measure(content, options)
    script.publish(content, options.json, tables, draw if content["rows"] else None)
    if wrong := [row["rule"] for row in content["rows"] if row.get("agrees") is False]:
        raise SystemExit(f"not what the CPU computes: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
