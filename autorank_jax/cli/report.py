"""A run's report: one HTML file with its tables, pictures and options, which needs no other file."""

import base64
import html
from collections.abc import Iterable, Iterator, Mapping

from rich.table import Table

from autorank_jax.cli.tables import about, comparison_tables, footnotes, scores_table
from autorank_jax.experiment.doubts import doubts
from autorank_jax.experiment.results import Results

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: 13px; } th { text-align: right; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } td { text-align: right; }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #e4e4e4; white-space: pre-wrap; }
.wide { overflow-x: auto; } .note { color: #555; font-size: 13px; } .stopped { color: #b00020; }
"""


def html_report(results: Results, pictures: Mapping[str, bytes]) -> bytes:
    """Return the report.

    Args:
        results: of `run_experiment`.
        pictures: PNG files by what they show.
    """
    config = results.config
    title = f"{config['dataset']}, {config['split']}, {config['clients']} clients"
    body = "\n".join(_body(results, pictures))
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{meta}<title>{html.escape(title)}</title><style>{STYLE}</style>"
    page = f"<html lang=en><head>{head}</head>\n<body>\n<h1>{_text(title)}</h1>\n{body}\n</body></html>"
    return f"<!doctype html>\n{page}\n".encode()


def _body(results: Results, pictures: Mapping[str, bytes]) -> Iterator[str]:
    yield f'<p class="note">{_text(about(results))}</p>'
    if results.stopped:
        yield f'<p class="stopped">Ended before its time: {_text(results.stopped)}</p>'
    for table in comparison_tables(results):
        yield _table(table)
    for line in footnotes(results):
        yield f'<p class="note">{_text(line)}</p>'
    for name, content in pictures.items():
        yield f"<h2>{_text(name)}</h2>"
        yield f'<img alt="{_text(name)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
    for scores in results.scores:
        yield _table(scores_table(scores))
        for line in doubts(scores):
            yield f'<p class="note">{_text(line)}</p>'
    yield "<h2>Options</h2>"
    yield _rows([name.replace("_", "-"), _value(value)] for name, value in results.config.items())
    machine = {"device": results.device, **results.versions}
    yield "<h2>Where it ran</h2>"
    yield _rows([name, value] for name, value in machine.items())


def _table(table: Table) -> str:
    """Return a table of the terminal as one of HTML."""
    columns = [list(column.cells) for column in table.columns]
    head = "".join(f"<th>{_text(str(column.header))}</th>" for column in table.columns)
    note = f'<p class="note">{_text(str(table.caption))}</p>' if table.caption else ""
    rows = _rows(zip(*columns, strict=True), head)
    return f"<h2>{_text(str(table.title))}</h2>\n{rows}{note}"


def _rows(rows: Iterable[Iterable[object]], head: str = "") -> str:
    lines = "\n".join("<tr>" + "".join(f"<td>{_text(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table>{f'<tr>{head}</tr>' if head else ''}\n{lines}\n</table></div>"


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _text(text: str) -> str:
    return html.escape(text, quote=True)
