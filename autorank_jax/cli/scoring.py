"""The command `ranks`: the clients of a table scored, and the rank of each."""

import functools
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from autorank_jax.cli.folders import ReportError, is_of_a_run
from autorank_jax.cli.formats import to_csv, to_json, write_file
from autorank_jax.cli.options import Ranks
from autorank_jax.cli.tables import criteria_table, make_console
from autorank_jax.cli.terminal import warn
from autorank_jax.experiment.doubts import little_variation
from autorank_jax.experiment.mistakes import ConfigurationError, outside, unknown
from autorank_jax.ranks import mcda, policies
from autorank_jax.ranks.table_file import read_criteria
from autorank_jax.types import Array

ENDINGS = (".csv", ".json")
MOST_RANK = 2**20
"""Of which float32 still holds every product with a ratio to less than a rank."""


def score_table(command: Ranks) -> None:
    """Score the clients of a criteria file, and print or write their ranks."""
    problems = [
        *outside("max_rank", command.max_rank, 1, MOST_RANK, whole=True),
        *outside("min_ratio", command.min_ratio, 0, 1, open_start=True, cause="a percentage"),
        *unknown("normalization", [command.normalization], mcda.NORMALIZATIONS),
        *_output_problems(command),
    ]
    if problems:
        raise ConfigurationError(problems)
    table = read_criteria(command.criteria, cost=command.cost, columns=command.columns)
    for remark in table.remarks:
        warn(remark)
    if little := little_variation(table.criteria, table.matrix):
        warn(f"{little}; consider one rank for all clients")
    if len(table.clients) == 1:
        warn("one client has none to be compared with: its score and rank say nothing")
    with jax.enable_x64(True):
        scored = _score(command.normalization, command.min_ratio, command.max_rank, table.matrix, table.benefit)
    weights, *found = map(np.asarray, scored)
    named = dict(zip(table.criteria, weights.tolist(), strict=True))
    keys = ("client", "closeness", "ratio", "rank")
    rows = zip(table.clients, *(column.tolist() for column in found), strict=True)
    content = {
        "weights": named,
        "clients": [dict(zip(keys, row, strict=True)) for row in rows],
        "max_rank": command.max_rank,
        "min_ratio": command.min_ratio,
    }
    if command.output is not None:
        _write(command.output.expanduser(), content)
    if command.json:
        sys.stdout.write(to_json(content).decode())
    elif command.output is None:
        console = make_console()
        for shown in criteria_table(table.clients, named, *found):
            console.print(shown)


# One program, as a hundred small ones take seconds to compile; and as it is written, since to optimise it takes longer
# than it saves, and would contract products and sums, so that a closeness of 0 is none.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options={"xla_backend_optimization_level": 0})
def _score(
    normalization: str, min_ratio: float, max_rank: int, matrix: ArrayLike, benefit: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    """Return the weights of the criteria, and closeness, ratio and rank of every client."""
    weights = mcda.critic_weights(matrix, benefit=benefit)
    closeness = mcda.topsis(matrix, weights, benefit=benefit, normalization=normalization)
    ratios = policies.ratios_from_scores(closeness, min_ratio=min_ratio)
    return weights, closeness, ratios, policies.ranks_from_ratios(ratios, {"rank": max_rank})["rank"]


def _output_problems(command: Ranks) -> Iterable[str]:
    if command.output is None:
        return
    output, criteria = command.output.expanduser(), command.criteria.expanduser()
    if output.suffix.lower() not in ENDINGS:
        yield f"output: expected a file that ends in {' or '.join(ENDINGS)}, got {output}"
    elif os.path.isdir(output) or (os.path.exists(output) and os.path.exists(criteria) and output.samefile(criteria)):
        yield f"output: expected a file of its own, got {output}"
    elif is_of_a_run(output):
        yield f"output: expected a file of its own, got {output}, which belongs to a run"


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write the ranks as the ending says: JSON with all that was found, or a row per client."""
    try:
        write_file(path, to_csv(content["clients"]) if path.suffix.lower() == ".csv" else to_json(content))
    except OSError as error:
        raise ReportError(f"output: expected to write {path}, got: {error.strerror or error}") from error
