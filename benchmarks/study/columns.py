"""What `paper.py` runs: datasets, splits, and the columns that it compares, the most important first."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from autorank_jax.experiment import Experiment

AUTHOR = ("AutoRank + RBLA", "ranks by hand + RBLA", "uniform rank, AutoRank's bytes + RBLA",
          "uniform rank, AutoRank's bytes + FlexLoRA")  # fmt: skip
"""The columns that the first author's result files have, too."""


class Setting(NamedTuple):
    """How a dataset is run."""

    options: Mapping[str, Any]
    rounds: int
    targets: tuple[float, ...]
    author: tuple[float, ...] = ()  # best test accuracy in % of `AUTHOR`, single runs


DATASETS: Mapping[str, Setting] = {
    "fashion_mnist": Setting({}, 100, (0.6, 0.7, 0.75, 0.8, 0.85), (85.68, 84.79, 85.03, 86.64)),
    "mnist": Setting({}, 100, (0.7, 0.8, 0.9, 0.94), (96.15, 95.87, 94.53, 96.36)),
    "cifar10": Setting({"model": "deep_cnn"}, 200, (0.3, 0.4, 0.5, 0.55), (56.64, 55.03, 53.53, 31.01)),
    "cinic10": Setting({"model": "deep_cnn"}, 200, (0.25, 0.35, 0.45), (47.10, 45.61, 42.76, 20.29)),
    "fashion_mnist_mini": Setting({"rank_levels": 1}, 8, (0.3, 0.5)),
}
MIXED: Mapping[str, Any] = {"split": "dirichlet_lognormal", "sigma": 1.0}
SPLITS: Mapping[str, Mapping[str, Any]] = {
    "staircase": {"split": "staircase", "clients": 10},
    "dirichlet-0.1-10": MIXED | {"alpha": 0.1, "clients": 10},
    "dirichlet-0.4-10": MIXED | {"alpha": 0.4, "clients": 10},
    "dirichlet-0.1-100": MIXED | {"alpha": 0.1, "clients": 100},
    "dirichlet-0.4-100": MIXED | {"alpha": 0.4, "clients": 100},
    "central": {"split": "iid", "clients": 1},
}
STUDIED = STAIRCASE, RANDOM = "staircase", "dirichlet-0.4-10"
"""The two splits that every study has."""
FEW, MANY = "dirichlet-0.1-10", "dirichlet-0.4-100"
"""Of few classes a client, and of many clients."""


FULL_PROBE: Mapping[str, Any] = {"probe_epochs": 5, "probe_ratio": 1.0, "probe_share": 1.0}
"""As all experiments here were run, before `probes` found a cheaper one."""


class Group(NamedTuple):
    """Policies that one cell runs, under one rule, with the titles of their columns."""

    tier: int  # the lowest are run first
    rule: str
    titles: Mapping[str, str]  # by policy
    splits: tuple[str, ...] = tuple(name for name in SPLITS if name != "central")
    rates: tuple[str, str] | None = None  # group and policy at whose learning rate this one runs; else its own is tuned


GROUPS: Mapping[str, Group] = {
    "main": Group(
        0,
        "rbla",
        {
            "autorank": AUTHOR[0],
            "uniform_bytes": AUTHOR[2],
            "uniform": "uniform rank, AutoRank's FLOPs (probe not counted) + RBLA",
            "full": "full rank + RBLA",
        },
    ),
    "by_hand": Group(1, "rbla", {"manual": AUTHOR[1]}, (STAIRCASE,)),
    "flexlora": Group(1, "flexlora", {"uniform_bytes": AUTHOR[3], "autorank": "AutoRank + FlexLoRA"}),
    "raflora": Group(
        1, "raflora", {"uniform_bytes": "uniform rank, AutoRank's bytes + raFLoRA", "autorank": "AutoRank + raFLoRA"}
    ),
    "same_rate": Group(
        1, "rbla", {"autorank": "AutoRank at the uniform rank's learning rate + RBLA"}, rates=("main", "uniform_bytes")
    ),
    "same_rate_flexlora": Group(
        1,
        "flexlora",
        {"autorank": "AutoRank at the uniform rank's learning rate + FlexLoRA"},
        rates=("flexlora", "uniform_bytes"),
    ),
    "same_rate_raflora": Group(
        1,
        "raflora",
        {"autorank": "AutoRank at the uniform rank's learning rate + raFLoRA"},
        rates=("raflora", "uniform_bytes"),
    ),
    "capped": Group(1, "rbla", {"covered": "AutoRank, top ranks capped + RBLA"}),
    "by_size": Group(2, "rbla", {"by_size_bytes": "ranks by size, AutoRank's bytes + RBLA"}),
    "permuted": Group(
        2,
        "rbla",
        {"shuffled": "AutoRank's ranks, shuffled + RBLA", "reversed": "AutoRank's ranks, reversed + RBLA"},
        rates=("main", "autorank"),
    ),
    "fedavg": Group(3, "fedavg", {"full": "whole weights + FedAvg"}),
    "local": Group(3, "local_only", {"full": "clients alone, full rank"}),
    "central": Group(3, "rbla", {"full": "one client with all data, full rank"}, ("central",)),
    "central_whole": Group(3, "fedavg", {"full": "one client with all data, whole weights"}, ("central",)),
}


def _title(group: str, policy: str) -> str:
    return GROUPS[group].titles[policy]


CONTRASTS = (
    (_title("flexlora", "autorank"), _title("flexlora", "uniform_bytes")),
    (_title("raflora", "autorank"), _title("raflora", "uniform_bytes")),
    (_title("raflora", "autorank"), AUTHOR[2]),
    (_title("same_rate_flexlora", "autorank"), _title("flexlora", "uniform_bytes")),
    (_title("same_rate_raflora", "autorank"), _title("raflora", "uniform_bytes")),
    (_title("same_rate_raflora", "autorank"), AUTHOR[2]),
    (_title("same_rate", "autorank"), AUTHOR[2]),
    (_title("same_rate", "autorank"), AUTHOR[1]),
    (_title("capped", "covered"), AUTHOR[2]),
    (_title("capped", "covered"), _title("same_rate", "autorank")),
    (_title("capped", "covered"), _title("raflora", "autorank")),
)
"""Columns that are compared with each other, beside the first with all."""


class Job(NamedTuple):
    """One group on one split of one dataset."""

    dataset: str
    split: str
    group: str


def jobs(datasets: Sequence[str], splits: Sequence[str], groups: Sequence[str] = tuple(GROUPS)) -> Iterator[Job]:
    """Yield what to run: tier by tier, within a tier dataset by dataset."""
    for tier in sorted({GROUPS[name].tier for name in groups}):
        for dataset in datasets:
            for split in splits:
                for name in groups:
                    if GROUPS[name].tier == tier and split in GROUPS[name].splits:
                        yield Job(dataset, split, name)


def experiment_of(job: Job, **options: Any) -> Experiment:
    """Return the experiment of a job, for its first seed, with the options on top."""
    setting, group = DATASETS[job.dataset], GROUPS[job.group]
    clients = SPLITS[job.split]["clients"]
    by_hand = tuple(np.linspace(0.1, 1.0, clients).round(6).tolist()) if "manual" in group.titles else ()
    start = Experiment(
        dataset=job.dataset,
        rank_policies=tuple(group.titles),
        ratios=by_hand,
        aggregators=(group.rule,),
        rounds=setting.rounds,
        local_epochs=1,
        personal=True,
        rank_levels=4,
        **FULL_PROBE,
    )
    return dataclasses.replace(start, **{**setting.options, **SPLITS[job.split], **options})
