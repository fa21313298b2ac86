"""DrJAX: broadcast, `map_fn` over clients and `reduce_sum`, compiled as one program, padded to the longest client."""

import sys

import drjax
import jax
import jax.numpy as jnp
import numpy as np
from common import load, masks, owned_weights, padded_batches, serve
from jax_network import Values, make_loss

workload = load(sys.argv[1])
x, y = jnp.asarray(workload.inputs), jnp.asarray(workload.targets.astype(np.int32))
server, owners = jax.tree.map(jnp.asarray, (workload.trainable, owned_weights(workload)))
clients = jax.tree.map(jnp.asarray, (masks(workload), *padded_batches(workload), workload.size.astype(np.float32)))
loss = make_loss(workload.network, jax.tree.map(jnp.asarray, workload.frozen))


def train(server: Values, mask: Values, batch: jax.Array, weight: jax.Array, size: jax.Array) -> Values:
    """Train one client; return what it moved its values by, times its examples."""
    start = jax.tree.map(jnp.multiply, server, mask)

    def step(values: Values, chosen: tuple[jax.Array, jax.Array]) -> tuple[Values, None]:
        slopes = jax.grad(loss)(values, x[chosen[0]], y[chosen[0]], chosen[1])
        return jax.tree.map(lambda v, slope: v - workload.learning_rate * slope, values, slopes), None

    trained, _ = jax.lax.scan(step, start, (batch, weight))
    return jax.tree.map(lambda new, old: size * (new - old), trained, start)


@jax.jit
@drjax.program(placements={"clients": workload.clients})
def federated_round(server: Values, clients: tuple) -> Values:
    moved = drjax.reduce_sum(drjax.map_fn(train, (drjax.broadcast(server), *clients)))
    return jax.tree.map(lambda old, total, weight: old + total / jnp.maximum(weight, 1), server, moved, owners)


def run() -> Values:
    return jax.block_until_ready(federated_round(server, clients))


def export(values: Values) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in values.items()}


serve(run, export)
