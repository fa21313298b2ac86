"""Draw the pictures of speed/ and robustness/ anew from the stored results, and put their tables into the documents.

Command:  python -m benchmarks.report            (seconds; measures nothing)
          python -m benchmarks.report --check    (writes nothing; exit status 1 where a document has other tables)
Writes:   the documents of speed/ and robustness/ and the pictures in their results/
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from benchmarks import harness, script
from benchmarks.robustness import devices, faults
from benchmarks.speed import (
    gpu_program,
    imbalance,
    language_memory,
    language_rounds,
    rank_cost,
    rounds_report,
    scale,
    startup,
)

FOLDER = Path(__file__).parent
RESULTS: dict[str, dict[str, tuple[ModuleType, ...]]] = {
    "speed/README.md": {
        "rounds": (rounds_report,),
        "imbalance": (imbalance,),
        "scale": (scale,),
        "rank_cost": (rank_cost,),
    },
    "speed/startup.md": {"startup": (startup,)},
    "speed/gpu.md": {"gpu_program": (gpu_program, language_memory, language_rounds)},
    "robustness/README.md": {"devices": (devices,), "faults": (faults,)},
}
"""The stored results that each document shows, and whose `tables`, and `draw` if any, they are for."""


def stored(document: str) -> Iterator[tuple[Path, script.Content, ModuleType]]:
    """Yield the results that a document shows."""
    for name, modules in RESULTS[document].items():
        path = (FOLDER / document).parent / "results" / f"{name}.json"
        for module in modules:
            yield path, script.read(path), module


def filled(text: str, tables: Mapping[str, str]) -> str:
    """Return a text with the rows of every table replaced; a table is known by its headings.

    Raises:
        ValueError: A table is not there, or more than once.
    """
    lines = text.split("\n")
    for name, table in tables.items():
        headings = table.split("\n", 1)[0]
        if lines.count(headings) != 1:
            raise ValueError(f"expected the table {name!r} once in the document, with the headings {headings}")
        first = lines.index(headings)
        last = next(i for i in range(first, len(lines) + 1) if i == len(lines) or not lines[i].startswith("|"))
        lines[first:last] = table.split("\n")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Draw and write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    for document in RESULTS:
        tables: dict[str, str] = {}
        for path, content, module in stored(document):
            tables |= module.tables(content)
            if not options.check and hasattr(module, "draw"):
                script.write_picture(module.draw, content, path.with_suffix(".png"))
        file = FOLDER / document
        before = file.read_text(encoding="utf-8")
        after = filled(before, tables)
        if options.check and before != after:
            raise SystemExit(f"{file}: expected the tables of its results, got others; run it without --check")
        if before != after:
            harness.write_text(file, after)


if __name__ == "__main__":
    main()
