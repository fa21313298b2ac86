"""Layers that stay with their clients, around any rule: personal heads (FedPer), normalisation of one's own (FedBN)."""

from typing import Any

import jax

from autorank_jax.adapters.selection import choose_parts, leave_out
from autorank_jax.aggregators.personal import keep_owned
from autorank_jax.aggregators.server import step_taken
from autorank_jax.interface import checked
from autorank_jax.types import (
    Aggregator,
    AggState,
    Array,
    Client,
    ClientUpdate,
    Key,
    Plan,
    PyTree,
    Server,
    ServerStep,
    Sums,
    Trainable,
)


@checked
def keep_local(rule: Aggregator, patterns: str | tuple[str, ...]) -> Aggregator:
    """Let layers stay with their clients: every client goes on from its own, the rule sees nothing of them.

    `keep_local(raflora(), "head/*")` is FedPer (arXiv 1912.00818), `keep_local(rbla(), "norms/*")` of a model whose
    normalisation is trained whole is FedBN (arXiv 2102.07623). A client begins with the server's, which stay as they
    were at the start, so that only clients' own models are worth testing: `evaluation.with_personal_scores`. Nothing
    of these layers is sent, and costs count none of it. What the rule does not let clients train rests here too.
    Positions beyond a client's present rank keep what it had there before.

    Args:
        rule: any rule; a server optimiser goes around it or inside.
        patterns: of paths of adapters and of parameters trained whole; `"head/*"` takes the adapter of `head` too.

    Raises:
        TypeError: for what is no rule.
        ValueError: when initialised, for a pattern that matches nothing.
    """
    globs = (patterns,) if isinstance(patterns, str) else tuple(patterns)

    def less(server: Server) -> Server:
        return server._replace(trainable=leave_out(server.trainable, globs))

    def own(trainable: Trainable) -> Trainable:
        return leave_out(trainable, globs, invert=True)

    def whole(server: Server, new: Server) -> Server:
        return new._replace(trainable=_join(new.trainable, own(server.trainable)))

    def share(by_path: dict[str, Any], server: Server) -> dict[str, Any]:
        return {path: by_path[path] for path in less(server).trainable.adapters}

    def seen(update: ClientUpdate, server: Server) -> ClientUpdate:
        client = update.client
        client = client._replace(masks=share(client.masks, server), state=client.state[0])
        return ClientUpdate(leave_out(update.trained, globs), leave_out(update.start, globs), client)

    def init(server: Server) -> AggState:
        choose_parts(server.trainable, globs)
        return rule.init(less(server))

    def start(server: Server, state: AggState, client: Client) -> Trainable:
        inner = client._replace(masks=share(client.masks, server), state=client.state[0])
        return _join(rule.start(less(server), state, inner), client.state[1])

    def summand(update: ClientUpdate, server: Server, plan: Plan) -> Sums:
        plan = plan._replace(owners=share(plan.owners, server))
        return rule.summand(seen(update, server), less(server), plan)

    def step(key: Key, sums: Sums, state: AggState, server: Server) -> tuple[Server, AggState]:
        new, memory = rule.update(key, sums, state, less(server))
        return whole(server, new), memory

    def prepare(key: Key, state: AggState, server: Server) -> PyTree:
        return rule.prepare(key, state, less(server))

    def keep(update: ClientUpdate, server: Server) -> tuple[PyTree, Trainable]:
        mine = keep_owned(own(update.trained), update.client.state[1], update.client.masks)
        return rule.client_keep(seen(update, server), less(server)), mine

    def client_ranks(ranks: dict[str, Array], clients: PyTree) -> dict[str, Array]:
        inner, kept = clients
        return ranks | rule.client_ranks({p: r for p, r in ranks.items() if p not in kept.adapters}, inner)

    return rule._replace(
        init=init,
        start=start,
        summand=summand,
        update=step,
        client_init=lambda server: (rule.client_init(less(server)), own(server.trainable)),
        client_keep=keep,
        step=_step(rule.step, less, whole) if rule.step else None,
        report=lambda sums, before, after: rule.report(sums, less(before), less(after)),
        traffic=rule.traffic._replace(kept=(*rule.traffic.kept, *globs)),
        client_ranks=client_ranks,
        prepare=prepare,
    )


def _step(step: ServerStep, less: Any, whole: Any) -> ServerStep:
    """Let a server step see nothing of what is kept."""
    return step._replace(
        read=step.read if step.read is step_taken else lambda server: step.read(less(server)),
        mean=lambda sums, state, server: step.mean(sums, state, less(server)),
        write=lambda key, values, state, server: whole(server, step.write(key, values, state, less(server))),
    )


def _join(shared: Trainable, own: Trainable) -> Trainable:
    """Put together what `leave_out` took apart."""
    adapters = {**shared.adapters, **own.adapters}
    dense = jax.tree.map(
        lambda mine, other: other if mine is None else mine, shared.dense, own.dense, is_leaf=lambda leaf: leaf is None
    )
    return Trainable({path: adapters[path] for path in sorted(adapters)}, dense)
