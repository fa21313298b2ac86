"""Clients' optimisers: what they are made of and given, whose parameters are sent, and random numbers of their own.

A client's optimiser is any optax transformation. It begins anew with every client in every round, so a schedule inside
it counts local steps and restarts each round; a learning rate by *round* belongs into the state,
`init_state(..., learning_rate=optax.cosine_decay_schedule(0.1, 100))`.
"""

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from autorank_jax.adapters.selection import dense_names
from autorank_jax.interface import FOREIGN_FAILURES, checked, describe, first_line
from autorank_jax.interface.kinds import is_real, takes
from autorank_jax.types import Adapter, Array, Hparams, Key, PyTree, Trainable

Optimizer: TypeAlias = "optax.GradientTransformation | Callable[[Hparams], optax.GradientTransformation]"
"""A client's optimiser, or a function that makes it of `State.hparams`."""

LEARNING_RATE = 0.01
"""Of an optimiser made of `hparams`, where the state gives none."""

_RATE = "learning_rate"
_OF_STATES = (_RATE, "local_epochs", "max_epochs", "clients")  # arguments of init_state
_MEANT = {"lr": _RATE, "eta": _RATE, "step_size": _RATE, "epochs": "local_epochs"}

_OWN_KEYS = 0x6F707469  # fold_in tag: keys of optimisers never meet those of steps, whose identities count from 0


_FAILURES = (AssertionError, *FOREIGN_FAILURES)
"""What optimisers raise, when traced, on parameters or arguments that they were not made for."""


class _Given(dict):
    """Hyper-parameters that know which of them were asked for."""

    def __init__(self, numbers: Mapping[str, Array]) -> None:
        super().__init__(numbers)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Array:
        self.asked.add(name)
        if not super().__contains__(name):
            near = difflib.get_close_matches(name, self, n=1)
            meant = f", probably {near[0]!r}" if near else f": init_state(..., {name}=...) gives it"
            raise ValueError(
                f"expected hparams {sorted(self)}, which the state has, got {name!r} of the optimizer{meant}"
            )
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def items(self) -> Any:
        self.asked.update(super().keys())
        return super().items()

    def __iter__(self) -> Iterator[str]:  # of **hparams
        self.asked.update(self.keys())
        return super().__iter__()


def check_optimizer(optimizer: Any) -> None:
    """Raise `TypeError` unless something is an optimiser, or a function of the hyper-parameters, as far as it says."""
    if isinstance(optimizer, optax.GradientTransformation):
        return
    made = getattr(optimizer, "func", optimizer)  # of a functools.partial
    own = callable(optimizer) and not str(getattr(made, "__module__", "")).startswith("optax")
    if own and takes(optimizer, 1):
        return
    cause = ""
    if isinstance(optimizer, optax.MultiSteps):
        cause = ", probably one step too early: .gradient_transformation()"
    elif own:
        cause = ", which takes other arguments"
    elif callable(optimizer):
        name = getattr(made, "__name__", "optimizer")
        cause = f', probably not called: optax.{name}(...), or lambda h: optax.{name}(h["learning_rate"])'
    elif is_real(optimizer):
        cause = f", probably its learning rate alone: optax.sgd({optimizer})"
    raise TypeError(
        f"expected an optimizer as optax makes them, or a function of hparams, got {describe(optimizer)}{cause}"
    )


def make_transformation(optimizer: Optimizer, hparams: Hparams) -> optax.GradientTransformationExtraArgs:
    """Return the optimiser for these hyper-parameters.

    Raises:
        TypeError: for what is no optimiser.
        ValueError: if it asks for a number that the state does not have, or the state has one besides `local_epochs`
            that it does not ask for when it is made.
    """
    if isinstance(optimizer, optax.GradientTransformation):
        made, asked = optimizer, set[str]()
    else:
        given = _Given({_RATE: jnp.asarray(LEARNING_RATE, jnp.result_type(float)), **hparams})
        made, asked = _call(optimizer, given), given.asked
    if not isinstance(made, optax.GradientTransformation):
        raise TypeError(
            f"expected an optimizer as optax makes them, got {describe(made)}"
            + ", probably of a function that does not return it" * (made is None)
        )
    for name in sorted(hparams.keys() - asked - {"local_epochs"}):
        known = sorted({*_OF_STATES, *asked} - {name})
        near = [_MEANT[name]] if name in _MEANT else difflib.get_close_matches(name, known, n=1)
        if near:
            raise ValueError(f"expected hparams that the optimizer asks for, got {name!r}, probably {near[0]!r}")
        raise ValueError(
            f"expected an optimizer that uses the state's {name}, got one that ignores it: make it like "
            f'lambda h: optax.sgd(h["{_RATE}"]), or leave {name} out of init_state'
        )
    return optax.with_extra_args_support(made)


def _call(optimizer: Callable[[Hparams], Any], given: Hparams) -> Any:
    try:
        return optimizer(given)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise TypeError(
            f"expected an optimizer, or a function that makes one of hparams, got one that fails with "
            f"{first_line(error)}; "
            'of hparams it takes what it needs: lambda h: optax.sgd(h["learning_rate"])'
        ) from error


def begin_optimizer(optimizer: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Return the optimiser's first state.

    Raises:
        ValueError: for an optimiser that wants parameters of another form, or whose state is not of arrays.
    """
    try:
        return jax.tree.map(jnp.asarray, optimizer.init(params))
    except _FAILURES as error:
        raise ValueError(_refusal("start on", error)) from error


def step_optimizer(
    optimizer: optax.GradientTransformationExtraArgs,
    grads: PyTree,
    memory: PyTree,
    params: PyTree,
    **about_loss: Any,
) -> tuple[PyTree, PyTree]:
    """Return the optimiser's updates and its next state.

    Args:
        optimizer: of clients told the loss too, if it asks: `value`, `grad`, `value_fn` and so on.
        grads: of the mean loss.
        memory: its state.
        params: what they are the gradients of.
        **about_loss: what optax's extra arguments may ask for.

    Raises:
        ValueError: for one that needs more than that, or whose state changes its types.
    """
    asked = inspect.signature(optimizer.update).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in asked):
        about_loss = {p.name: about_loss[p.name] for p in asked if p.name in about_loss}
    try:
        updates, after = optimizer.update(grads, memory, params, **about_loss)
    except _FAILURES as error:
        raise ValueError(_refusal("make updates of", error)) from error
    if _structures(after, updates) != _structures(memory, params) or _shapes(after, updates) != _shapes(memory, params):
        raise ValueError(
            "expected an optimizer whose updates are built like the parameters and whose state like the one before, "
            "got another structure or other shapes; of one for parameters of its own, such as optax.lookahead, use the "
            "optimizer inside"
        )
    return updates, jax.tree.map(_keep_type, after, memory)


def _refusal(what: str, error: Exception) -> str:
    return (
        f"expected an optimizer of gradients and parameters, got one that cannot {what} them "
        f"({first_line(error)}); of one for parameters of its own, such as optax.lookahead, use the optimizer inside"
    )


def _structures(*trees: PyTree) -> tuple:
    return tuple(map(jax.tree.structure, trees))


def _shapes(*trees: PyTree) -> list[tuple[int, ...]]:
    return list(map(jnp.shape, jax.tree.leaves(trees)))


def _keep_type(new: Array, old: Array) -> Array:
    new = jnp.asarray(new)
    return new if new.dtype == old.dtype else new.astype(old.dtype)


def params_to_send(memory: PyTree, params: Trainable) -> Trainable:
    """Return the parameters that an optimiser means, where these are not those that it trains.

    Known are `optax.contrib.schedule_free`, which trains at a point between its average and its last iterate, and
    `optax.contrib.sam`, which may be at an adversarial point; of any other the parameters themselves are sent.
    """
    for state in _of_others(memory):
        if isinstance(state, contrib.ScheduleFreeState):
            if _structures(state.z) != _structures(params):
                raise ValueError(
                    "expected schedule_free of all parameters, got it of a part of them, as inside optax.partition: "
                    "say what is sent with make_local_training(report=...)"
                )
            params = contrib.schedule_free_eval_params(state, params)
        elif isinstance(state, contrib.SAMState) and state.cache is not None:
            away = state.steps_since_sync > 0
            params = jax.tree.map(lambda kept, now, away=away: jnp.where(away, kept, now), state.cache, params)
    return params


def means_others(memory: PyTree) -> bool:
    """Return whether an optimiser is known to mean other parameters than those that it trains."""
    return bool(_of_others(memory))


def _of_others(memory: PyTree) -> list[Any]:
    kinds = (contrib.ScheduleFreeState, contrib.SAMState)
    leaves = jax.tree.leaves(memory, is_leaf=lambda node: isinstance(node, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def follow_client(memory: PyTree, key: Key) -> PyTree:
    """Make the random keys in a fresh optimiser state follow client and round.

    Args:
        memory: the state, with typed or raw keys.
        key: of the client in this round.
    """

    def renew(number: int, leaf: Array) -> Array:
        axes = _axes_of_keys(leaf)
        if axes is None:
            return leaf
        word = jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, _OWN_KEYS), number), (), jnp.uint32)
        fold: Callable[[Array], Array] = lambda one: jax.random.fold_in(one, word)  # noqa: E731
        for _ in range(axes):
            fold = jax.vmap(fold)
        return fold(leaf)

    leaves, structure = jax.tree.flatten(memory)
    return jax.tree.unflatten(structure, [renew(number, leaf) for number, leaf in enumerate(leaves)])


def _axes_of_keys(leaf: Array) -> int | None:
    """Return the axes of an array of keys, 0 of one key, None of what is no key; raw keys have one more of words."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf.ndim
    words = jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape
    return leaf.ndim - 1 if leaf.dtype == jnp.uint32 and leaf.shape[-1:] == words else None


@checked
def scale_updates(
    *, lora_a: float = 1.0, lora_b: float = 1.0, dense: float = 1.0, layers: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Scale what an optimiser does to parts of the model: rates by factor and by layer.

    `optax.chain(optax.adam(1e-3), scale_updates(lora_b=16))` is LoRA+ (arXiv 2402.12354), which lets `lora_b` learn
    faster; `scale_updates(layers={"head*": 0.1})` slows a head down.

    Args:
        lora_a: factor of the updates of every `lora_a`.
        lora_b: likewise.
        dense: of what is trained whole.
        layers: factors by pattern of the path of an adapter or a dense parameter, times those above; the first
            pattern that matches counts.

    Raises:
        ValueError: for a factor that is negative; when it begins, for a pattern that matches nothing.
    """
    patterns = dict(layers or {})
    for name, factor in {"lora_a": lora_a, "lora_b": lora_b, "dense": dense, **patterns}.items():
        if not 0 <= factor < float("inf"):
            raise ValueError(f"expected factors of updates >= 0, got {factor} for {name!r}")

    def of_layer(path: str) -> float:
        return next((factor for pattern, factor in patterns.items() if fnmatchcase(path, pattern)), 1.0)

    def init(params: Trainable) -> optax.EmptyState:
        names = [*params.adapters, *dense_names(params.dense)]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"expected patterns that match a layer or a dense parameter, got {pattern!r}: there are "
                    f"{sorted(names)}"
                )
        return optax.EmptyState()

    def update(updates: Trainable, state: optax.EmptyState, params: Any = None) -> tuple[Trainable, optax.EmptyState]:  # noqa: ARG001
        adapters = {
            path: Adapter(a.lora_a * (lora_a * of_layer(path)), a.lora_b * (lora_b * of_layer(path)))
            for path, a in updates.adapters.items()
        }
        leaves, structure = jax.tree.flatten(updates.dense)
        scaled = [
            leaf * (dense * of_layer(name)) for name, leaf in zip(dense_names(updates.dense), leaves, strict=True)
        ]
        return Trainable(adapters, jax.tree.unflatten(structure, scaled)), state

    return optax.GradientTransformation(init, update)


def at_round(hparams: Hparams, number: Array) -> Hparams:
    """Return the hyper-parameters of a round: schedules are called with its number, from 0.

    Raises:
        ValueError: for a schedule that gives no number for a traced round, or a learning rate that is an array.
    """
    now = {n: _scheduled(n, value, number) if callable(value) else value for n, value in hparams.items()}
    shape = jnp.shape(now.get(_RATE, 0))
    if shape:
        raise ValueError(f"expected one learning_rate in a round, got shape {shape}: jax.vmap runs several")
    return now


def _scheduled(name: str, schedule: Callable[[Array], Any], number: Array) -> Array:
    try:
        return jnp.asarray(schedule(number), jnp.result_type(float))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected {name} as a schedule that gives a number for a traced round, got one that fails with "
            f"{first_line(error)}; jnp.where and optax.join_schedules take the place of if"
        ) from error
