"""From a command to what does it: each command loads its own modules alone, only `run`, `finetune` and `ranks` JAX."""

import importlib

from autorank_jax.cli import cache
from autorank_jax.cli.options import PROGRAM, Cache, Command, Compare, Fetch, Finetune, Listing, Ranks, Run
from autorank_jax.cli.tables import datasets_table, make_console
from autorank_jax.cli.terminal import counted, warn
from autorank_jax.datasets import available_datasets, cache_folder, fetch_dataset
from autorank_jax.datasets.tables import is_table


def execute(command: Command) -> None:
    """Do what a command says."""
    match command:
        case Cache(clear):
            found = cache.empty() if clear else cache.held()
            programs = counted(found.programs, "compiled program")
            what = f"{programs}, {found.bytes / 1e6:.1f} MB, in {cache.program_folder()}"
            make_console().print(f"Deleted {what}" if clear else what, soft_wrap=True)
            if why := cache.out_of_use():
                warn(f"{cache.program_folder()} is {why}")
        case Run():
            importlib.import_module("autorank_jax.cli.running").run(command)
        case Finetune():
            importlib.import_module("autorank_jax.cli.finetuning").finetune(command)
        case Compare():
            importlib.import_module("autorank_jax.cli.comparing").compare(command)
        case Ranks():
            importlib.import_module("autorank_jax.cli.scoring").score_table(command)
        case Fetch() as fetch:
            path = fetch_dataset(fetch.name, source=fetch.source, target=fetch.target, overwrite=fetch.overwrite)
            make_console().print(f"{path} is complete", soft_wrap=True)
            if fetch.source is not None and is_table(fetch.source):
                make_console().print(
                    f"{PROGRAM} run --dataset {fetch.name} --split dirichlet_lognormal trains on it", soft_wrap=True
                )
        case Listing():
            console = make_console()
            console.print(datasets_table(available_datasets()))
            console.print(f"Files are looked for in {cache_folder()}", soft_wrap=True)
            console.print(
                f"{PROGRAM} data fetch NAME gets what is not there, with --overwrite what is damaged",
                soft_wrap=True,
            )
