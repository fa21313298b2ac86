"""What sketches lose: the errors of a short trajectory, the runs that are compared, where it goes on."""

import json

import pytest

from benchmarks.study import sketch_error
from tests.aggregators import test_sketches


def test_all_rules_on_sketches_are_studied():
    assert set(sketch_error.SKETCHED) == test_sketches.SKETCHED


def test_accuracy_by_sketches_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    asked, file = [], tmp_path / "results.json"
    file.write_text(json.dumps({"rows": ["another kind"]}))

    def compare(_images, rule, split, **_bounds):
        asked.append(rule)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"rule": rule, "split": split} | dict.fromkeys(sketch_error.RUN_COLUMNS[3:], 1.0)

    monkeypatch.setattr(sketch_error, "compare", compare)
    arguments = ["--accuracy", "--quick", "--images", "1007", "--json", str(file)]
    with pytest.raises(SystemExit, match="what is finished is kept"):
        sketch_error.main(arguments)
    assert [row["rule"] for row in json.loads(file.read_text())["accuracy"]] == ["raflora", "flexlora"]
    sketch_error.main(arguments)
    assert asked == ["raflora", "flexlora", "florist", "florist", "lora_fair"]
    content = json.loads(file.read_text())
    assert content["rows"] == ["another kind"]
    assert {(row["rule"], row["images"]) for row in content["accuracy"]} == {(r, 1007) for r in sketch_error.SKETCHED}
    assert f"| {' | '.join(sketch_error.RUN_COLUMNS)} |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        sketch_error.main(["--accuracy", "--images", "0"])
    assert "argument --images: expected a whole number of at least 1000, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_sketches_of_real_training_are_close_to_the_best(tmp_path):
    sketch_error.main(["--quick", "--json", str(tmp_path / "results.json")])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["columns"] for row in rows] == [2, 4, 8, 16]
    assert all(row[when] > -1e-3 for row in rows for when in ("first %", "later %"))
    assert max(rows[-1]["first %"], rows[-1]["later %"]) < 0.5 < rows[0]["first %"]
