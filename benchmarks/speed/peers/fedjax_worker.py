"""FedJAX: `for_each_client` with its jit backend over padded batches of `ClientDataset`s.

Where clients have few different ranks they train truncated matrices (one compilation for each), else matrices padded
with zeros. FedJAX 0.0.17 calls `jax.tree_map`, which JAX has since dropped: it gets it back here.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

jax.tree_map = jax.tree.map

import fedjax  # noqa: E402
from common import load, masks, owned_weights, seen, serve, truncated  # noqa: E402
from fedjax.core import for_each_client  # noqa: E402
from jax_network import Values, make_loss  # noqa: E402

FEW = 16

workload = load(sys.argv[1])
loss = make_loss(workload.network, jax.tree.map(jnp.asarray, workload.frozen))
server, owners = jax.tree.map(jnp.asarray, (workload.trainable, owned_weights(workload)))
shapes = len(set(zip(*(ranks.tolist() for ranks in workload.ranks.values()), strict=True)))
padded = {name: mask * workload.trainable[name] for name, mask in masks(workload).items()} if shapes > FEW else {}


def start_of(client: int) -> Values:
    values = {name: value[client] for name, value in padded.items()} if padded else truncated(workload, client)
    return jax.tree.map(jnp.asarray, values)


def dataset_of(client: int, epoch: int) -> fedjax.ClientDataset:
    chosen = seen(workload, client)[epoch]
    return fedjax.ClientDataset({"x": workload.inputs[chosen], "y": workload.targets[chosen].astype(np.int32)})


starts = [start_of(client) for client in range(workload.clients)]
datasets = [[dataset_of(client, e) for e in range(len(workload.order))] for client in range(workload.clients)]


def client_init(shared: None, start: Values) -> dict[str, Values]:
    del shared
    return {"values": start, "start": start}


def client_step(state: dict[str, Values], batch: dict[str, jax.Array]) -> dict[str, Values]:
    weight = batch[fedjax.EXAMPLE_MASK_KEY].astype(jnp.float32)
    slopes = jax.grad(loss)(state["values"], batch["x"], batch["y"], weight)
    moved = jax.tree.map(lambda v, slope: v - workload.learning_rate * slope, state["values"], slopes)
    return state | {"values": moved}


def client_final(shared: None, state: dict[str, Values]) -> Values:
    del shared
    return jax.tree.map(jnp.subtract, state["values"], state["start"])


train = for_each_client.for_each_client(client_init, client_step, client_final)


@jax.jit
def add(total: Values, moved: Values, size: jax.Array) -> Values:
    return {name: t.at[tuple(map(slice, moved[name].shape))].add(size * moved[name]) for name, t in total.items()}


@jax.jit
def finish(server: Values, total: Values) -> Values:
    return jax.tree.map(lambda old, t, weight: old + t / jnp.maximum(weight, 1), server, total, owners)


def run() -> Values:
    """Train everybody, then average what each value's owners moved it by."""
    clients = (
        (client, (batch for part in datasets[client] for batch in part.padded_batch(batch_size=workload.batch_size)), s)
        for client, s in enumerate(starts)
    )
    total = jax.tree.map(jnp.zeros_like, server)
    for client, moved in train(None, clients):
        total = add(total, moved, jnp.float32(workload.size[client]))
    return jax.block_until_ready(finish(server, total))


def export(values: Values) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in values.items()}


serve(run, export)
