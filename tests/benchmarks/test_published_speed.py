"""What the documents of speed and robustness say is what the stored results hold."""

import re
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]


def text_of(document):
    text = (ROOT / "benchmarks" / document).read_text(encoding="utf-8")
    return text, re.sub(r"\s+", " ", text)


def stored(document):
    return {path.stem: content for path, content, _ in report.stored(document)}


@pytest.mark.parametrize("document", report.RESULTS)
def test_tables_are_those_of_the_results(document):
    text, _ = text_of(document)
    tables = {}
    for _, content, module in report.stored(document):
        tables |= module.tables(content)
    assert report.filled(text, tables) == text
    changed = text.replace("| 0.", "| 9.").replace("| rbla | 64 |", "| rbla | 65 |")
    assert changed != text
    assert report.filled(changed, tables) == text


def test_a_table_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="expected the table 'speeds' once"):
        report.filled("| a |\n|---|\n| 1 |", {"speeds": "| b |\n|---|\n| 1 |"})


@pytest.mark.parametrize("document", [name for name in report.RESULTS if name.endswith("README.md")])
def test_pictures_say_what_they_were_measured_on_and_how_often(document):
    for _, content, module in (one for one in report.stored(document) if hasattr(one[2], "draw")):
        caption = module.draw(content).get_supxlabel()
        assert f"CPU core{'s' * (content['device']['cores'] > 1)}, jax 0.10.2, 2026-11-2" in caption
        assert re.search(r"\d (turns|rounds|seeds)", caption)


def test_numbers_in_the_text_on_speed_are_those_of_the_results():
    results, (_, text) = stored("speed/README.md"), text_of("speed/README.md")
    ratios = results["rounds"]["ratios"]
    simulators = ("drjax", "fedjax", "pfl", "flower", "torch", "torch_vmap")
    assert all(of[name] > 1 for of in ratios.values() for name in simulators if name in of)
    central = [of["centralised"] for of in ratios.values()]
    padded = [ratios[workload][name] for workload in ("staircase", "lognormal") for name in ("lockstep", "drjax")]
    assert f"reaches {min(central):.2g} to {max(central):.2g} of `centralised`" in text
    assert f"{min(padded):.2g} to {max(padded):.2g} times slower" in text
    assert f"`ours` is still {ratios['equal']['lockstep']:.2g} times as fast as `lockstep`" in text
    each = {row["clients"]: row for row in results["scale"]["rows"]}
    million, thousand = (each[n]["seconds_per_million_examples"] for n in (10**6, 10**3))
    assert f"cost {million / thousand:.3g} times as much per example as a thousand" in text
    beyond = (each[10**6]["round_bytes"] - each[10**4]["round_bytes"]) / (10**6 - 10**4)
    assert beyond == pytest.approx(130, rel=0.05)
    half = next(r for r in results["rank_cost"]["rows"] if r["ranks"] == "0.5" and r["rank_levels"] == 4)
    assert (
        f"half the rank costs {half['seconds_share']:.2g} of a round, where the FLOPs are {half['flops_share']:.2g}"
        in text
    )


def test_numbers_in_the_text_on_robustness_are_those_of_the_results():
    results, (_, text) = stored("robustness/README.md"), text_of("robustness/README.md")
    lost = {row["rule"]: row["0%"] - row["50%"] for row in results["faults"]["drop_out"]}
    first = lost.pop("rbla")
    said = f"`rbla` loses {first:.1f} points, the other rules {min(lost.values()):.0f} to {max(lost.values()):.0f}"
    assert said in text
    even = next(r for r in results["devices"]["counted"] if r["workload"] == "lognormal" and r["devices"] == 8)
    assert even["busiest_over_mean_cost"] == pytest.approx(1, abs=0.01)
