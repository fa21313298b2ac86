"""The tables of the studies in `benchmarks/README.md`, between markers: taken from `results/*.md`, never typed.

Command:  python benchmarks/readme.py            (after `paper.py` or `study.py`; a second)
          python benchmarks/readme.py --check    (exit status 1 where it does not say what they say)
Writes:   benchmarks/README.md
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from mixed_ranks import RUNS
from paper_tables import OTHERWISE, TARGETS
from plan import PICTURES

from benchmarks.harness import write_text

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
RESULTS = FOLDER / "results"
STUDY = (
    "AutoRank minus one rank at equal bytes",
    "AutoRank minus ranks by size at equal bytes",
    "Best pair",
)
"""Answers of the study that the README shows."""
CONFIRMED = "autorank + raflora minus"
"""What it shows of the confirmation: the recommended pair beside others."""


def sections(text: str, level: int) -> dict[str, str]:
    """Split Markdown at its headings of one level; what is before the first is left out."""
    parts = re.split(rf"^{'#' * level} (.+)\n", text, flags=re.MULTILINE)[1:]
    return {title: body.strip() for title, body in zip(parts[::2], parts[1::2], strict=True)}


def paper_block(results: Path) -> str:
    """Return the tables and pictures of `paper.py`, without the widest, which stay in `paper.md`."""
    found = []
    for title, body in sections(_text(results / "paper.md"), 2).items():
        parts = [f"#### {title}", body.split("\n### ")[0].strip()]
        for name, text in sections(body, 3).items():
            if name not in (TARGETS, OTHERWISE, RUNS):
                parts += [f"**{name}.** {text}"]
        stem = results / f"paper-{title.replace(', ', '-')}"
        for which in PICTURES:
            path = stem.with_name(f"{stem.name}-{which}.png" if which else f"{stem.name}.png")
            if path.exists():
                words = f" of the {which}" if which else ""
                link = path.relative_to(FOLDER).as_posix()
                parts.append(f"![{title}: accuracy{words} over rounds, FLOPs and bytes]({link})")
        found.append("\n\n".join(parts))
    return "\n\n".join(found)


def study_block(results: Path) -> str:
    """Return the answers of `study.py` that carry its recommendation."""
    answers = sections(_text(results / "study.md"), 3)
    confirmed = sections(_text(results / "study-confirm.md"), 3)
    shown = {name: answers[name] for name in STUDY if name in answers}
    shown |= {name: text for name, text in confirmed.items() if CONFIRMED in name}
    for title in (*STUDY, CONFIRMED):
        if not any(title in name for name in shown):
            raise SystemExit(f"{results}: expected the table {title!r} in study.md or study-confirm.md, got none")
    return "\n\n".join(f"**{name}.** {text}" for name, text in shown.items())


def _text(path: Path) -> str:
    """Read a file of results."""
    if not path.is_file():
        raise SystemExit(f"{path}: expected tables, got no file; probably `paper.py` or `study.py` has not been run")
    return path.read_text(encoding="utf-8")


def blocks(results: Path) -> Mapping[str, str]:
    """Return what belongs between the markers, by their names."""
    return {
        "paper tables": paper_block(results),
        "two cores tables": paper_block(results / "two_cores"),
        "study tables": study_block(results),
    }


def filled(text: str, content: Mapping[str, str]) -> str:
    """Return a text with every block between `<!-- name -->` and `<!-- end of name -->` replaced.

    Raises:
        ValueError: A pair of markers is not there.
    """
    for name, block in content.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if not 0 <= text.find(begin) < text.find(end):
            raise ValueError(f"README.md: expected the markers {begin} and {end}, in this order")
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n\n{block}\n\n{end}{rest.split(end, 1)[1]}"
    return text


def main(arguments: list[str] | None = None) -> None:
    """Write the README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    before = README.read_text(encoding="utf-8")
    after = filled(before, blocks(RESULTS))
    if options.check and before != after:
        raise SystemExit("README.md: expected the tables of results/, got others; run benchmarks/readme.py")
    if before != after:
        write_text(README, after)


if __name__ == "__main__":
    main()
