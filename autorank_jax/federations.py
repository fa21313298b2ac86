"""The clients, the model and the common start of an experiment, under each of its seeds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from autorank_jax import federated_data, models, partition, tasks
from autorank_jax.configuration import WHOLE_RULES, Experiment
from autorank_jax.datasets import Dataset
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
        data = federated_data.from_parts(inputs, targets, parts, classes=dataset.classes)
        key = jax.random.key(seed)
        names = ("model", "adapters", "training", "probe", "policy")
        keys = {name: jax.random.fold_in(key, number) for number, name in enumerate(names)}
        task = make_task(experiment, dataset, model_key=keys["model"], adapter_key=keys["adapters"])
        stats = federated_data.client_stats(data, classes=dataset.classes)
        federations.append(Federation(seed, data, task, stats, keys))
    return federations


def make_task(experiment: Experiment, dataset: Dataset, *, model_key: Key, adapter_key: Key) -> Task:
    """Make the model of an experiment, with adapters on every layer, or trained whole where the rule does that.

    Raises:
        ValueError: if the model does not fit the shape of the examples.
    """
    shape, rngs = dataset.x_train.shape[1:], nnx.Rngs(params=model_key)
    model: nnx.Module
    if experiment.model == "cnn":
        channels = experiment.hidden or (16, 32)
        if len(shape) not in (2, 3) or min(shape[:2]) < 2 ** len(channels):
            raise ValueError(
                f"model: expected images of at least {2 ** len(channels)} pixels a side for cnn, got examples of shape "
                f"{shape}, probably a dataset for mlp, or too many convolutions in --hidden"
            )
        colours = shape[2] if len(shape) == 3 else 1
        model = models.CNN((colours, *channels), dataset.classes, image=(shape[0], shape[1]), rngs=rngs)
        paths = [*(f"convs/{number}" for number in range(len(channels))), "head"]
        default = (*channels, channels[-1])
    else:
        hidden = experiment.hidden or (200, 200)
        model = models.MLP((int(np.prod(shape)), *hidden, dataset.classes), rngs=rngs)
        paths = [f"layers/{number}" for number in range(len(hidden) + 1)]
        default = (*(max(1, width * 4 // 5) for width in hidden), max(1, hidden[-1] // 2))
    if set(experiment.aggregators) & set(WHOLE_RULES):
        return tasks.task_from_nnx(model, max_rank={}, train_dense="*", key=adapter_key)
    widest = experiment.max_ranks or default
    widest = widest * len(paths) if len(widest) == 1 else widest
    return tasks.task_from_nnx(model, max_rank=dict(zip(paths, widest, strict=True)), key=adapter_key)
