"""Tasks of causal decoders: completions are what is learnt, weighted by tokens, without an array of all logits."""

from typing import Any

import jax
import jax.numpy as jnp

from autorank_jax.adapters.low_rank import LowRank, linear_form
from autorank_jax.adapters.selection import MaxRank, Where, choose_parameters, choose_ranks
from autorank_jax.adapters.task import Flat, Model, Reading, cast, make_task
from autorank_jax.interface import check_least, checked
from autorank_jax.models.causal_lm import CausalLM, causal_logits, causal_losses, check_inputs
from autorank_jax.models.quantized import Quantized
from autorank_jax.types import Adapter, Array, Batch, Key, PyTree, Scored, Task, Trainable


@checked
def task_from_causal_lm(
    model: CausalLM,
    *,
    max_rank: MaxRank,
    where: Where = "layers/*",
    key: Key | int = 0,
    train_dense: str | tuple[str, ...] = (),
    checkpoint: bool = True,
    chunk: int = 128,
) -> Task:
    """Make a task of a causal decoder: adapters on its projections, everything else frozen.

    Each of the projections (`layers/self_attn/q_proj` and so on) is one stack over the blocks, with one adapter, whose
    layers share one rank. The arithmetic is in the dtype of the weights; factors stay float32. Inputs are ids
    `(b, length)` or `Tokens`, targets the tokens that follow, negative where they do not count. Quantised matrices stay
    as they are, so rules that merge into the base are refused.

    The loss is that of the completions, weighted by tokens: what a step minimises, the mean over its batch, is
    `Σ nats of counted tokens / counted tokens`. So the loss of one example depends on the others in its batch.

    Args:
        model: as `load_causal_lm` returns it.
        max_rank: maximum rank, or one by path pattern: `{"*/q_proj": 16, "*/v_proj": 16}`.
        where: path patterns, or a predicate `(path, kernel) -> bool`; an output layer that is not tied is `lm_head`.
        key: random key of the adapters' start values.
        train_dense: patterns of parameters that are trained whole, such as `"*norm/scale"`.
        checkpoint: compute the activations of each block again in the backward pass instead of keeping them.
        chunk: positions whose logits exist at a time.

    Returns:
        The task. `merge` gives a `CausalLM`, adapted matrices in floats, `export_peft(..., names=models.causal_name)`
        what `peft` loads. `task.predict(frozen, trainable, inputs)` gives logits, and with `Scored(inputs, targets)`
        for inputs nats.

    Raises:
        ValueError: if a pattern matches no projection or no parameter, or what is trained whole is quantised.
    """
    check_least("chunk", chunk)
    key = jax.random.key(key) if isinstance(key, int) else key
    kernels = {name.removesuffix("/kernel"): value for name, value in model.params.items() if name.endswith("/kernel")}
    others = {name.rpartition("/")[0]: value for name, value in model.params.items() if not name.endswith("/kernel")}
    ranks = choose_ranks(kernels, others, max_rank, where)
    weights = {path: f"{path}/kernel" for path in ranks}
    forms = {path: linear_form(kernels[path].shape, stacked=kernels[path].ndim - 2) for path in ranks}
    dense = choose_parameters([name for name in model.params if name not in weights.values()], train_dense)
    quantized = {name: value.form[0] for name, value in model.params.items() if isinstance(value, Quantized)}
    if dense & quantized.keys():
        name = min(dense & quantized.keys())
        raise ValueError(
            f"expected train_dense patterns of floats, got {train_dense!r} with {name!r} as {quantized[name]}"
        )
    dtype = model.params["embed_tokens/embedding"].dtype

    def run(training: bool, values: Flat, adapters: dict[str, Adapter], inputs: PyTree, key: Key | None) -> PyTree:  # noqa: ARG001
        check_inputs(model.config, inputs.inputs if isinstance(inputs, Scored) else inputs)
        params: dict[str, Any] = {n: v if n in quantized else cast(v, dtype) for n, v in values.items()}
        for path, adapter in cast(adapters, dtype).items():
            params[weights[path]] = LowRank(params[weights[path]], *adapter)
        if isinstance(inputs, Scored):
            return causal_losses(model.config, params, inputs, checkpoint=checkpoint and training, chunk=chunk)
        return causal_logits(model.config, params, inputs, checkpoint=checkpoint and training)

    made = Model(dict(model.params), weights, forms, run, lambda flat: model._replace(params=flat), quantized)
    unadapted = {path: "no pattern takes it" for path in kernels if path not in ranks and f"{path}/kernel" not in dense}
    reading = Reading(token_weighted, lambda inputs: inputs)  # losses come from `loss` below
    task = make_task(made, ranks, dense, key=key, reading=reading, unadapted=unadapted)

    def loss(frozen: PyTree, trainable: Trainable, batch: Batch, key: Key) -> Array:
        nats = task.predict(frozen, trainable, Scored(batch.inputs, batch.targets), key)
        return token_weighted(nats, batch)

    return task._replace(loss=loss, check=lambda inputs: check_inputs(model.config, inputs))


@checked
def token_weighted(nats: Array, batch: Batch) -> Array:
    """Return losses of examples whose mean over the batch is the mean over its counted tokens.

    Args:
        nats: `(b, length)` of each token, 0 where not counted.
        batch: its targets are negative where a token is not counted; examples of weight 0 do not count at all.

    Returns:
        `(b,)`: `Σ_t nats · examples / counted tokens`.
    """
    real = (batch.weight > 0).astype(nats.dtype)
    counted = jnp.sum((batch.targets >= 0).astype(nats.dtype), axis=-1)
    share = jnp.sum(real) / jnp.maximum(jnp.sum(counted * real), 1)
    return jnp.sum(nats, axis=-1) * share
