"""What an experiment begins with: examples, the clients and the model of every seed, and what happens in a round."""

import math
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from autorank_jax import aggregators, datasets, federated, models
from autorank_jax.adapters import classification_loss, regression_loss, task_from_nnx
from autorank_jax.adapters.lora import key_of
from autorank_jax.aggregators.privacy import PrivateState
from autorank_jax.datasets import Dataset
from autorank_jax.engine import choose_lanes, init_state
from autorank_jax.evaluation.metrics import Metrics, classification_metrics, regression_metrics
from autorank_jax.experiment.config import WIDTHS, ConfigurationError, Experiment
from autorank_jax.experiment.names import WHOLE_RULES
from autorank_jax.experiment.quick import jit_once
from autorank_jax.federated import everyone, faults, partition, sample_by_size, sample_independently, sample_uniformly
from autorank_jax.federated.participation import Participation
from autorank_jax.types import Aggregator, Array, ClientStats, FederatedData, Key, Server, State, Task, Trainable

WIDE = 4096
"""Narrower layers fit everywhere."""


BINS = 10
"""Of the targets of a regression, which stand for classes in splits and criteria."""


class Federation(NamedTuple):
    """The clients and the start that all policies and rules share under one seed."""

    seed: int
    data: FederatedData
    task: Task
    stats: ClientStats
    keys: dict[str, Key]  # of model, adapters, training, probe and policy


def load_data(experiment: Experiment) -> Dataset:
    """Load the examples; where a share is held out for validation, it takes the place of the test set.

    Raises:
        DatasetError: for a missing or damaged dataset.
    """
    return with_validation(datasets.load_dataset(experiment.dataset), experiment.validation)


def with_validation(dataset: Dataset, share: float) -> Dataset:
    """Put a share of the training examples, evenly spaced, in the place of the test set; do nothing where it is 0."""
    if not share:
        return dataset
    place = np.floor(share * np.arange(len(dataset.y_train) + 1) * (1 + 1e-12))
    held = np.diff(place) > 0
    x, y = dataset.x_train, dataset.y_train
    return dataset._replace(x_train=x[~held], y_train=y[~held], x_test=x[held], y_test=y[held])


def make_federations(experiment: Experiment, dataset: Dataset) -> list[Federation]:
    """Split the examples over the clients and make the model, under every seed; examples lie on the device once.

    Raises:
        ConfigurationError: if examples, clients and model do not fit together.
    """
    if not dataset.classes and experiment.personal:
        raise ConfigurationError([f"personal: expected a dataset with classes, got {dataset.name}, a regression"])
    if experiment.split == "staircase" and experiment.clients != (dataset.classes or BINS):
        raise ConfigurationError(
            [
                f"clients: expected {dataset.classes or BINS} on the staircase split, one for each class, got "
                f"{experiment.clients}; --split dirichlet_lognormal takes any number"
            ]
        )
    inputs, targets, classes = jnp.asarray(dataset.x_train), jnp.asarray(dataset.y_train), dataset.classes or None
    labels = dataset.y_train if classes else partition.bins(dataset.y_train)
    options = {name: getattr(experiment, name) for name in ("alpha", "sigma", "classes_per_client")}
    federations, start = [], make_start(experiment, dataset)
    try:
        for seed in experiment.all_seeds:
            parts = partition.partition(experiment.split, labels, experiment.clients, seed=seed, **options)
            data = federated.from_parts(inputs, targets, parts, classes=classes)
            keys, task = start(jax.random.key(seed))
            stats = federated.client_stats(data, groups=labels, classes=classes)
            federations.append(Federation(seed, data, task, stats, keys))
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError([str(error)]) from error
    return federations


def make_start(experiment: Experiment, dataset: Dataset) -> Callable[[Key], tuple[dict[str, Key], Task]]:
    """Return the function of a seed's key that derives its keys and makes its model, in one program for all seeds."""
    made: list[Task] = []

    @jit_once
    def draw(key: Key) -> tuple[dict[str, Key], Server]:
        names = ("model", "adapters", "training", "probe", "policy")
        keys = {name: jax.random.fold_in(key, number) for number, name in enumerate(names)}
        task = make_task(experiment, dataset, model_key=keys["model"], adapter_key=keys["adapters"])
        made.append(task._replace(server=Server(Trainable({}, ()), ())))  # the functions alone leave the trace
        return keys, task.server

    def start(key: Key) -> tuple[dict[str, Key], Task]:
        keys, server = draw(key)
        return keys, made[0]._replace(server=server)

    return start


def make_task(experiment: Experiment, dataset: Dataset, *, model_key: Key, adapter_key: Key) -> Task:
    """Make the model of an experiment, with adapters on every layer, or trained whole where the rule does that.

    Trained whole beside adapters are biases and the scales of normalisation: a gain and a shift per channel.

    Raises:
        ValueError: if the model does not fit the shape of the examples.
    """
    _check_memory(experiment, dataset)
    rngs = nnx.Rngs(params=model_key)
    model, default = make_model(experiment, dataset.x_train.shape[1:], outputs_of(dataset), rngs=rngs)
    loss = classification_loss if dataset.classes else regression_loss
    if set(experiment.aggregators) & set(WHOLE_RULES):
        return task_from_nnx(model, max_rank={}, train_dense="*", loss=loss, key=adapter_key)
    given = experiment.max_ranks or tuple(default.values())
    given = given * len(default) if len(given) == 1 else given
    dense = ("*/bias", "norms/*/scale") if experiment.model == "deep_cnn" else "*/bias"
    ranks = dict(zip(default, given, strict=True))
    _check_ranks(model, ranks, experiment.rank_levels)
    return task_from_nnx(model, max_rank=ranks, train_dense=dense, loss=loss, key=adapter_key)


def outputs_of(dataset: Dataset) -> int:
    """Return how many numbers a model gives for an example: a logit per class, or what is to be predicted."""
    return dataset.classes or math.prod(dataset.y_train.shape[1:])


def metrics_of(dataset: Dataset) -> Metrics:
    """Return what the server is tested by: accuracy, or the share of variance explained."""
    return classification_metrics if dataset.classes else regression_metrics(dataset.y_test)


def _check_memory(experiment: Experiment, dataset: Dataset) -> None:
    """Refuse models that no memory holds, before they are made."""
    widths = experiment.hidden or WIDTHS[experiment.model]
    if max(widths) < WIDE or not hasattr(os, "sysconf"):
        return
    shape, classes = dataset.x_train.shape[1:], outputs_of(dataset)
    sizes = [int(np.prod(shape)), *widths, classes]
    whole = set(experiment.aggregators) & set(WHOLE_RULES)
    ranks = experiment.max_ranks or [width // 2 for width in (*widths, widths[-1])]
    ranks = [0 if whole else rank for rank in (ranks * len(sizes) if len(ranks) == 1 else ranks)]
    layers = zip(sizes, sizes[1:], ranks, strict=False)
    needed = 4 * sum(into * out + rank * (into + out) for into, out, rank in layers)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 4:  # gradients, momentum and the sums of clients beside the model
        raise ConfigurationError(
            [
                f"hidden: expected a model that fits {memory / 2**30:.0f} GB of memory with its training, got "
                f"{needed / 2**30:.3g} GB of weights and adapters: lower --hidden or --max-ranks"
            ]
        )


def _check_ranks(model: nnx.Module, ranks: Mapping[str, int], levels: int | str) -> None:
    """Refuse ranks above the longer side of a matrix, which add nothing but cost, and more levels than ranks."""
    shapes = {"/".join(map(str, path)): value.shape for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    sides = {path: max(math.prod(shapes[f"{path}/kernel"][:-1]), shapes[f"{path}/kernel"][-1]) for path in ranks}
    problems = [
        f"max-ranks: expected at most {sides[path]} for layer {path}, the longer side of its weight, got {rank}"
        for path, rank in ranks.items()
        if rank > sides[path]
    ]
    if isinstance(levels, int) and levels > (most := max(ranks.values())):
        problems += [f"rank-levels: expected at most {most}, the largest maximum rank, got {levels}"]
    if problems:
        raise ConfigurationError(problems)


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
            f"shape {shape}: " + ("choose fewer --hidden" if len(shape) in (2, 3) else "choose --model mlp")
        )
    channels = (shape[2] if len(shape) == 3 else 1, *widths)
    ranks = {f"convs/{number}": width for number, width in enumerate(widths)} | {"head": widths[-1]}
    if experiment.model == "cnn":
        return models.CNN(channels, classes, image=(shape[0], shape[1]), rngs=rngs), ranks
    return models.DeepCNN(channels, classes, rngs=rngs), {p: max(1, rank // 2) for p, rank in ranks.items()}


def start_state(
    experiment: Experiment, federation: Federation, rule: Aggregator, ranks: Mapping[str, Array] | None = None
) -> State:
    """Make the state before the first round, at full rank unless ranks are given."""
    clients = federation.data.size.shape[0]
    state = init_state(
        federation.task.server,
        rule,
        ranks,
        learning_rate=learning_rates(experiment),
        local_epochs=experiment.local_epochs,
        max_epochs=max(experiment.local_epochs, experiment.probe_epochs),
        clients=clients,
    )
    private = isinstance(state.aggregator, PrivateState)  # that of a probe is not
    if experiment.privacy and private and federation.task.server.trainable.adapters:
        return aggregators.set_expected_owners(state, experiment.privacy.rate)
    return state


def training_key(experiment: Experiment, federation: Federation, policy: str, aggregator: str) -> Key:
    """Return the key of a run's rounds: its seed's, so that runs differ in what they compare alone, or one of its own.

    Private runs draw noise and cohorts of their own: with shared ones, two would tell sums without any noise.
    """
    key = federation.keys["training"]
    return key_of(key, f"{policy} {aggregator}") if experiment.privacy else key


def learning_rates(experiment: Experiment) -> float | Callable[[Array], Array]:
    """Return the clients' learning rate, or a schedule of the round from 0."""
    if experiment.rate_schedule == "constant":
        return experiment.learning_rate
    return _schedule(experiment.rate_schedule, experiment.learning_rate, experiment.rounds)


@lru_cache  # one function each, as another one is another program
def _schedule(kind: str, rate: float, rounds: int) -> Callable[[Array], Array]:
    if kind == "cosine":
        return optax.cosine_decay_schedule(rate, rounds)
    if kind == "step":
        return optax.piecewise_constant_schedule(rate, {max(1, rounds // 2): 0.1, max(1, rounds * 3 // 4): 0.1})
    return optax.linear_schedule(rate / 10, rate, max(1, rounds // 10))


def make_aggregator(name: str, experiment: Experiment) -> Aggregator:
    """Make an aggregation rule by name, with an experiment's server step and clipping of what clients send."""
    rule, e = aggregators.RULES[name](), experiment
    if e.server_learning_rate != 1 or e.server_momentum:
        step = optax.sgd(e.server_learning_rate, momentum=e.server_momentum or None)
        rule = aggregators.with_server_optimizer(rule, step)
    if e.privacy:
        rule = aggregators.with_differential_privacy(
            rule,
            clip=e.dp_clip,
            noise_multiplier=e.privacy.noise,
            denominator=e.privacy.rate * e.clients,
            adaptive=aggregators.AdaptiveClip(e.dp_adaptive) if e.dp_adaptive else None,
        )
    return aggregators.with_norm_clipping(rule, e.clip_norm) if e.clip_norm else rule


def make_optimizer(experiment: Experiment) -> Callable[[Mapping[str, Array]], optax.GradientTransformation]:
    """Return the clients' optimiser as a function of the hyper-parameters in the state."""
    if experiment.optimizer == "sgd":
        return lambda h: optax.sgd(h["learning_rate"], momentum=experiment.momentum or None)
    make = {"adam": optax.adam, "adamw": optax.adamw}[experiment.optimizer]
    return lambda h: make(h["learning_rate"])


def make_participation(experiment: Experiment) -> Participation:
    """Return who is invited to a round."""
    if experiment.cohort == experiment.clients and experiment.sampling != "independent":
        return everyone
    if experiment.sampling == "independent":
        return sample_independently(experiment.participation)
    return {"uniform": sample_uniformly, "by_size": sample_by_size}[experiment.sampling](experiment.cohort)


def make_faults(experiment: Experiment) -> list[faults.Fault]:
    """Return what goes wrong in every round."""
    struck = []
    if experiment.drop_out:
        struck.append(faults.drop_out(experiment.drop_out))
    if experiment.stragglers:
        struck.append(faults.limit_steps(experiment.straggler_steps, probability=experiment.stragglers))
    return struck


def lane_count(experiment: Experiment, federation: Federation, *, cohort: int, devices: int = 1) -> int:
    """Return how many clients each device trains side by side: what was asked for, or what suits data and device."""
    if experiment.lanes != "auto":
        return min(int(experiment.lanes), cohort)
    share = max(1, cohort // devices)
    return choose_lanes(federation.data, federation.task, batch_size=experiment.batch_size, cohort=share)
