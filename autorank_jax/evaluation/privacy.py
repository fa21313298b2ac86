"""What rounds of differential privacy cost: ε at δ, and the noise that a budget needs (extra `privacy`).

Accounting is `dp-accounting`'s: privacy loss distributions for independent sampling, Rényi divergences for cohorts of a
fixed size. The unit is a client. Independent sampling: neighbouring federations differ by one client more or less.
A fixed size: by one client in place of another.
"""

import functools
from typing import Any

_LEAST_NOISE = 0.2
"""Below it a privacy loss distribution needs much memory to tell that hardly anything is protected."""


def spent_epsilon(
    noise_multiplier: float, rounds: int, delta: float, *, rate: float, clients: int | None = None
) -> float:
    """Return ε after some rounds; an upper bound where the noise multiplier is below 0.2.

    Args:
        noise_multiplier: σ of the noise over the clipping norm; ε is infinite where it is 0.
        rounds: that used the clients' data; 0 cost nothing.
        delta: probability δ that ε does not hold, above 0 and below 1; less than 1 / clients to mean anything.
        rate: probability of each client to take part, independently; with `clients` the share that does.
        clients: all clients, where cohorts of a fixed size are drawn without replacement; None for independent draws.

    Raises:
        ImportError: without `dp-accounting`.
        ValueError: for numbers out of range.
    """
    _check(rounds, delta, rate)
    if not noise_multiplier >= 0:
        raise ValueError(f"noise_multiplier: expected a number of at least 0, got {noise_multiplier}")
    if rounds == 0:
        return 0.0
    if noise_multiplier == 0:
        return float("inf")
    accountant = _accountant(clients, precise=noise_multiplier >= _LEAST_NOISE)
    accountant.compose(_event(noise_multiplier, rounds, rate, clients))
    return float(accountant.get_epsilon(delta))


def calibrated_noise(epsilon: float, rounds: int, delta: float, *, rate: float, clients: int | None = None) -> float:
    """Return the smallest noise multiplier of at least 0.2, to within 0.001, with which the rounds spend at most ε.

    Args:
        epsilon: ε > 0, finite.
        rounds: planned, at least 1.
        delta: as in `spent_epsilon`.
        rate: likewise.
        clients: likewise.

    Raises:
        ImportError: without `dp-accounting`.
        ValueError: for numbers out of range, or a budget so small that no noise keeps it.
    """
    _check(rounds, delta, rate)
    if not 0 < epsilon < float("inf") or rounds < 1:
        raise ValueError(f"expected a finite epsilon above 0 and at least one round, got {epsilon} and {rounds}")
    library = _library()
    if spent_epsilon(_LEAST_NOISE, rounds, delta, rate=rate, clients=clients) <= epsilon:
        return _LEAST_NOISE
    try:
        return float(
            library.calibrate_dp_mechanism(
                lambda: _accountant(clients),
                lambda noise: _event(noise, rounds, rate, clients),
                epsilon,
                delta,
                library.LowerEndpointAndGuess(_LEAST_NOISE, 1.0),
                tol=1e-3,
            )
        )
    except library.mechanism_calibration.NoBracketIntervalFoundError:
        raise ValueError(
            f"epsilon: expected a budget that noise can keep, got {epsilon} for {rounds} rounds: too small"
        ) from None


def _check(rounds: int, delta: float, rate: float) -> None:
    if rounds < 0 or int(rounds) != rounds:
        raise ValueError(f"rounds: expected a whole number of at least 0, got {rounds}")
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number above 0 and below 1, got {delta}")
    if not 0 < rate <= 1:
        raise ValueError(f"rate: expected a share above 0 and at most 1, got {rate}, probably a percentage")


@functools.cache
def _library() -> Any:
    try:
        import dp_accounting  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise ImportError('accounting for privacy needs dp-accounting: pip install "autorank-jax[privacy]"') from error
    return dp_accounting


def _accountant(clients: int | None, *, precise: bool = True) -> Any:
    library = _library()
    if clients is not None:
        return library.rdp.RdpAccountant(neighboring_relation=library.NeighboringRelation.REPLACE_ONE)
    return library.pld.PLDAccountant() if precise else library.rdp.RdpAccountant()


def _event(noise_multiplier: float, rounds: int, rate: float, clients: int | None) -> Any:
    library = _library()
    # one client in place of another moves the clipped sum by twice the norm
    gaussian = library.GaussianDpEvent(noise_multiplier if clients is None else noise_multiplier / 2)
    if clients is None:
        one = library.PoissonSampledDpEvent(rate, gaussian)
    else:
        one = library.SampledWithoutReplacementDpEvent(clients, max(1, round(rate * clients)), gaussian)
    return library.SelfComposedDpEvent(one, rounds)
