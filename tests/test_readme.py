"""The README's code runs, and links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, len(SNIPPETS)))])
def test_snippets_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), names)
    if "history" in names:
        accuracy = names["history"].metrics["accuracy"]
        assert accuracy.shape == (5,)
        assert accuracy[-1] > 0.4  # ten classes: it learns
    if "ranks" in names and "label_counts" in names:
        assert names["ranks"].shape == (3,)
        assert 1 <= names["ranks"].min() <= names["ranks"].max() == 64


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CHANGELOG.md",
        *(f"benchmarks/{folder}README.md" for folder in ("", "speed/", "study/", "robustness/")),
    ],
)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def anchors(text):
    """Return the anchors of a Markdown file's headings."""
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
