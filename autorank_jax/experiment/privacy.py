"""Differential privacy of an experiment: the noise that a budget needs, and what is spent after every round."""

from functools import lru_cache
from typing import NamedTuple

from autorank_jax.evaluation import privacy

RULES = ("zero_pad", "rbla", "ffa_lora", "rolora", "fedsa_lora", "fedavg")
"""Aggregation rules of whose sums one client changes no more than the clip."""
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
        neighbours = "with or without any one client" if self.clients is None else "with any one client replaced"
        ranks = "ranks are public" if self.release is None else "ranks come from noisy label counts"
        return (
            f"Differential privacy of clients: the models of all rounds are about as likely {neighbours}, at most "
            f"ε = {self.epsilon:g} at δ = {self.delta:g}, if the server is trusted, {ranks}, and the test data and the "
            "choice of options are not private."
        )


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
