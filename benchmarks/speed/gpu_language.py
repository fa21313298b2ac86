"""Language models with random weights: two published federated workloads beside training one adapter, and mixed ranks.

| name | model | clients of a round | tokens |
|---|---|---|---|
| `pfl` | TinyLlama 1.1B | 100 of about 16 texts of 512 tokens, batches of 4, rank 8, server Adam (pfl-research's benchmark) | 0.8 M |
| `openfedllm` | Llama 2 7B | 2 of 160 texts of 512 tokens, batches of 16, rank 32 (OpenFedLLM's default) | 0.16 M |
| `ranks` | TinyLlama 1.1B | 16 of 16 texts, batches of 4, ranks 4 to 64, beside all at their mean | 0.13 M |

The yardstick trains one shared adapter on as many tokens in larger batches, without any federation. Weights are
drawn on the device in bfloat16, factors are float32; texts are random tokens, all of them counted.
"""  # noqa: E501

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autorank_jax import aggregators, federated
from autorank_jax.adapters.causal_lm import task_from_causal_lm
from autorank_jax.adapters.lora import max_ranks, narrow
from autorank_jax.engine.footprint import training_footprint
from autorank_jax.engine.lane_count import free_memory
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.models.causal_config import CausalConfig
from autorank_jax.models.causal_lm import CausalLM, param_shapes
from autorank_jax.types import Aggregator, Array, FederatedData, Key, LocalTraining, State, Task
from benchmarks import harness
from benchmarks.speed.baselines import make_centralised, mean_widths

TINY_LLAMA = CausalConfig(
    vocabulary=32000, width=2048, depth=22, heads=32, kv_heads=4, head_dim=64, hidden=5632, norm_eps=1e-5, tied=False
)
LLAMA_2_7B = CausalConfig(
    vocabulary=32000, width=4096, depth=32, heads=32, kv_heads=32, head_dim=128, hidden=11008, length=4096,
    norm_eps=1e-5, tied=False,
)  # fmt: skip
REHEARSED = CausalConfig(vocabulary=96, width=32, depth=2, heads=2, kv_heads=1, head_dim=16, hidden=48, tied=False)


class Language(NamedTuple):
    """What one of the workloads asks for."""

    config: CausalConfig
    sizes: tuple[int, ...]  # texts of each client
    batch_size: int
    ranks: tuple[int, ...]  # of each client
    rule: Callable[[], Aggregator]
    shared_batch: int  # of the yardstick
    most_lanes: int
    length: int = 512


class Federation(NamedTuple):
    """A workload with its model and clients on the device."""

    task: Task
    data: FederatedData
    local: LocalTraining
    rule: Aggregator
    state: State


def server_adam() -> Aggregator:
    """Average factors and take the mean difference for a gradient of Adam."""
    return aggregators.with_server_optimizer(aggregators.zero_pad(), optax.adam(1e-3))


def workloads(*, rehearse: bool) -> dict[str, Language]:
    """Return the workloads by name; `rehearse`: the same of a tiny model and few short texts."""
    sizes = tuple(int(n) for n in np.maximum(1, np.random.default_rng(0).poisson(16, 100)))
    mixed = (4, 8, 16, 32, 64) * 3 + (4,)
    found = {
        "pfl": Language(TINY_LLAMA, sizes, 4, (8,) * 100, server_adam, 64, 64),
        "openfedllm": Language(LLAMA_2_7B, (160, 160), 16, (32, 32), aggregators.zero_pad, 16, 2),
        "ranks": Language(TINY_LLAMA, (16,) * 16, 4, mixed, aggregators.rbla, 64, 8),
    }
    if not rehearse:
        return found
    return {
        name: w._replace(
            config=REHEARSED, sizes=tuple(min(n, 3) for n in w.sizes[:5]), batch_size=2, shared_batch=4, length=8,
            ranks=tuple(max(1, rank // 8) for rank in w.ranks[:5]),
        )
        for name, w in found.items()
    }  # fmt: skip


def random_model(config: CausalConfig, dtype: Any = jnp.bfloat16) -> CausalLM:
    """Draw a decoder on the device, one parameter after the other: matrices `N(0, 1 / width)`, scales 1."""

    def draw(key: Key, shape: tuple[int, ...]) -> Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(config.width**-0.5, dtype)

    drawn, key, params = jax.jit(draw, static_argnums=1), jax.random.key(0), {}
    for number, (name, shape) in enumerate(param_shapes(config).items()):
        scale = name.endswith("scale")
        params[name] = jnp.ones(shape, dtype) if scale else drawn(jax.random.fold_in(key, number), shape)
    return CausalLM(config, params)


def federation_of(language: Language) -> Federation:
    """Put model and clients on the device."""
    task = task_from_causal_lm(random_model(language.config), max_rank=max(language.ranks))
    tokens = np.random.default_rng(1).integers(
        0, language.config.vocabulary, (sum(language.sizes), language.length + 1)
    )
    owner = np.repeat(np.arange(len(language.sizes)), language.sizes)
    ids = tokens.astype(np.int32)
    data = federated.from_client_ids(ids[:, :-1], ids[:, 1:], owner)
    ranks = {path: jnp.array(language.ranks, jnp.int32) for path in max_ranks(task)}
    rule = language.rule()
    local = make_local_training(task, lambda h: optax.sgd(h["learning_rate"]), batch_size=language.batch_size)
    return Federation(task, data, local, rule, init_state(task.server, rule, ranks, learning_rate=0.01))


def lanes_of(language: Language, federation: Federation) -> int:
    """Return how many clients train side by side: as many as suit the workload and fit into memory."""
    memory = free_memory()
    if memory is None:
        return min(language.most_lanes, 4)
    each = training_footprint(federation.task, federation.data, batch_size=language.batch_size).bytes
    return max(1, min(language.most_lanes, int(0.8 * memory / each)))


def timed_rounds(function: Callable[..., State], federation: Federation, *, repeats: int) -> harness.Row:
    """Compile a round that takes its state for its own, and time it after a first run; each goes on from the last."""
    begin = time.perf_counter()
    key, data = jax.random.key(0), federation.data
    program = jax.jit(function, donate_argnums=1).lower(key, federation.state, data).compile()
    row: harness.Row = {"compile_seconds": time.perf_counter() - begin}
    row["peak_bytes"] = harness.program_bytes(program)
    state, seconds = jax.tree.map(jnp.copy, federation.state), []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        state = jax.block_until_ready(program(key, state, data))
        seconds.append(time.perf_counter() - begin)
    finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.server.trainable))
    return row | {"seconds_per_round": float(np.median(seconds[1:])), "finite": finite}


def language(name: str, *, rehearse: bool) -> Iterator[harness.Row]:
    """Time a round of a workload and what it is compared with, one after the other."""
    work = workloads(rehearse=rehearse)[name]
    federation = federation_of(work)
    lanes, widest = lanes_of(work, federation), max(work.ranks)
    tokens = sum(work.sizes) * work.length
    local, rule, widths = federation.local, federation.rule, mean_widths(federation.state, federation.data)

    def ours(levels: Any) -> Callable[..., State]:
        round_fn = make_round(local, rule, lanes=lanes, rank_levels=levels)
        return lambda *arguments: round_fn(*arguments)[0]

    shared = make_centralised(local, widths=widths, batch_size=min(work.shared_batch, sum(work.sizes)))
    runs: Mapping[str, tuple[Callable[..., State], dict[str, Any]]] = {
        "ours": (ours([max_ranks(federation.task)]), {"lanes": lanes, "rank": f"{min(work.ranks)}-{widest}"}),
        "one adapter": (shared, {"batch_size": work.shared_batch, "rank": str(next(iter(widths.values())))}),
    }
    if name == "ranks":
        low = {path: max(1, widest // 4) for path in widths}
        runs = {
            "ours, two levels": (ours([low, max_ranks(federation.task)]), runs["ours"][1]),
            "ours, all at the mean": (ours([widths]), {"lanes": lanes, "rank": str(next(iter(widths.values())))}),
            **runs,
        }
    for competitor, (function, detail) in runs.items():
        used = federation
        if competitor.endswith("the mean"):
            mean = {path: jnp.full(len(work.ranks), width, jnp.int32) for path, width in widths.items()}
            used = federation._replace(state=federation.state._replace(ranks=mean))
        if competitor == "one adapter":  # whose rounds are given what they return
            server = federation.state.server
            server = server._replace(trainable=narrow(server.trainable, widths))
            used = federation._replace(state=federation.state._replace(server=server))
        measured = timed_rounds(function, used, repeats=1)
        yield {
            "workload": name,
            "competitor": competitor,
            "tokens": tokens,
            "tokens_per_second": tokens / measured["seconds_per_round"],
            **measured,
            **detail,
        }
