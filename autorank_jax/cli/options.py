"""The options of every command."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.language_options import LanguageOptions
from autorank_jax.experiment.launch_options import Launch

PROGRAM = "autorank-jax"


def bare(shown: str, **given: Any) -> Any:
    """Return a field that is given by words without an option before them."""
    return dataclasses.field(metadata={"bare": shown}, **given)


@dataclasses.dataclass(frozen=True)
class Run:
    """Score double-imbalanced clients, give each its LoRA rank, train them, and compare rank policies.

    Attributes:
        experiment: what to run
        launch: where to run it
        config: take the options from a run's config.json; others on the command line go before it
        resume: folder of a run to go on with from its latest checkpoint; a run of one policy, rule and seed also beyond
            its end, by more --rounds
        checkpoint_every: rounds between checkpoints, 0 = only when interrupted
        keep_checkpoints: how many of the latest checkpoints stay
        out: folder of the results; default runs/DATASET-SPLIT, with a number where that is taken
        overwrite: replace the run that the folder holds
        log: write every round as it happens: jsonl, tensorboard, or both
        quiet: print nothing but errors
        no_cache: neither keep nor look for compiled programs
    """

    experiment: Experiment = dataclasses.field(default_factory=Experiment)
    launch: Launch = dataclasses.field(default_factory=Launch)
    config: Path | None = None
    resume: Path | None = None
    checkpoint_every: int = 0
    keep_checkpoints: int = 3
    out: Path | None = None
    overwrite: bool = False
    log: tuple[str, ...] = ()
    quiet: bool = False
    no_cache: bool = False


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Train a language model by federated LoRA on clients' instructions, a rank for every client.

    Attributes:
        training: what to train
        resume: folder of a run to go on with from its latest checkpoint, also beyond its end, by more --rounds
        checkpoint_every: rounds between checkpoints, 0 = only when interrupted
        keep_checkpoints: how many of the latest checkpoints stay
        out: folder of the results; default runs/MODEL-DATA, with a number where that is taken
        overwrite: replace the run that the folder holds
        quiet: print nothing but errors
        no_cache: neither keep nor look for compiled programs
    """

    training: LanguageOptions = dataclasses.field(default_factory=LanguageOptions)
    resume: Path | None = None
    checkpoint_every: int = 1
    keep_checkpoints: int = 3
    out: Path | None = None
    overwrite: bool = False
    quiet: bool = False
    no_cache: bool = False


@dataclasses.dataclass(frozen=True)
class Compare:
    """Put several runs into one table and one picture.

    Attributes:
        runs: folders of runs, two or more
        output: file for the picture, FILE.png
    """

    runs: tuple[Path, ...] = bare("RUN", default=())
    output: Path = Path("comparison.png")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Score the clients of a table and give each its rank: for use with any other training stack.

    Attributes:
        criteria: CSV file with a header and one row per client, - for standard input; the first column may hold names
        max_rank: rank of the most complex client
        min_ratio: share of it that the least complex client gets
        columns: the criteria among the table's columns; default all but names, and but for results of a run
        cost: columns of which less means more complex; of all others more does
        normalization: how TOPSIS makes columns comparable: vector or minmax
        output: file for the ranks, FILE.csv or FILE.json, in place of tables
        json: print JSON in place of tables
    """

    criteria: Path
    max_rank: int = 64
    min_ratio: float = 0.1
    columns: tuple[str, ...] = ()
    cost: tuple[str, ...] = ()
    normalization: str = "vector"
    output: Path | None = None
    json: bool = False


@dataclasses.dataclass(frozen=True)
class Listing:
    """List the datasets and say for each whether it is there."""


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Convert a dataset into the folder of datasets, once: from TensorFlow Datasets, a folder of images, or a table.

    Attributes:
        name: what it is called: in TensorFlow Datasets, such as mnist or cifar100, or as you like with --source
        source: folder of images {train,test}/CLASS/*.png, as CINIC-10 has it, or of archives that need no download,
            or a table FILE.csv
        target: column of the table to predict, the last if not given
        overwrite: replace the file that is there
    """

    name: str = bare("NAME")
    source: Path | None = None
    target: str | None = None
    overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class Cache:
    """Say what is kept of compiled programs, from which later runs start at once, or empty the folder.

    Attributes:
        clear: delete all of them
    """

    clear: bool = False


Command = Run | Finetune | Compare | Ranks | Listing | Fetch | Cache
COMMANDS: Mapping[str, type[Any]] = {
    "run": Run, "finetune": Finetune, "compare": Compare, "ranks": Ranks, "data": Listing, "data fetch": Fetch,
    "cache": Cache,
}  # fmt: skip
"""All commands by the words that call them."""
