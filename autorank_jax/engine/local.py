"""Local training of ONE client: the optimiser step under its rank, the LoRA scale, hooks for local losses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from autorank_jax.adapters.lora import over_columns, over_rows
from autorank_jax.engine.checks import check_built_like, check_losses
from autorank_jax.engine.optimizers import (
    Optimizer,
    begin_optimizer,
    check_optimizer,
    make_transformation,
    params_to_send,
    step_optimizer,
)
from autorank_jax.interface import check_least, checked, describe
from autorank_jax.interface.kinds import is_real
from autorank_jax.types import (
    Adapter,
    Array,
    Batch,
    Client,
    Hparams,
    Key,
    LocalState,
    LocalTraining,
    Penalised,
    PyTree,
    Setting,
    Task,
    Trainable,
    Trains,
)

LocalLoss = Callable[[PyTree, Trainable, Trainable, Batch, Key], Array | Penalised]
"""`(frozen, trainable, start, batch, key) -> (b,)`: a task's loss that may also look at where the client started.

A loss with a penalty returns it apart, in a `Penalised` (see `with_penalty`): only losses are recorded.
"""

Scale = Callable[[Array], Array]
"""LoRA scale of a client by its rank; where ranks differ within a stack, by that of each layer."""


@checked
def alpha_over_rank(alpha: float) -> Scale:
    """Scale by `alpha / rank`, LoRA's own rule (arXiv 2106.09685).

    Args:
        alpha: > 0, the rank whose scale is 1.
    """
    _check_positive("alpha", alpha)
    return lambda rank: alpha / jnp.maximum(rank, 1)


@checked
def alpha_over_sqrt_rank(alpha: float) -> Scale:
    """Scale by `alpha / √rank`, the rank-stabilised rule (arXiv 2312.03732).

    Args:
        alpha: > 0, the scale of rank 1.
    """
    _check_positive("alpha", alpha)
    return lambda rank: alpha / jnp.sqrt(jnp.maximum(rank, 1))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"expected a positive LoRA {name}, got {value}")


def from_task_loss(loss: Callable[[PyTree, Trainable, Batch, Key], Array]) -> LocalLoss:
    """Make a local loss of a task's loss: the start is not looked at."""
    return lambda frozen, trainable, start, batch, key: loss(frozen, trainable, batch, key)  # noqa: ARG005


@checked
def with_penalty(value: Array | Penalised, penalty: float | Array) -> Penalised:
    """Add a penalty to what a local loss returns, and keep it out of the recorded losses.

    Args:
        value: losses `(batch,)`, or what this returned before.
        penalty: a scalar, added to their mean.
    """
    losses, before = value if isinstance(value, Penalised) else (value, jnp.zeros((), value.dtype))
    return Penalised(losses, before + jnp.asarray(penalty, before.dtype))


@checked
def with_proximal_term(loss: LocalLoss, strength: float) -> LocalLoss:
    """Add FedProx's pull to the start, `strength/2 · ‖w - start‖²`, to a local loss (arXiv 1812.06127).

    Args:
        loss: the local loss to add to.
        strength: μ ≥ 0; 0 is the loss itself.

    Raises:
        ValueError: if the strength is negative.
    """
    if not 0 <= strength < float("inf"):
        raise ValueError(f"expected a proximal strength >= 0, got {strength}")

    def proximal(frozen: PyTree, trainable: Trainable, start: Trainable, batch: Batch, key: Key) -> Penalised:
        pairs = zip(jax.tree.leaves(trainable), jax.tree.leaves(start), strict=True)
        distance = jnp.asarray(sum(jnp.sum(jnp.square(w - s)) for w, s in pairs))
        return with_penalty(loss(frozen, trainable, start, batch, key), 0.5 * strength * distance)

    return proximal


@checked
def make_local_training(
    task: Task,
    optimizer: Optimizer,
    *,
    batch_size: int,
    loss: LocalLoss | None = None,
    scale: Scale | None = None,
    report: Callable[[PyTree, Trainable], Trainable] = params_to_send,
) -> LocalTraining:
    """Make the local training of one client.

    The client's matrices are zero beyond its rank and stay so: such positions have zero gradient in both factors, the
    optimiser sees zeros there, and its updates are masked besides. That equals training truncated matrices for every
    optimiser that works element by element or through norms (SGD, Adam(W), Lion, RMSProp, LAMB, LARS, global clipping).
    Adafactor averages second moments over whole rows and columns, so that its steps depend on the maximum rank.

    With a scale `s(rank)` the client computes `x W + s (x A) B'`. It starts from `B' = B / s` and sends `B = s B'`, so
    the scale changes how a client trains and never what its numbers mean to others: the server has no scale.

    Args:
        task: the model.
        optimizer: an optax transformation, or a function that makes one of `State.hparams`, such as
            `lambda h: optax.sgd(h["learning_rate"])`: then a new learning rate compiles nothing. It begins anew with
            every client and round, and so does a schedule inside it; rates by round are `init_state`'s. What optax
            passes as extra arguments it is given: `value`, `grad`, `value_fn`, `grad_fn`, `obj_fn`. Random keys in its
            state follow client and round.
        batch_size: examples per step; the last batch of an epoch may be shorter, and its mean is over what is there.
        loss: what clients minimise; the task's own loss where None. What is recorded leaves penalties out.
        scale: LoRA scale by rank, 1 where None.
        report: `(optimizer state, parameters) -> parameters` that the client sends, for optimisers that train other
            parameters than they mean; the default knows schedule-free ones and SAM.

    Raises:
        TypeError: for what is no task or no optimizer, such as `optax.sgd`, which was not called, or a number.
        ValueError: if the batch size is below 1; when traced, for an optimiser that needs more than it can be given or
            ignores a number of the state, a loss that is not of shape `(b,)`, or a scale that is not one number.
    """
    check_least("batch_size", batch_size)
    check_optimizer(optimizer)
    local_loss = loss or from_task_loss(task.loss)

    def begin(hparams: Hparams, start: Trainable, client: Client) -> LocalState:
        params = _rescale(start, client, scale, inverse=True)
        return LocalState(params, begin_optimizer(make_transformation(optimizer, hparams), params))

    def step(hparams: Hparams, setting: Setting, state: LocalState, batch: Batch, key: Key) -> tuple[LocalState, Array]:
        def mean_loss(params: Trainable) -> tuple[Array, Array]:
            effective = _rescale(_stop(params, setting.trains), setting.client, scale)
            value = local_loss(setting.frozen, effective, setting.start, batch, key)
            losses, penalty = value if isinstance(value, Penalised) else (value, 0)
            check_losses(losses, batch.weight.shape[0], "a local loss", penalty)
            losses = jnp.where(batch.weight > 0, losses, 0)
            return jnp.sum(losses) / jnp.maximum(jnp.sum(batch.weight).astype(losses.dtype), 1) + penalty, losses

        def value_fn(params: Trainable, *_: Any, obj_fn: Any = None, grad_fn: Any = None) -> Array:  # noqa: ARG001
            return mean_loss(params)[0]

        (value, losses), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        about = {"value": value, "grad": grads, "value_fn": value_fn, "obj_fn": value_fn, "grad_fn": jax.grad(value_fn)}
        made = make_transformation(optimizer, hparams)
        updates, memory = step_optimizer(made, grads, state.optimizer, state.params, **about)
        updates = _mask(updates, setting.client.masks, setting.trains)
        return LocalState(optax.apply_updates(state.params, updates), memory), losses

    def end(state: LocalState, client: Client) -> Trainable:
        sent = report(state.optimizer, state.params)
        check_built_like("report", sent, state.params)
        return _rescale(sent, client, scale)

    return LocalTraining(begin, step, end, min(batch_size, jnp.iinfo(jnp.int32).max))


def _rescale(params: Trainable, client: Client, scale: Scale | None, *, inverse: bool = False) -> Trainable:
    """Multiply `lora_b` by the client's scale (or divide), layer by layer."""
    if scale is None:
        return params
    adapters = {}
    for path, adapter in params.adapters.items():
        factor = _number_by_rank(scale, jnp.sum(client.masks[path], axis=-1)).astype(adapter.lora_b.dtype)
        factor = factor.reshape((*factor.shape, *(1,) * (adapter.lora_b.ndim - factor.ndim)))
        adapters[path] = adapter._replace(lora_b=adapter.lora_b / factor if inverse else adapter.lora_b * factor)
    return params._replace(adapters=adapters)


def _number_by_rank(scale: Scale, rank: Array) -> Array:
    """Return the scale of a rank, or of each layer's in a stack."""
    if jnp.ndim(rank):
        return jax.vmap(lambda layer: _number_by_rank(scale, layer))(rank)
    factor = scale(rank)
    if jnp.shape(factor) or (is_real(factor) and not 0 < abs(factor) < float("inf")):
        raise ValueError(f"expected a LoRA scale of one finite number, not 0, by rank, got {describe(factor)}")
    return jnp.asarray(factor)


def _stop(params: Trainable, trains: Trains) -> Trainable:
    """Cut the gradient of what a rule does not let clients train."""

    def gate(tree: Any, flag: bool | Array) -> Any:
        if flag is True:
            return tree
        stopped = lax.stop_gradient(tree)
        return stopped if flag is False else jax.tree.map(lambda x, s: jnp.where(flag, x, s), tree, stopped)

    adapters = {
        p: Adapter(gate(a.lora_a, trains.lora_a), gate(a.lora_b, trains.lora_b)) for p, a in params.adapters.items()
    }
    return Trainable(adapters, gate(params.dense, trains.dense))


def _mask(updates: Trainable, masks: dict[str, Array], trains: Trains) -> Trainable:
    """Zero the updates of rank positions a client does not own and of what it does not train."""

    def gate(leaf: Array, flag: bool | Array) -> Array:
        return leaf if flag is True else jnp.where(flag, leaf, 0)

    adapters = {
        p: Adapter(
            gate(a.lora_a * over_columns(masks[p].astype(a.lora_a.dtype), a.lora_a), trains.lora_a),
            gate(a.lora_b * over_rows(masks[p].astype(a.lora_b.dtype), a.lora_b), trains.lora_b),
        )
        for p, a in updates.adapters.items()
    }
    return Trainable(adapters, jax.tree.map(lambda leaf: gate(leaf, trains.dense), updates.dense))
