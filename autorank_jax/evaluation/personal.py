"""Every client's accuracy on examples of its own, before and after one more local training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from autorank_jax.engine.round import make_round
from autorank_jax.evaluation.metrics import classification_metrics
from autorank_jax.federated.batches import steps_per_epoch, take_batch
from autorank_jax.interface import checked
from autorank_jax.types import (
    Aggregator,
    Array,
    Client,
    ClientUpdate,
    FederatedData,
    Key,
    LocalTraining,
    PyTree,
    Server,
    State,
    Task,
    Trainable,
)


class PersonalScores(NamedTuple):
    """Each client's accuracy on examples of its own that it did not train on."""

    before: Array  # (clients,) of the server cut to the client's rank
    after: Array  # (clients,) after the client's local training
    examples: Array  # (clients,) int32 they were measured on; 0 for clients without any, absent, or diverged


@checked
def with_personal_scores(rule: Aggregator, task: Task, held_out: FederatedData, *, batch_size: int = 64) -> Aggregator:
    """Make a rule measure, in place of aggregating, every client before and after its local training.

    `personal_scores` runs one ordinary round with it: the server stays, and `state.clients[1]` holds the
    `PersonalScores`, beside what clients keep.

    Args:
        rule: the rule; its state and what clients keep enter, and nothing of them changes.
        task: the model, a classifier.
        held_out: examples kept from training, in the same order of clients.
        batch_size: examples at a time.

    Returns:
        An aggregator.
    """

    def examples_of(row: Array) -> Array:
        return held_out.size.at[row].get(mode="fill", fill_value=0)  # none of a client that is not there

    def correct(server: Server, trainable: Trainable, row: Array) -> Array:
        def add(step: Array, total: Array) -> Array:
            batch, _ = take_batch(held_out, row, jnp.zeros(2, jnp.uint32), step, batch_size)
            logits = task.predict(server.frozen, trainable, batch.inputs)
            right = classification_metrics(logits, batch.targets)["accuracy"]
            return total + jnp.sum(right * batch.weight.astype(right.dtype))

        size = examples_of(row)
        total = lax.fori_loop(0, steps_per_epoch(size, batch_size), add, jnp.zeros((), jnp.result_type(float)))
        return total / jnp.maximum(size, 1).astype(total.dtype)

    def keep(update: ClientUpdate, server: Server) -> tuple[PyTree, PersonalScores]:
        row = update.client.row
        before, after = correct(server, update.start, row), correct(server, update.trained, row)
        return update.client.state[0], PersonalScores(before, after, examples_of(row))

    def start(server: Server, state: PyTree, client: Client) -> Trainable:
        return rule.start(server, state, client._replace(state=client.state[0]))

    nothing = jnp.zeros((), jnp.result_type(float))
    unknown = PersonalScores(nothing, nothing, jnp.zeros((), jnp.int32))
    return rule._replace(
        start=start,
        summand=lambda update, server, plan: (),  # noqa: ARG005
        update=lambda key, sums, state, server: (server, state),  # noqa: ARG005
        client_init=lambda server: (rule.client_init(server), unknown),
        client_keep=keep,
        exact_plan=False,
        step=None,
        report=lambda sums, before, after: {},  # noqa: ARG005
        client_ranks=lambda ranks, clients: rule.client_ranks(ranks, clients[0]),
    )


@checked
def personal_scores(
    key: Key,
    local: LocalTraining,
    rule: Aggregator,
    state: State,
    data: FederatedData,
    *,
    task: Task,
    held_out: FederatedData,
    **options: Any,
) -> PersonalScores:
    """Measure every client on examples of its own, before and after one more local training.

    A pure function of its arrays; compile it with `jax.jit`.

    Args:
        key: of the batch order and of random layers.
        local: local training of one client.
        rule: that of the rounds so far, so that clients start from what it hands them. Nothing is aggregated.
        state: after any round.
        data: what the clients train on.
        task: the model, a classifier.
        held_out: examples kept from training, in the same order of clients; `split_test_set` shares a test set out.
        **options: of `make_round`, such as `lanes`.

    Raises:
        ValueError: for held-out examples of other clients than the data's.
    """
    if held_out.size.shape != data.size.shape:
        raise ValueError(
            f"expected held-out examples of the {data.size.shape[0]} clients of the data, got those of "
            f"{held_out.size.shape[0]}: clients without any may be empty, allow_empty=True"
        )
    scoring = with_personal_scores(rule, task, held_out)
    blank = scoring.client_init(state.server)[1]
    scores = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, data.size.shape), blank)
    after, _ = make_round(local, scoring, **options)(key, state._replace(clients=(state.clients, scores)), data)
    return after.clients[1]
