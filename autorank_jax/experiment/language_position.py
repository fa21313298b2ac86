"""Where a federation of a language model stands, to checkpoints and back."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.checkpoint import read_about, restore_state, save_state, saved_steps
from autorank_jax.experiment.checkpoints import Checkpoints, differences
from autorank_jax.experiment.language_options import LANGUAGE_BEFORE, LanguageOptions
from autorank_jax.experiment.language_results import LanguageRow
from autorank_jax.experiment.language_setup import Parts, begin
from autorank_jax.experiment.launch import describe_machine
from autorank_jax.experiment.mistakes import ConfigurationError
from autorank_jax.types import Array, PyTree, State


class LanguagePosition(NamedTuple):
    """All that a checkpoint has to hold; the base weights too where the rule merges into them."""

    rows: tuple[LanguageRow, ...]  # from round 0
    state: State
    ratios: Array  # (clients,)
    weights: Mapping[str, float]  # CRITIC weights by criterion
    probe_flops: float
    before: Array  # (clients,) perplexities
    words: Array  # (tokens,) what the model went on with before

    @property
    def round(self) -> int:
        """Rounds done."""
        return self.rows[-1].round


Save = Callable[[LanguagePosition, bool], None]
"""Called after every round with where it stands, and whether this is the last chance to save it."""


def make_save(checkpoints: Checkpoints | None, options: LanguageOptions, parts: Parts) -> Save:
    """Return what is called after every round: it saves when it is time to, and when there is no later chance."""
    if checkpoints is None:
        return lambda position, last_chance: None  # noqa: ARG005
    known: list[dict[str, Any]] = []  # checksums take a while: once, and only where something is saved

    def save(position: LanguagePosition, last_chance: bool) -> None:
        if not (last_chance or checkpoints.due(position.round, over=position.round == options.rounds)):
            return
        if not known:
            known.append(belongs_to(options, parts))
        extra = {
            "rows": [row._asdict() for row in position.rows],
            "weights": dict(position.weights),
            "probe_flops": position.probe_flops,
            "about": describe_machine(None),
        }
        save_state(
            checkpoints.folder,
            _arrays(parts, position.state, position.ratios, position.before, position.words),
            step=position.round,
            config=known[0],
            extra=extra,
            keep=checkpoints.keep,
        )

    return save


def restore(
    checkpoints: Checkpoints | None, options: LanguageOptions, parts: Parts
) -> tuple[LanguagePosition | None, tuple[str, ...]]:
    """Return where it stood at its latest checkpoint, and what differs in device and versions since.

    Another number of rounds may be asked for than before: nothing in a round depends on how many there are.

    Raises:
        ConfigurationError: for fewer rounds than are done.
        CheckpointError: for checkpoints of something else, damaged ones, or those of a newer version.
    """
    if checkpoints is None or not saved_steps(checkpoints.folder):
        return None, ()
    config = belongs_to(options, parts)
    extra = read_about(checkpoints.folder, config=config).extra
    rows = tuple(LanguageRow(**row) for row in extra["rows"])
    if options.rounds < rows[-1].round:
        raise ConfigurationError(
            [f"rounds: expected at least the {rows[-1].round} that are done, got {options.rounds}"]
        )
    begun = begin(options, parts, None)
    clients = jnp.zeros(len(parts.names), jnp.float32)
    like = _arrays(parts, begun, clients, clients, jnp.zeros(options.tokens, jnp.int32))
    held = restore_state(checkpoints.folder, like, config=config).state
    frozen = begun.server.frozen
    if held["kernels"]:
        frozen = frozen._replace(kernels=held["kernels"])
    state = held["state"]._replace(server=held["state"].server._replace(frozen=frozen))
    position = LanguagePosition(
        rows, state, held["ratios"], extra["weights"], extra["probe_flops"], held["before"], held["words"]
    )
    return position, differences(extra["about"], describe_machine(None))


def _arrays(parts: Parts, state: State, ratios: Array, before: Array, words: Array) -> dict[str, PyTree]:
    """Return what a checkpoint holds: base weights only where the rule changes them."""
    kernels = state.server.frozen.kernels if parts.rule.traffic.down.kernels else {}
    slim = state._replace(server=state.server._replace(frozen=()))
    return {"state": slim, "kernels": kernels, "ratios": ratios, "before": before, "words": words}


def belongs_to(options: LanguageOptions, parts: Parts) -> dict[str, Any]:
    """Return what a checkpoint must agree in: all options but the rounds, and what the files hold in place of names."""
    config = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in ("model", "data", "rounds")
    }
    if options.quantize == "none":  # neither is in older checkpoints
        del config["quantize"]
    if options.probe_share == LANGUAGE_BEFORE["probe_share"]:
        del config["probe_share"]
    texts = [(data.inputs, data.targets, data.order, data.size) for data in (parts.data, parts.held_out)]
    return config | {
        "checksum of the weights": _checksum(parts.task.server.frozen),
        "checksum of the texts": _checksum(texts),
    }


def _checksum(tree: PyTree) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]
