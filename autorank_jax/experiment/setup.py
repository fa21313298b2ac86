"""The clients, the model and the common start of an experiment, under each of its seeds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from autorank_jax import federated, models
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.datasets import Dataset
from autorank_jax.experiment.config import WHOLE_RULES, WIDTHS, Experiment
from autorank_jax.federated import partition
from autorank_jax.types import ClientStats, FederatedData, Key, Task


class Federation(NamedTuple):
    """The clients and the common start under one seed."""

    seed: int
    data: FederatedData
    task: Task
    stats: ClientStats
    keys: dict[str, Key]  # of training, probe and policies


def make_federations(experiment: Experiment, dataset: Dataset) -> list[Federation]:
    """Build the clients and the start of every seed; examples lie on the device once."""
    inputs, targets = jnp.asarray(dataset.x_train), jnp.asarray(dataset.y_train)
    federations = []
    for seed in experiment.all_seeds:
        options = {name: getattr(experiment, name) for name in ("alpha", "sigma", "classes_per_client")}
        parts = partition.partition(experiment.split, dataset.y_train, experiment.clients, seed=seed, **options)
        data = federated.from_parts(inputs, targets, parts, classes=dataset.classes)
        key = jax.random.key(seed)
        names = ("model", "adapters", "training", "probe", "policy")
        keys = {name: jax.random.fold_in(key, number) for number, name in enumerate(names)}
        task = make_task(experiment, dataset, model_key=keys["model"], adapter_key=keys["adapters"])
        stats = federated.client_stats(data, classes=dataset.classes)
        federations.append(Federation(seed, data, task, stats, keys))
    return federations


def make_task(experiment: Experiment, dataset: Dataset, *, model_key: Key, adapter_key: Key) -> Task:
    """Make the model of an experiment, with adapters on every layer, or trained whole where the rule does that.

    Trained whole beside adapters are biases and the scales of normalisation: a gain and a shift per channel.

    Raises:
        ValueError: if the model does not fit the shape of the examples.
    """
    rngs = nnx.Rngs(params=model_key)
    model, default = make_model(experiment, dataset.x_train.shape[1:], dataset.classes, rngs=rngs)
    if set(experiment.aggregators) & set(WHOLE_RULES):
        return task_from_nnx(model, max_rank={}, train_dense="*", key=adapter_key)
    given = experiment.max_ranks or tuple(default.values())
    given = given * len(default) if len(given) == 1 else given
    dense = ("*/bias", "norms/*/scale") if experiment.model == "deep_cnn" else "*/bias"
    ranks = dict(zip(default, given, strict=True))
    return task_from_nnx(model, max_rank=ranks, train_dense=dense, key=adapter_key)


def make_model(
    experiment: Experiment, shape: tuple[int, ...], classes: int, *, rngs: nnx.Rngs
) -> tuple[nnx.Module, dict[str, int]]:
    """Make the model that an experiment names, for examples of a shape, and the default maximum rank of every layer.

    Raises:
        ValueError: if the model does not fit the shape.
    """
    widths = experiment.hidden or WIDTHS[experiment.model]
    if experiment.model == "mlp":
        largest = [*(max(1, width * 4 // 5) for width in widths), max(1, widths[-1] // 2)]
        ranks = {f"layers/{number}": rank for number, rank in enumerate(largest)}
        return models.MLP((int(np.prod(shape)), *widths, classes), rngs=rngs), ranks
    smallest = 2 ** (len(widths) if experiment.model == "cnn" else len(widths) // 2)
    if len(shape) not in (2, 3) or min(shape[:2]) < smallest:
        raise ValueError(
            f"model: expected images of at least {smallest} pixels a side for {experiment.model}, got examples of "
            f"shape {shape}, probably a dataset for mlp, or too many convolutions in --hidden"
        )
    channels = (shape[2] if len(shape) == 3 else 1, *widths)
    ranks = {f"convs/{number}": width for number, width in enumerate(widths)} | {"head": widths[-1]}
    if experiment.model == "cnn":
        return models.CNN(channels, classes, image=(shape[0], shape[1]), rngs=rngs), ranks
    return models.DeepCNN(channels, classes, rngs=rngs), {p: max(1, rank // 2) for p, rank in ranks.items()}
