"""The README's finding: what the result files say, or a failure."""

import pytest

from benchmarks.study import claims
from benchmarks.study.paired import Difference


@pytest.fixture(scope="module")
def evidence():
    return claims.read()


def test_the_readme_says_what_the_result_files_say(evidence):
    family = claims.claims(evidence)
    assert claims.failures(family) == []
    text = claims.finding(evidence, family)
    assert claims.in_readme() == text
    assert len(text.splitlines()) <= 10


@pytest.mark.parametrize(
    ("says", "mean", "p", "seeds", "holds"),
    [
        ("higher", 0.02, 0.04, 5, True),
        ("higher", 0.02, 0.05, 5, False),
        ("higher", -0.02, 0.01, 5, False),
        ("lower", -0.02, 0.01, 5, True),
        ("lower", -0.02, 0.01, 4, False),
        ("open", 0.02, 0.05, 5, True),
        ("open", 0.02, 0.04, 5, False),
        ("open", 0.02, None, 5, False),
        ("open", 0.02, 0.5, 4, False),
    ],
)
def test_what_follows(says, mean, p, seeds, holds):
    assert claims.Claim("one", "here", says, Difference(mean, 0, 0, p, seeds)).holds(p) is holds
    assert not claims.Claim("one", "here", says, None).holds(p)


def test_all_claims_are_corrected_for():
    one = claims.Claim("one", "here", "higher", Difference(0.02, 0.01, 0.03, 0.02, 5))
    family = {"a": one, "b": one._replace(says="lower"), "c": one._replace(says="open"), "d": one._replace(found=None)}
    assert claims.corrected(family) == {"a": 0.06, "b": 0.06, "c": 0.06, "d": None}
    assert claims.failures(family) == ["one, here: not higher", "one, here: not lower", "one, here: not higher"]


def test_a_split_that_is_missing_leaves_nothing_to_claim(evidence):
    table, splits = evidence.first
    part = {point: runs for point, runs in table.items() if point.split == splits[0]}
    assert claims.claims(evidence)["size"].found
    assert claims.claims(evidence._replace(first=(part, splits)))["size"].found is None


def test_a_claim_that_does_not_follow_fails(evidence, monkeypatch, tmp_path, capsys):
    """Where the two sides of a comparison are exchanged, and where a file has no runs."""
    place = "fashion_mnist", "staircase"
    columns = dict(evidence.columns[place])
    columns[claims.FIRST], columns[claims.UNIFORM] = columns[claims.UNIFORM], columns[claims.FIRST]
    readme = tmp_path / "README.md"
    readme.write_text("# a\n\n## What the study says\n\nOld.\n\n![x](y)\n", encoding="utf-8")
    monkeypatch.setattr(claims, "README", readme)
    with monkeypatch.context() as patch:
        patch.setattr(claims, "read", lambda: evidence._replace(columns={**evidence.columns, place: columns}))
        with pytest.raises(SystemExit, match=r"RBLA, Fashion-MNIST, staircase, 100 rounds: not lower"):
            claims.main(["--write"])
        patch.setattr(claims, "read", lambda: evidence._replace(flops=[]))
        with pytest.raises(SystemExit, match="same FLOPs"):
            claims.main(["--write"])
    assert claims.in_readme() == "Old."
    capsys.readouterr()
    monkeypatch.setattr(claims, "read", lambda: evidence)
    claims.main(["--write"])
    assert claims.in_readme() == capsys.readouterr().out.rpartition("\n\n")[2].rstrip("\n")
    assert readme.read_text(encoding="utf-8").startswith("# a\n\n## What the study says\n\nOn Fashion")
