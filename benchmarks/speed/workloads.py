"""The workloads of the speed benchmarks: a model, clients, ranks and how they are trained.

| name | model | clients | what it shows |
|---|---|---|---|
| `tiny`, `tiny256` | MLP 64-128-10 | 64, 256 of 40 examples | dispatch: the arithmetic is next to nothing |
| `staircase` | MLP 784-200-200-10 | 10 of Fashion-MNIST, the largest 30 times the smallest | the paper's own setting |
| `lognormal` | MLP 784-200-200-10 | 1,000 of Fashion-MNIST, log-normal amounts, σ = 1 | many uneven clients |
| `equal` | MLP 784-200-200-10 | 100 of 600 images of Fashion-MNIST | no imbalance: lockstep loses nothing |
| `cnn` | two 3×3 convolutions of 16 and 32 channels | 100 of 96 images | adapters on convolutions |
| `transformer` | two blocks of width 64 on the 28 rows of an image | 100 of 96 images | adapters on attention and MLP |

Everybody trains one epoch with plain SGD, and RBLA aggregates. Ranks of `staircase` and `lognormal` are AutoRank's by
all criteria but `loss_entropy`, which needs a probe; in `tiny` quarters of the maximum alternate; elsewhere everyone
has the maximum. The images of `cnn` and `transformer` carry a little noise, so that max pooling meets no ties.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from autorank_jax import aggregators, datasets, federated
from autorank_jax.adapters.lora import max_ranks
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.engine.lane_count import choose_lanes
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.simulation import init_state
from autorank_jax.federated import partition
from autorank_jax.federated.batches import permuted
from autorank_jax.models.transformer import Size, Transformer
from autorank_jax.models.vision import CNN, MLP
from autorank_jax.ranks import policies
from autorank_jax.types import Aggregator, Array, FederatedData, Key, LocalTraining, State, Task
from benchmarks.speed.baselines import make_level

CRITERIA = ("size", "classes", "label_entropy", "gini_simpson")
SIZES, MAX_RANKS = (784, 200, 200, 10), (160, 160, 100)
LEARNING_RATE = 0.01


class Workload(NamedTuple):
    """One cell of the benchmark."""

    name: str
    network: dict[str, Any]  # what it takes to write the model down again in another framework
    task: Task
    data: FederatedData
    local: LocalTraining
    rule: Aggregator
    state: State
    lanes: int  # as `lane_count.choose_lanes` has it
    rank_levels: int


class Model(NamedTuple):
    """A task and its description for other frameworks."""

    task: Task
    network: dict[str, Any]


def mlp(sizes: tuple[int, ...], ranks: tuple[int, ...]) -> Model:
    """Make a perceptron with an adapter on every layer."""
    paths = [f"layers/{number}" for number in range(len(sizes) - 1)]
    task = task_from_nnx(MLP(sizes, rngs=nnx.Rngs(0)), max_rank=dict(zip(paths, ranks, strict=True)))
    return Model(task, {"kind": "mlp", "layers": paths})


def cnn() -> Model:
    """Make a small convolutional network with an adapter on every layer."""
    ranks = {"convs/0": 8, "convs/1": 16, "head": 8}
    task = task_from_nnx(CNN((1, 16, 32), 10, image=(28, 28), rngs=nnx.Rngs(0)), max_rank=ranks)
    return Model(task, {"kind": "cnn", "convs": ["convs/0", "convs/1"], "head": "head", "window": 3})


def transformer() -> Model:
    """Make a small transformer on the rows of an image with adapters on attention, MLP and head."""
    size = Size(width=64, depth=2, heads=4, hidden=128, length=28)
    task = task_from_nnx(Transformer(28, 10, size, rngs=nnx.Rngs(0)), max_rank=8, where=("blocks/*", "head"))
    return Model(task, {"kind": "transformer", "heads": size.heads, "blocks": size.depth})


def fashion_mnist(quick: bool) -> datasets.Dataset:
    """Load the full set, or the embedded 5,000 images for a quick look."""
    return datasets.load_dataset("fashion_mnist_mini" if quick else "fashion_mnist")


def clients_of(dataset: datasets.Dataset, parts: partition.Parts) -> FederatedData:
    """Put a split on the device."""
    return federated.from_parts(dataset.x_train, dataset.y_train, parts, classes=dataset.classes)


def autorank_ranks(model: Model, data: FederatedData) -> dict[str, Array]:
    """Set the ranks by AutoRank, without the criterion that needs a probe."""
    ratios, _ = policies.autorank(criteria=CRITERIA)(jax.random.key(0), federated.client_stats(data))
    return policies.ranks_from_ratios(ratios, max_ranks(model.task.server.trainable))


def uniform_ranks(model: Model, data: FederatedData, ratio: float = 1.0) -> dict[str, Array]:
    """Give every client the same share of the maximum ranks."""
    ratios = jnp.full(data.size.shape[0], ratio)
    return policies.ranks_from_ratios(ratios, max_ranks(model.task.server.trainable))


def workload_of(
    name: str,
    model: Model,
    data: FederatedData,
    ranks: dict[str, Array],
    *,
    batch_size: int,
    rank_levels: int = 1,
    momentum: float | None = None,
) -> Workload:
    """Make a workload: SGD at a learning rate that is data, RBLA, one local epoch."""
    task, rule = model.task, aggregators.rbla()
    local = make_local_training(task, lambda h: optax.sgd(h["learning_rate"], momentum), batch_size=batch_size)
    state = init_state(task.server, rule, ranks, learning_rate=LEARNING_RATE)
    lanes = choose_lanes(data, task, batch_size=batch_size)
    return Workload(name, model.network, task, data, local, rule, state, lanes, rank_levels)


def few_shot_clients(clients: int, examples: int, *, features: int = 64, classes: int = 10) -> FederatedData:
    """Make clients of equally many synthetic examples; a million of them take seconds."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (clients * examples, features), np.uint8)
    y = rng.integers(0, classes, clients * examples, np.int32)
    owner = np.repeat(np.arange(clients, dtype=np.int32), examples)
    return federated.from_client_ids(x, y, owner, classes=classes)


def alternating_ranks(model: Model, clients: int) -> dict[str, Array]:
    """Let quarters of the maximum ranks alternate."""
    ratios = (1 + jnp.arange(clients) % 4) / 4
    return policies.ranks_from_ratios(ratios, max_ranks(model.task.server.trainable))


def make_tiny(clients: int, quick: bool) -> Workload:
    clients = 8 if quick else clients
    model = mlp((64, 128, 10), (8, 8))
    data, ranks = few_shot_clients(clients, 40), alternating_ranks(model, clients)
    return workload_of("tiny", model, data, ranks, batch_size=10)


def make_scale(clients: int, total: int) -> Workload:
    """Let clients share a total of synthetic examples equally, at least one each."""
    model, data = mlp((64, 128, 10), (8, 8)), few_shot_clients(clients, max(1, total // clients))
    return workload_of("scale", model, data, alternating_ranks(model, clients), batch_size=4)


def make_staircase(quick: bool) -> Workload:
    dataset, model = fashion_mnist(quick), mlp(SIZES, MAX_RANKS)
    data = clients_of(dataset, partition.staircase(dataset.y_train, seed=0))
    return workload_of("staircase", model, data, autorank_ranks(model, data), batch_size=64, rank_levels=4)


def make_lognormal(quick: bool) -> Workload:
    dataset, model = fashion_mnist(quick), mlp(SIZES, MAX_RANKS)
    parts = partition.dirichlet_lognormal(dataset.y_train, 30 if quick else 1000, alpha=0.3, sigma=1.0, seed=0)
    data = clients_of(dataset, parts)
    return workload_of("lognormal", model, data, autorank_ranks(model, data), batch_size=32, rank_levels=4)


def make_equal(quick: bool) -> Workload:
    dataset, model = fashion_mnist(quick), mlp(SIZES, MAX_RANKS)
    data = clients_of(dataset, partition.iid(dataset.y_train, 20 if quick else 100, seed=0))
    return workload_of("equal", model, data, uniform_ranks(model, data), batch_size=50)


def make_images(name: str, model: Model, quick: bool) -> Workload:
    dataset, clients, examples = fashion_mnist(quick), 4 if quick else 100, 32 if quick else 96
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(dataset.y_train))[: clients * examples]
    noise = rng.integers(0, 16, (len(chosen), *dataset.x_train.shape[1:]), np.uint8)
    images = np.minimum(dataset.x_train[chosen], 239) + noise
    parts = np.arange(len(chosen)).reshape(clients, -1)
    data = federated.from_parts(images, dataset.y_train[chosen], list(parts), classes=dataset.classes)
    return workload_of(name, model, data, uniform_ranks(model, data), batch_size=32)


WORKLOADS: dict[str, Callable[[bool], Workload]] = {
    "tiny": lambda quick: make_tiny(64, quick),
    "tiny256": lambda quick: make_tiny(256, quick)._replace(name="tiny256"),
    "staircase": make_staircase,
    "lognormal": make_lognormal,
    "equal": make_equal,
    "cnn": lambda quick: make_images("cnn", cnn(), quick),
    "transformer": lambda quick: make_images("transformer", transformer(), quick),
}

TITLES = {
    "tiny": "64 clients of 40 examples, small MLP",
    "tiny256": "256 clients of 40 examples, small MLP",
    "staircase": "10 clients of 600 to 17,574 examples, MLP",
    "lognormal": "1,000 clients, log-normal sizes, MLP",
    "equal": "100 clients of 600 examples, MLP",
    "cnn": "100 clients of 96 examples, convolutions",
    "transformer": "100 clients of 96 examples, small transformer",
}
"""The workloads in words, as pictures and tables have them (not with `quick`, which is smaller)."""


def make_workload(name: str, *, quick: bool = False) -> Workload:
    """Make a workload by name.

    Args:
        name: a key of `WORKLOADS`.
        quick: few clients and the embedded images in place of the full set.

    Raises:
        ValueError: for an unknown name, or where the full Fashion-MNIST is not at hand.
    """
    if name not in WORKLOADS:
        raise ValueError(f"expected a workload among {', '.join(WORKLOADS)}, got {name!r}")
    return WORKLOADS[name](quick)


def examples_per_round(workload: Workload) -> int:
    """Return how many examples are trained on in a round, counted once per epoch."""
    return int(np.asarray(workload.data.size, np.int64).sum()) * int(workload.state.hparams["local_epochs"])


def longest(workload: Workload) -> int:
    """Return the steps of the client with the most examples."""
    epochs = int(workload.state.hparams["local_epochs"])
    return epochs * -(-int(workload.data.size.max()) // workload.local.batch_size)


def batch_order(workload: Workload, key: Key) -> np.ndarray:
    """Return the example numbers in the order in which each client sees them, `(epochs, n)`, grouped by client.

    Client `i` has columns `start[i] .. start[i] + size[i] - 1`; batch `k` of an epoch is `batch_size` of them in turn.
    """
    data, epochs = workload.data, int(workload.state.hparams["local_epochs"])
    queue = make_level(workload.local, workload.rule, key, workload.state, data).round.queue
    words = jnp.zeros_like(queue.words).at[queue.row].set(queue.words)
    owner = np.repeat(np.arange(data.size.shape[0]), np.asarray(data.size))
    position = jnp.arange(data.order.shape[0]) - data.start[owner]
    one = jax.vmap(permuted, in_axes=(0, 0, 0, None))
    orders = [one(position, data.size[owner], words[owner], jnp.asarray(epoch)) for epoch in range(epochs)]
    return np.stack([np.asarray(data.order[data.start[owner] + order]) for order in orders])


def in_float64(workload: Workload) -> Workload:
    """Return the same round with start values and hyper-parameters in float64; call and run it under `enable_x64`."""

    def double(leaf: Array) -> Array:
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return workload._replace(state=jax.tree.map(double, workload.state))


def exported_inputs(workload: Workload) -> np.ndarray:
    """Return what peers read: images as they are, or in float64 the very floats that we make of them."""
    inputs, dtype = np.asarray(workload.data.inputs), workload.state.hparams["learning_rate"].dtype
    if dtype == jnp.float64 and inputs.dtype == np.uint8:
        inputs = inputs.astype(np.float32) / np.float32(255)
    return inputs if inputs.dtype == np.uint8 else inputs.astype(dtype)


def export_workload(workload: Workload, key: Key, path: Path) -> None:
    """Write everything that a peer needs to run the very same round: `peers/common.py` reads it."""
    data, server = workload.data, workload.state.server
    arrays = {"inputs": exported_inputs(workload), "targets": data.targets, "start": data.start, "size": data.size}
    arrays["order"] = batch_order(workload, key)
    arrays |= {f"dense:{name}": value for name, value in server.trainable.dense.items()}
    weights = {name: leaf for name, leaf in server.frozen.rest.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    arrays |= {f"rest:{name}": leaf for name, leaf in weights.items()}  # without the state of random layers
    for adapted, (a, b) in server.trainable.adapters.items():
        arrays |= {f"lora_a:{adapted}": a, f"lora_b:{adapted}": b, f"kernel:{adapted}": server.frozen.kernels[adapted]}
        arrays[f"ranks:{adapted}"] = workload.state.ranks[adapted]
    about = {"name": workload.name, "network": workload.network, "batch_size": workload.local.batch_size}
    about["learning_rate"] = float(workload.state.hparams["learning_rate"])
    np.savez(path, about=np.array(json.dumps(about)), **{name: np.asarray(value) for name, value in arrays.items()})
