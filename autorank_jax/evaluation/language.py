"""How well a language model knows the completions of a test set, and those of each client."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from autorank_jax.adapters.lora import cut, layers_of, max_ranks, rank_masks
from autorank_jax.engine.flops import FlopModel
from autorank_jax.federated.batches import steps_per_epoch, take_batch
from autorank_jax.interface import check_least, checked
from autorank_jax.models.causal_config import CausalConfig
from autorank_jax.types import Array, EvaluateFn, FederatedData, PyTree, Scored, Server, State, Task


@checked
def make_evaluate_language(task: Task, inputs: PyTree, targets: PyTree, *, batch_size: int = 8) -> EvaluateFn:
    """Make the evaluation of the server model on completions.

    Args:
        task: made by `task_from_causal_lm`.
        inputs: ids `(n, length)` or `Tokens`.
        targets: `(n, length)`, negative where a token is not counted.
        batch_size: rows at a time, which bounds memory.

    Returns:
        `state -> {"loss": nats per counted token, "perplexity": its exponential}`.

    Raises:
        ValueError: if inputs and targets differ in length, no token is counted, or the model does not take the inputs.
    """
    check_least("batch_size", batch_size)
    inputs, targets = jax.tree.map(jnp.asarray, (inputs, targets))
    rows = {leaf.shape[0] for leaf in jax.tree.leaves((inputs, targets))}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(f"expected inputs and targets of one length >= 1, got {sorted(rows)}")
    _check(task, inputs)
    total = jnp.sum(targets >= 0)
    if not isinstance(total, jax.core.Tracer) and total == 0:
        raise ValueError("expected targets that count some token, got negative ones alone")

    def evaluate(state: State) -> dict[str, Array]:
        nats = _nats(task, state.server)
        padded = jax.tree.map(lambda leaf: _whole_batches(leaf, batch_size), Scored(inputs, targets))
        count = jnp.arange(padded.targets.shape[0] * padded.targets.shape[1]).reshape(padded.targets.shape[:2])
        real = count < targets.shape[0]
        sums = lax.map(lambda part: jnp.sum(jnp.where(part[1][:, None], nats(part[0]), 0)), (padded, real))
        loss = jnp.sum(sums) / jnp.maximum(total, 1).astype(sums.dtype)
        return {"loss": loss, "perplexity": jnp.exp(loss)}

    return evaluate


@checked
def client_perplexities(task: Task, state: State, data: FederatedData, *, batch_size: int = 8) -> Array:
    """Return the perplexity of the server, cut to each client's ranks, on that client's completions, `(clients,)`.

    Args:
        task: made by `task_from_causal_lm`.
        state: for the server and the ranks.
        data: of all clients in the state's order; what they did not train on tells more.
        batch_size: rows at a time.

    Returns:
        `(clients,)`; 1 for clients without a counted token.

    Raises:
        ValueError: for data of other clients than the state's, or that the model does not take.
    """
    check_least("batch_size", batch_size)
    _check(task, data.inputs)
    clients = data.size.shape[0]
    if state.epochs.shape != (clients,):
        raise ValueError(f"expected data of the state's {state.epochs.shape[0]} clients, got {clients}")
    widths = max_ranks(state.server)

    def one(row: Array) -> Array:
        masks = rank_masks({path: ranks[row] for path, ranks in state.ranks.items()}, widths)
        nats = _nats(task, state.server._replace(trainable=cut(state.server.trainable, masks)))

        def add(step: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            batch, _ = take_batch(data, row, jnp.zeros(2, jnp.uint32), step, batch_size)
            counted = (batch.targets >= 0) & (batch.weight > 0)[:, None]
            lost = jnp.sum(jnp.where(counted, nats(Scored(batch.inputs, batch.targets)), 0))
            return sums[0] + lost.astype(sums[0].dtype), sums[1] + jnp.sum(counted, dtype=jnp.int32)

        nothing = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        lost, counted = lax.fori_loop(0, steps_per_epoch(data.size[row], batch_size), add, nothing)
        return jnp.exp(lost / jnp.maximum(counted, 1).astype(lost.dtype))

    return lax.map(one, jnp.arange(clients, dtype=jnp.int32))


@checked
def continue_text(task: Task, server: Server, prompt: Array, *, tokens: int) -> Array:
    """Continue a text greedily, all of it computed anew for every token: for short samples.

    Args:
        task: made by `task_from_causal_lm`.
        server: the model.
        prompt: ids `(length,)`, at least one.
        tokens: how many to add, those after the end of the text included.

    Returns:
        `(tokens,)` int32: each is the largest logit after all before it.

    Raises:
        ValueError: for an empty prompt, no tokens to add, or more of both than the model takes.
    """
    if prompt.ndim != 1 or prompt.shape[0] < 1 or tokens < 1:
        raise ValueError(f"expected a prompt of shape (length >= 1,) and tokens >= 1, got {prompt.shape} and {tokens}")
    length = prompt.shape[0]

    def add(step: Array, ids: Array) -> Array:
        logits = task.predict(server.frozen, server.trainable, ids[None])[0]  # what follows is not seen
        return ids.at[step].set(jnp.argmax(logits[step - 1]).astype(jnp.int32))

    room = jnp.pad(prompt.astype(jnp.int32), (0, tokens), mode="edge")
    _check(task, room[None])
    return lax.fori_loop(length, length + tokens, add, room)[length:]


def _check(task: Task, inputs: PyTree) -> None:
    if task.check is not None:
        task.check(inputs)


def _nats(task: Task, server: Server) -> Callable[[Scored], Array]:
    return lambda scored: task.predict(server.frozen, server.trainable, scored)


def _whole_batches(leaf: Array, batch_size: int) -> Array:
    """Return `(batches, batch_size, ...)`, filled up with the first rows."""
    batches = -(-leaf.shape[0] // batch_size)
    index = jnp.arange(batches * batch_size) % leaf.shape[0]
    return leaf[index].reshape(batches, batch_size, *leaf.shape[1:])


@checked
def language_flops(config: CausalConfig, task: Task, *, length: int) -> FlopModel:
    """Count the FLOPs of training a causal decoder on one row, from its sizes.

    `training_flops` would count one block, as XLA counts the body of a scan once. A frozen matrix counts twice two per
    number and token (forward, gradient of its inputs), a factor three times two, attention
    `12 · tokens² · heads · head_dim` a block (all pairs, as they are computed), logits as a frozen matrix. Norms,
    rotations and what is computed again in the backward pass are left out.

    Args:
        config: of the decoder.
        task: made of it, for the adapters.
        length: tokens of a row.

    Returns:
        The linear model, per row.
    """
    blocks = config.depth * length
    matrices = 2 * config.width * (config.heads + config.kv_heads) * config.head_dim + 3 * config.width * config.hidden
    attention = 12 * config.depth * length**2 * config.heads * config.head_dim
    base = 4.0 * (blocks * matrices + length * config.width * config.vocabulary) + attention
    per_rank = {
        path: 6.0 * length * math.prod(layers_of(a)) * (a.lora_a.shape[-2] + a.lora_b.shape[-1])
        for path, a in task.server.trainable.adapters.items()
    }
    return FlopModel(base, per_rank)
