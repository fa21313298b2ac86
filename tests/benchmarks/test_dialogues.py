"""The study of dialogues: what is planned, run, resumed and reported."""

import json

import numpy as np
import pytest

from benchmarks.study import dialogues
from benchmarks.study.paired import in_points

ROWS = [{"perplexity": 40.0}, {"perplexity": 20.0}]


def summary(perplexity):
    told = {"mean": perplexity, "worst": 2 * perplexity}
    return {
        "perplexity": {"before": 40.0, "after": perplexity}, "clients_perplexity": {"before": told, "after": told},
        "bytes_up": 2e6, "bytes_down": 3e6, "flops": 4e12, "probe_flops": 1e12,
        "seconds": 1800.0,
        "clients": [
            {"name": "a", "rank": 2, "after": perplexity}, {"name": "b", "rank": 2, "after": 2 * perplexity},
            {"name": "c", "rank": 5, "after": None},
        ],
    }  # fmt: skip


def test_what_is_finished_is_not_run_again(tmp_path, monkeypatch, capsys):
    ran = []

    def run_cell(folder, name, options):  # noqa: ARG001
        ran.append(name)
        return {"options": dialogues.described(options), "rows": ROWS, "summary": summary(20.0)}

    monkeypatch.setattr(dialogues, "run_cell", run_cell)
    monkeypatch.setattr(dialogues, "plan", lambda left, total: f"{len(left)} of {total} cells")
    words = ["--quick", "--out", str(tmp_path)]
    dialogues.main([*words, "--plan"])
    assert ran == []
    dialogues.main([*words, "--cells", "uniform_bytes-*"])
    with (tmp_path / "dialogues.jsonl").open("a") as file:
        file.write('{"cell": "autorank-rbla-0", "opt')  # cut short
    dialogues.main(words)
    assert ran == ["uniform_bytes-rbla-0", "autorank-rbla-0"]
    said = capsys.readouterr().out
    assert "1 of 2 cells" in said
    assert (
        "| uniform_bytes-rbla-0 | 40 | 20 | 20 | 40 | – | 40 20 | 2: 2, 5: 1 | 2 | 3 | 4 | 1 | 0.5 |"
        in said.splitlines()
    )


def test_cells_of_other_options_are_kept(tmp_path):
    options = dialogues.grid(dialogues.parse(["--quick", "--out", str(tmp_path)]))["uniform_bytes-rbla-0"]
    found = {"uniform_bytes-rbla-0": {"options": dialogues.described(options)}}
    del found["uniform_bytes-rbla-0"]["options"]["quantize"]  # as before there was the option
    assert dialogues.is_finished(found, "uniform_bytes-rbla-0", options, 1.0)
    with pytest.raises(SystemExit, match=r"of share 0\.5, got one of 1\.0"):
        dialogues.is_finished(found, "uniform_bytes-rbla-0", options, 0.5)
    found["uniform_bytes-rbla-0"]["options"]["rounds"] = 7
    with pytest.raises(SystemExit, match="expected uniform_bytes-rbla-0 of rounds 1, got one of 7"):
        dialogues.is_finished(found, "uniform_bytes-rbla-0", options, 1.0)
    with pytest.raises(SystemExit, match="expected --data FOLDER"):
        dialogues.parse(["--out", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_rehearsal(tmp_path, capsys):
    dialogues.main(["--quick", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "2 of 2 cells at " in said
    cells = [json.loads(line) for line in (tmp_path / "dialogues.jsonl").read_text().splitlines()]
    assert [cell["cell"] for cell in cells] == ["autorank-rbla-0", "uniform_bytes-rbla-0"]
    assert cells[0]["summary"]["perplexity"]["before"] == cells[1]["summary"]["perplexity"]["before"]
    assert cells[0]["summary"]["ranks"]["most"] > cells[1]["summary"]["ranks"]["most"]
    dialogues.main(["--quick", "--out", str(tmp_path)])
    assert "2 cells, all of them finished" in capsys.readouterr().out


def test_mistakes_end_in_one_line_and_odd_lines_are_left_out(tmp_path):
    """Real dialogues have some lines without a question or an answer."""
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "model.safetensors").write_bytes(b"")
    (tmp_path / "dialogues.jsonl").write_text('{"category": "a", "instruction": "", "output": "b"}\n')
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert all(one.skip_odd_lines for one in dialogues.grid(dialogues.parse(arguments)).values())
    with pytest.raises(SystemExit, match="expected instructions in"):
        dialogues.main(arguments)


def test_a_share_leaves_clients_as_uneven(tmp_path):
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "model.safetensors").write_bytes(b"")
    sizes = {"a": 80, "b": 5, "c": 12}
    pairs = [(name, n) for name, size in sizes.items() for n in range(size)]
    lines = [f'{{"category": "{name}", "instruction": "{n}?", "output": "é\u2028"}}' for name, n in pairs]
    (tmp_path / "dialogues.jsonl").write_text("\n".join(["", "{", *lines, ""]), encoding="utf-8")
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--share", "0.25"]
    (path,) = {one.data for one in dialogues.grid(dialogues.parse(arguments)).values()}
    kept = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [sum(one["category"] == name for one in kept) for name in sizes] == [20, 5, 8]
    assert [one["instruction"] for one in kept[:20]] == [f"{n}?" for n in range(0, 80, 4)]
    with pytest.raises(SystemExit, match="--share: expected a number above 0 and at most 1, got 25, probably a perc"):
        dialogues.parse([*arguments, "--share", "25"])
    with pytest.raises(SystemExit, match=r"at most 1, got 0$"):
        dialogues.parse([*arguments, "--share", "0"])
    with pytest.raises(SystemExit, match="--quick: expected neither"):
        dialogues.parse(["--quick", "--out", str(tmp_path), "--probe-epochs", "0"])


def test_seeds_are_compared_by_the_means_of_their_clients():
    cells = {}
    for seed, factor in enumerate((1.0, 1.2, 1.5)):
        for name in ("autorank", "uniform_bytes"):
            made = summary(20.0)
            for client in made["clients"]:
                client["after"] = client["after"] and client["after"] * (factor if name == "autorank" else 1)
            cells[f"{name}-raflora-{seed}"] = {"rows": ROWS, "summary": made}
    found = dialogues.over_seeds("autorank", "raflora", cells | {"autorank-raflora-3": cells["autorank-raflora-0"]})
    logs = np.log([1.0, 1.2, 1.5])
    assert found.seeds == 3
    assert found.mean == pytest.approx(np.expm1(logs.mean()))
    assert found.high == pytest.approx(np.expm1(logs.mean() + 4.303 * logs.std(ddof=1) / np.sqrt(3)), rel=1e-3)
    assert dialogues.over_seeds("autorank", "rbla", cells) is None
    for seed, factor in enumerate((0.9, 0.8, 0.7)):
        cells[f"autorank-raflora-{seed}"]["summary"]["perplexity"]["after"] *= factor
    whole = dialogues.over_seeds("autorank", "raflora", cells, dialogues.all_answers)
    assert whole.mean == pytest.approx(np.cbrt(0.9 * 0.8 * 0.7) - 1)


def test_clients_are_compared_with_themselves_under_one_rank(tmp_path, monkeypatch, capsys):
    cells = {
        name: {"rows": ROWS, "summary": summary(20.0)}
        for name in ("uniform_bytes-rbla-0", "autorank-rbla-0", "full-flora-0")
    }
    for client, factor in zip(cells["autorank-rbla-0"]["summary"]["clients"], (1.0, 1.2, None), strict=True):
        client["after"] = client["after"] and client["after"] * factor
    assert in_points(dialogues.beyond("autorank-rbla-0", cells)) == "+9.5 (n = 2)"  # exp(half of ln 1.2) - 1
    assert dialogues.beyond("uniform_bytes-rbla-0", cells) is None
    assert dialogues.beyond("full-flora-0", cells) is None
    published = tmp_path / "texts.json"
    monkeypatch.setattr(dialogues, "PUBLISHED", published)
    published.write_text('{"another": 1}')
    for name, cell in cells.items():
        dialogues.append(tmp_path / "dialogues.jsonl", name, cell)
    dialogues.main(["--out", str(tmp_path), "--report", "--publish"])
    said = capsys.readouterr().out
    listed = [{"cell": name, **cell} for name, cell in cells.items()]
    assert json.loads(published.read_text()) == {"another": 1, "dialogues": listed}
    dialogues.main(["--report"])
    assert capsys.readouterr().out == said
    with pytest.raises(SystemExit, match="--out: expected a folder of results, got none"):
        dialogues.main(["--quick"])
