"""What one training step of one client takes: memory, and products, which kernel launches go with.

Both are read off the traced gradient: nothing is compiled or run.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Var

from autorank_jax.types import Batch, FederatedData, PyTree, Task, Trainable

_LANE_COPIES = 4  # of the parameters: their start, their values, two moments of an optimiser; gradients are in the step


class Footprint(NamedTuple):
    """What a client's training takes."""

    bytes: int  # of one lane: parameters, optimiser, a batch, and the most that a step holds at a time
    products: int  # matrix products and convolutions of a step, in loops as often as they run


def training_footprint(task: Task, data: FederatedData, *, batch_size: int) -> Footprint:
    """Estimate what one client takes in training at full rank.

    Frozen weights, and what is computed of them alone, are shared by all clients and not counted. Nothing is taken to
    be fused, so that programs mostly need less.

    Args:
        task: the model.
        data: for the shapes of inputs and targets.
        batch_size: examples per step.
    """
    inputs, targets = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), (data.inputs, data.targets)
    )
    batch = Batch(inputs, targets, jax.eval_shape(lambda: jnp.ones(batch_size, jnp.float32)))
    trained = jax.eval_shape(lambda: task.server.trainable)

    def gradient(trained: Trainable, batch: Batch) -> Trainable:
        key = jax.random.key(0)
        return jax.grad(lambda t: jnp.sum(task.loss(task.server.frozen, t, batch, key)))(trained)

    jaxpr = jax.make_jaxpr(gradient)(trained, batch).jaxpr
    held = _LANE_COPIES * _bytes_of(jax.tree.leaves(trained)) + _bytes_of(jax.tree.leaves(batch))
    return Footprint(held + _peak(jaxpr, set(jaxpr.invars)), _products(jaxpr))


def _peak(jaxpr: Jaxpr, own: set[Var]) -> int:
    """Return the most bytes that are alive at a time of what follows from a client's `own` inputs, these left out."""
    last = {var: number for number, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if isinstance(var, Var)}
    last |= dict.fromkeys((var for var in jaxpr.outvars if isinstance(var, Var)), len(jaxpr.eqns))
    given, own, alive, peak = frozenset(own), set(own), dict[Var, int](), 0
    for number, eqn in enumerate(jaxpr.eqns):
        flags = [isinstance(var, Var) and var in own for var in eqn.invars]
        if any(flags):
            inside = max((_peak(sub, _own_inputs(eqn, sub, flags)) for sub in _inner(eqn)), default=0)
            own.update(eqn.outvars)
            alive |= {var: _bytes_of([var.aval]) for var in eqn.outvars}
            peak = max(peak, sum(alive.values()) + inside)
        for var in (*eqn.invars, *eqn.outvars):
            if isinstance(var, Var) and var not in given and last.get(var, -1) <= number:
                alive.pop(var, None)
    return peak


def _own_inputs(eqn: Any, sub: Jaxpr, flags: Sequence[bool]) -> set[Var]:
    """Return which inputs of a computation inside another are a client's own.

    Its operands are the last ones of the equation; what loops carry may become a client's own.
    """
    known = list(flags)[-len(sub.invars) :] if sub.invars else []
    fixed = {"scan": "num_consts", "while": "body_nconsts"}.get(eqn.primitive.name)
    if fixed is not None:
        consts = eqn.params[fixed]
        carried = consts + eqn.params.get("num_carry", len(sub.invars) - consts)
        known = [flag or consts <= place < carried for place, flag in enumerate(known)]
    return {var for var, flag in zip(sub.invars[-len(known) :], known, strict=False) if flag}


def _products(jaxpr: Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name in ("dot_general", "conv_general_dilated")
        total += eqn.params.get("length", 1) * sum(map(_products, _inner(eqn)))
    return total


def _inner(eqn: Any) -> Iterator[Any]:
    """Yield the computations inside an equation: bodies of loops, branches, calls."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield inner


def _bytes_of(leaves: Sequence[PyTree]) -> int:
    return sum(math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8) for leaf in leaves)
