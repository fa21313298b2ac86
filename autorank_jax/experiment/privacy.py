"""Differential privacy of an experiment: the noise that a budget needs, and what is spent after every round."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from autorank_jax.evaluation import privacy
from autorank_jax.experiment.names import AGGREGATORS, DIFFERENTIALLY_PRIVATE

RANKS = ("public", "private")
RELEASE_SHARE = 0.1
"""Of the budget, for the label counts behind private ranks."""


class Privacy(NamedTuple):
    """What is promised, and the noise that keeps it."""

    epsilon: float  # the budget
    delta: float
    rate: float  # share of the clients expected in a round
    clients: int | None  # all, where cohorts have a fixed size; None for independent draws
    noise: float  # of the rounds, over the clipping norm
    release: float | None  # of the label counts, likewise; None where ranks are public

    def spent(self, rounds: int) -> float:
        """Return ε after some rounds."""
        return privacy.spent_epsilon(
            self.noise, rounds, self.delta, rate=self.rate, clients=self.clients, release=self.release
        )

    @property
    def promise(self) -> str:
        """Return in one sentence what is promised, of whom, and under which assumption."""
        if self.clients is not None:
            neighbours = "with any one client's data in place of another's"
        elif self.release is not None:
            neighbours = "with the data of any one client or without them"
        else:
            neighbours = "with or without any one client"
        if self.release is None:
            ranks = "ranks are public (those computed from clients' data are not covered)"
        else:
            ranks = "ranks come from noisy label counts, which files show"
        sampled = "each by itself" if self.clients is None else "as a fixed number of all"
        return (
            f"Differential privacy of clients: whatever is seen of the models of all rounds of one run is at most e^ε "
            f"times as probable {neighbours}, but for δ: ε = {self.epsilon:g}, δ = {self.delta:g}, noise of "
            f"{self.noise:.3g} times the clipping norm; several runs (policies, rules, seeds) together spend more. It "
            f"holds if the server is trusted, the number of clients is public, who takes part is secret and drawn "
            f"{sampled} (here {100 * self.rate:g} %), {ranks}, and nobody sees or guesses the seed, of which the noise "
            "is drawn. Test data, the choice of options, and the losses, counts and costs that a round reports are not "
            "private."
        )


def problems(e: Any) -> Iterable[str]:
    """Yield a line for what cannot be private among an experiment's options; unknown rules are told elsewhere."""
    for rule in e.aggregators:
        if rule in AGGREGATORS and rule not in DIFFERENTIALLY_PRIVATE:
            yield (
                f"aggregators: expected one of {', '.join(DIFFERENTIALLY_PRIVATE)} beside --dp-epsilon, got {rule}, "
                "which is not done privately; use --aggregators rbla"
            )
    for option, wrong in (("clip_norm", e.clip_norm), ("rerank_every", e.rerank_every)):
        if wrong:
            yield f"{option.replace('_', '-')}: expected it without --dp-epsilon, got both"
    if e.sampling == "by_size" and e.participation < 1:
        yield "sampling: expected uniform or independent with --dp-epsilon, got by_size, of which ε is not known"
    if e.dp_ranks == "private" and e.probed:
        yield (
            "criteria: expected them without loss_entropy where ranks are private, got it: a probe would cost a "
            "budget of its own; use --criteria size,classes,label_entropy,gini_simpson"
        )
    if e.dp_delta * e.clients >= 1:
        yield f"dp-delta: expected less than 1 / {e.clients} clients, got {e.dp_delta:g}, which promises nothing"


@lru_cache
def make_privacy(
    epsilon: float, delta: float, noise: float, ranks: str, *, rounds: int, rate: float, clients: int | None
) -> Privacy:
    """Return the privacy of an experiment.

    Args:
        epsilon: budget ε > 0.
        delta: δ.
        noise: multiplier of the rounds' noise; where 0, the least that keeps the budget for all rounds.
        ranks: one of `RANKS`.
        rounds: planned.
        rate: share of the clients expected in a round.
        clients: as in `Privacy`.

    Raises:
        ImportError: without `dp-accounting`.
        ValueError: for numbers out of range, or a budget that no noise keeps.
    """
    release = None
    if ranks == "private":
        release = privacy.calibrated_release(RELEASE_SHARE * epsilon, delta, clients=clients)
    noise = noise or privacy.calibrated_noise(epsilon, rounds, delta, rate=rate, clients=clients, release=release)
    return Privacy(epsilon, delta, rate, clients, noise, release)
