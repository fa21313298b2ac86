"""What speaks against scores, and with them ranks: clients that hardly differ, or that the probe could not train."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.experiment.results import Scores
from autorank_jax.ranks import mcda
from autorank_jax.ranks.criteria import CRITERIA, NEEDS_LOSSES, are_equal
from autorank_jax.types import Array, ClientStats

ROUNDING = 100 * float(np.finfo(np.float32).eps)
"""What float32 may change of a criterion near 1, a hundred times."""
LEAST_VARIATION = 0.05
"""Standard deviation over mean, of the criterion of which it is largest; below it, clients are as good as equal."""
DRAWS = 20
MOST_CLIENTS = 200
"""Of which pairs are looked at."""


def variation(matrix: np.ndarray) -> np.ndarray:
    """Return by how much each criterion varies between clients: standard deviation over mean, `(criteria,)`."""
    mean = np.abs(matrix).mean(axis=0)
    return np.divide(matrix.std(axis=0), mean, out=np.zeros(matrix.shape[1]), where=mean > 0)


def little_variation(criteria: Sequence[str], matrix: np.ndarray) -> str:
    """Say by how much criteria vary, if it is little; nothing of one client."""
    values = variation(np.asarray(matrix, np.float64))
    if len(matrix) < 2 or not len(values) or not values.max() < LEAST_VARIATION:
        return ""
    if are_equal(matrix):
        return "no criterion differs between clients: all get the full rank"
    most = int(values.argmax())
    return (
        f"the criteria hardly vary between clients, at most by {100 * values[most]:.2g} % (standard deviation over "
        f"mean of {criteria[most]}), and scores are relative: the least client gets the smallest rank all the same"
    )


def without_curves(lost: int, clients: int) -> str:
    """Say how many clients the probe could not train, if any."""
    if not lost:
        return ""
    then = "they take the mean of the others' loss entropy" if lost < clients else "loss entropy tells nothing"
    return (
        f"the training of {lost} of {clients} clients was not finite in the probe, so that {then}; probably the "
        "learning rate is too large"
    )


def rounded_losses(criteria: Sequence[str], matrix: np.ndarray) -> str:
    """Say by how much the entropies of the losses differ, if it is hardly more than rounding; nothing of one client."""
    columns = [matrix[:, place] for place, name in enumerate(criteria) if name in NEEDS_LOSSES]
    apart = max((float(np.ptp(column)) for column in columns), default=1.0)
    if len(matrix) < 2 or not 0 < apart < ROUNDING:
        return ""
    return (
        f"loss entropy differs by {apart:.1g} between clients, hardly more than rounding, and scores are relative: the "
        "probe trained too little; more --probe-epochs or --probe-share, or --criteria without it"
    )


def swapped_pairs(scores: Scores, *, seed: int = 0) -> float:
    """Return which share of all pairs of clients would change places if their examples were drawn anew; ½ is chance.

    Each count of a label is drawn from a Poisson distribution of that mean (a bootstrap of the examples); what no
    label says, the entropy of losses, stays.

    Args:
        scores: of one seed, with scores.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(scores.size))[:MOST_CLIENTS])
    counts = rng.poisson(scores.label_counts[chosen], (DRAWS, *scores.label_counts[chosen].shape)).astype(np.int32)
    kept = jnp.asarray(scores.matrix[chosen], jnp.float32)

    def closeness(label_counts: Array) -> Array:
        size = jnp.sum(label_counts, axis=1)
        ones, present = jnp.ones(size.shape, jnp.float32), jnp.ones(size.shape, bool)
        stats = ClientStats(size, label_counts, None, None, None, max_ratio=ones, where=present)
        columns = [
            kept[:, place] if name in NEEDS_LOSSES else CRITERIA[name](stats).astype(jnp.float32)
            for place, name in enumerate(scores.criteria)
        ]
        matrix = jnp.stack(columns, axis=1)
        return mcda.topsis(matrix, mcda.critic_weights(matrix))

    drawn = np.asarray(jax.jit(jax.vmap(closeness))(jnp.asarray(counts)))
    assert scores.closeness is not None
    before, after = _order(scores.closeness[chosen]), _order(drawn)
    pairs = np.triu_indices(len(chosen), 1)
    return float(np.mean((before != after)[..., pairs[0], pairs[1]]))


def _order(values: np.ndarray) -> np.ndarray:
    """Return whether each is above each other, `(..., clients, clients)`."""
    return np.asarray(values[..., :, None] > values[..., None, :])


def doubts(scores: Scores) -> Iterator[str]:
    """Yield what speaks against the ranks of a seed, and what one rank for all would do; nothing mostly."""
    if scores.unprobed:
        yield without_curves(scores.unprobed, len(scores.size))
    if scores.closeness is not None and (rounded := rounded_losses(scores.criteria, scores.matrix)):
        yield rounded
    little = little_variation(scores.criteria, scores.matrix) if scores.closeness is not None else ""
    if not little or not set(scores.criteria) <= set(CRITERIA):
        return
    if are_equal(scores.matrix):
        yield little
        return
    policy = "autorank" if "autorank" in scores.ratios else next(iter(scores.ratios))
    yield (
        f"{little}; {100 * swapped_pairs(scores):.0f} % of all pairs of clients would change places if their examples "
        "were drawn anew, 50 % is chance"
    )
    yield (
        f"one rank for all, at ratio {scores.ratios[policy].mean():.2f}, sends about the same bytes and owes nothing "
        "to chance: --rank-policies uniform_bytes"
    )
