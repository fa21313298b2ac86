"""Robustness: what stops a modelled round, what faults leave behind, and pictures that can be read."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.robustness import devices, faults

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("seconds", "longest", "what"),
    [
        ((1.0, 1.0, 4e-4), False, ""),
        ((1.0, 1.0, 6e-4), False, "sum"),
        ((0.8, 0.9, 0.2), True, "sum"),
        ((0.5, 0.9, 0.1), True, "longest client"),
        ((0.5, 0.9, 0.1), False, ""),
    ],
)
def test_what_stops_a_round(seconds, longest, what):
    assert devices.stops_at(*seconds, longest=longest) == what


def test_nothing_stops_a_published_round_of_efficiency_one():
    rows = json.loads((ROOT / "benchmarks" / "robustness" / "results" / "devices.json").read_text())["modelled"]
    assert {row["stops_at"] for row in rows if f"{row['efficiency']:.3g}" == "1"} == {""}


def test_error_bars_of_rules_stand_beside_one_another():
    row = {f"{prefix}{share:.0%}": 50.0 for prefix in ("", "sd ") for share in faults.SHARES}
    rows = [row | {"rule": rule} for rule in faults.RULES]
    device = {"platform": "cpu", "kind": "cpu", "cores": 2, "date": "2026-01-01"}
    content = {"drop_out": rows, "rounds": 30, "seeds": 3, "device": device, "versions": {"jax": "0.10.2"}}
    lines = [container.lines[0] for container in faults.draw(content).axes[0].containers]
    places = np.sort(np.concatenate([line.get_xdata() for line in lines]))
    assert len(lines) == len(rows)
    assert np.diff(places).min() > 0.5
    assert np.abs(np.mean([line.get_xdata() for line in lines], axis=0) - 100 * np.array(faults.SHARES)).max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [("devices", "--workloads", "lognormal"), ("faults",), ("faults", "--soak")], ids="-".join
)
def test_scripts_run_quickly(script, tmp_path):
    results = tmp_path / "results.json"
    command = [
        sys.executable,
        "-m",
        f"benchmarks.robustness.{script[0]}",
        *script[1:],
        "--quick",
        "--json",
        str(results),
    ]
    subprocess.run(command, check=True, timeout=900, cwd=ROOT)
    content = json.loads(results.read_text())
    assert results.with_suffix(".png").exists() == (script[-1] != "--soak")
    if script[-1] == "--soak":
        row = content["soak"]["row"]
        assert row["finite"]
        assert row["compilations"] == 1
        assert row["live arrays at the end"] == row["live arrays after a tenth"]
        assert min(row["dropped"], row["excluded"], row["cut_short"]) > 0
