"""What the scripts of `speed/` and `robustness/` share: options, tables, pictures with captions, and results in files.

Such a script has two functions of its results: `tables(content)`, Markdown by name, and `draw(content)`, a picture. It
hands both to `publish` when it has measured; `python -m benchmarks.report` hands them the results that are stored.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness

if TYPE_CHECKING:  # a measurement needs no picture, and so no matplotlib
    from matplotlib.figure import Figure

Content = dict[str, Any]
"""Results as they are stored: rows, repeats, versions and device."""


def make_parser(doc: str | None, *, quick: str, repeats: int | None = None) -> argparse.ArgumentParser:
    """Make a command line with what every script has; `quick` says what is small then."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help=f"turns of each competitor, {repeats}")
    parser.add_argument("--quick", action="store_true", help=f"a small run without data: {quick}")
    parser.add_argument(
        "--json", type=Path, help="file for the results; the picture goes beside it; default: print only"
    )
    return parser


def about() -> Content:
    """Say what a measurement runs on."""
    return {"versions": harness.versions(), "device": harness.device()}


def publish(
    content: Content,
    path: Path | None,
    tables: Callable[[Content], Mapping[str, str]],
    draw: Callable[[Content], "Figure"] | None,
) -> None:
    """Print the tables; where there is a path, write the results there and draw their picture, if any, beside them."""
    for name, table in tables(content).items():
        print(f"\n{name}\n\n{table}", flush=True)
    if path is not None:
        harness.write_json(path, content)
    if path is not None and draw is not None:
        write_picture(draw, content, path.with_suffix(".png"))


def read(path: Path | None) -> Content:
    """Read stored results; nothing where there are none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Lay rows out as Markdown under headings that explain themselves: `{heading: field}`."""
    return harness.markdown_table([{h: row.get(f) for h, f in columns.items()} for row in rows], list(columns))


def hardware(content: Content) -> str:
    """Say in words what the results were measured on."""
    device = content["device"]
    cores = f"{device['cores']} CPU core{'s' * (device['cores'] > 1)}"
    where = cores if device["platform"] == "cpu" else device["kind"]
    return f"{where}, jax {content['versions']['jax']}, {device['date']}"


def entitle(figure: "Figure", title: str, caption: str) -> None:
    """Put the claim above a picture, and what it was measured on, and how often, below."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7.5, color="#555555")


def write_picture(draw: Callable[[Content], "Figure"], content: Content, path: Path) -> None:
    """Draw in the style of the package and write the picture, without the version of what drew it."""
    import matplotlib as mpl  # noqa: PLC0415

    from autorank_jax.cli.figures import STYLE  # noqa: PLC0415

    with mpl.rc_context(STYLE):
        figure = draw(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
