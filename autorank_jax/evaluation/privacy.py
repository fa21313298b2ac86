"""What rounds of differential privacy cost: ε at δ, and the noise that a budget needs (extra `privacy`).

Accounting is `dp-accounting`'s: privacy loss distributions for independent sampling, Rényi divergences for cohorts of a
fixed size. The unit is a client. Independent sampling: neighbouring federations differ by one client more or less.
A fixed size: by one client in place of another.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from autorank_jax.interface import check_share, checked

_LEAST_NOISE = 0.2
_DOUBLINGS = 8  # of noise that ought to keep a small budget, before it is too small
_LARGEST = 30.0
"""A privacy loss distribution of a larger ε needs much time and memory to tell that hardly anything is protected."""

_ORDERS = (*range(2, 33), 40, 48, 64, 96, 128, 256)
"""Of the Rényi divergences of independent draws: whole numbers, of which the library never warns."""


@checked
def spent_epsilon(
    noise_multiplier: float,
    rounds: int,
    delta: float,
    *,
    rate: float,
    clients: int | None = None,
    release: float | None = None,
) -> float:
    """Return ε after some rounds; a looser upper bound, by Rényi divergences, where it is above 30.

    Args:
        noise_multiplier: σ of the noise over the clipping norm; ε is infinite where it is 0.
        rounds: that used the clients' data; 0 cost nothing.
        delta: δ, what may be added to a probability besides the factor `e^ε`, above 0 and below 1; less than
            1 / clients to mean anything.
        rate: probability of each client to take part, independently; with `clients` the share that does.
        clients: all clients, where cohorts of a fixed size are drawn without replacement; None for independent draws.
        release: noise multiplier of what every client released once beside the rounds, such as `private_counts`.

    Raises:
        ImportError: without `dp-accounting`.
        ValueError: for numbers out of range.
    """
    _check(rounds, delta, rate)
    for name, noise in (("noise_multiplier", noise_multiplier), ("release", 1.0 if release is None else release)):
        if not noise >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {noise}")
    if (rounds and noise_multiplier == 0) or release == 0:
        return float("inf")
    if not rounds and release is None:
        return 0.0
    release = None if release is None else float(release)
    return _spent(float(noise_multiplier), int(rounds), float(delta), (float(rate), clients), release)


@functools.lru_cache(maxsize=4096)
def _spent(noise: float, rounds: int, delta: float, sampling: tuple[float, int | None], release: float | None) -> float:
    rate, clients = sampling
    event = _all(noise, rounds, rate, clients, release)
    bound = _epsilon(_renyi(clients), event, delta)
    return bound if clients is not None or bound > _LARGEST else _epsilon(_library().pld.PLDAccountant(), event, delta)


@checked
def calibrated_noise(
    epsilon: float,
    rounds: int,
    delta: float,
    *,
    rate: float,
    clients: int | None = None,
    release: float | None = None,
) -> float:
    """Return the smallest noise multiplier of at least 0.2, to within 0.001, with which the rounds spend at most ε.

    Args:
        epsilon: ε > 0, finite.
        rounds: planned, at least 1.
        delta: as in `spent_epsilon`.
        rate: likewise.
        clients: likewise.
        release: likewise.

    Raises:
        ImportError: without `dp-accounting`.
        ValueError: for numbers out of range, or a budget so small that no noise is known to keep it.
    """
    _check(rounds, delta, rate)
    if not 0 < epsilon < float("inf") or rounds < 1:
        raise ValueError(f"expected a finite epsilon above 0 and at least one round, got {epsilon} and {rounds}")
    if release is not None and spent_epsilon(0.0, 0, delta, rate=rate, clients=clients, release=release) >= epsilon:
        raise _too_small(epsilon, rounds)
    library = _library()

    def event(noise: float) -> Any:
        return _all(noise, rounds, rate, clients, release)

    def search(make: Any, bracket: Any) -> float:
        return float(library.calibrate_dp_mechanism(make, event, epsilon, delta, bracket, tol=1e-3))

    if _epsilon(_renyi(clients), event(_LEAST_NOISE), delta) <= epsilon:
        return _LEAST_NOISE
    enough = None
    try:
        high = enough = search(lambda: _renyi(clients), library.LowerEndpointAndGuess(_LEAST_NOISE, 1.0))
        if clients is not None or epsilon > _LARGEST:
            return high
    except library.mechanism_calibration.NoBracketIntervalFoundError:  # Rényi divergences bound no small ε
        if clients is not None:
            raise _too_small(epsilon, rounds) from None
        high = math.sqrt(2 * rounds * math.log(1.25 / delta)) / epsilon
    bracket = _bracket(lambda noise: _epsilon(library.pld.PLDAccountant(), event(noise), delta) <= epsilon, high + 0.01)
    if bracket is None:
        raise _too_small(epsilon, rounds)
    low, high = bracket
    found = low if low == high else search(library.pld.PLDAccountant, library.ExplicitBracketInterval(low, high))
    kept = spent_epsilon(found, rounds, delta, rate=rate, clients=clients, release=release) <= epsilon
    return found if kept or enough is None else enough  # near _LARGEST what is spent is counted by Rényi divergences


def _bracket(keeps: Callable[[float], bool], high: float) -> tuple[float, float] | None:
    """Return a noise multiplier that does not keep a budget and one that does; the least twice where it does.

    Args:
        keeps: whether a noise multiplier does.
        high: one that probably does.

    Returns:
        None where none does.
    """
    tried = 0
    while not keeps(high):
        high, tried = 2 * high, tried + 1
        if tried > _DOUBLINGS:
            return None
    low = 0.7 * high
    while low > _LEAST_NOISE and keeps(low):
        low, high = 0.7 * low, low
    if low <= _LEAST_NOISE and keeps(_LEAST_NOISE):
        return _LEAST_NOISE, _LEAST_NOISE
    return max(low, _LEAST_NOISE), high


def _too_small(epsilon: float, rounds: int) -> ValueError:
    number = f"{rounds} round{'s' * (rounds != 1)}"
    return ValueError(f"epsilon: expected a budget that noise can keep, got {epsilon:g} for {number}: too small")


@checked
def calibrated_release(epsilon: float, delta: float, *, clients: int | None = None) -> float:
    """Return the noise multiplier with which what is released once spends at most ε, as `spent_epsilon` counts it.

    Args:
        epsilon: ε > 0, finite.
        delta: as in `spent_epsilon`.
        clients: likewise.

    Raises:
        ImportError: without `dp-accounting`.
        ValueError: for numbers out of range, or a budget so small that no noise is known to keep it.
    """
    if clients is None:
        return calibrated_noise(epsilon, 1, delta, rate=1.0)
    return calibrated_noise(epsilon, 1, delta, rate=1.0, clients=clients)  # of all clients: a round of everybody


def _check(rounds: int, delta: float, rate: float) -> None:
    if rounds < 0 or int(rounds) != rounds:
        raise ValueError(f"rounds: expected a whole number of at least 0, got {rounds}")
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number above 0 and below 1, got {delta}")
    check_share("rate", rate)


@functools.cache
def _library() -> Any:
    try:
        import dp_accounting  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise ImportError('accounting for privacy needs dp-accounting: pip install "autorank-jax[privacy]"') from error
    return dp_accounting


def _epsilon(accountant: Any, event: Any, delta: float) -> float:
    accountant.compose(event)
    return float(accountant.get_epsilon(delta))


def _renyi(clients: int | None) -> Any:
    library = _library()
    if clients is None:
        return library.rdp.RdpAccountant(_ORDERS)
    return library.rdp.RdpAccountant(neighboring_relation=library.NeighboringRelation.REPLACE_ONE)


def _all(noise: float, rounds: int, rate: float, clients: int | None, release: float | None) -> Any:
    """Return what is released once, and all rounds, as one event."""
    events = [] if release is None else [_gaussian(release, clients)]
    if rounds:
        events.append(_library().SelfComposedDpEvent(_round(noise, rate, clients), rounds))
    return _library().ComposedDpEvent(events)


def _gaussian(noise_multiplier: float, clients: int | None) -> Any:
    # one client in place of another moves a clipped sum by twice the norm
    return _library().GaussianDpEvent(noise_multiplier if clients is None else noise_multiplier / 2)


def _round(noise_multiplier: float, rate: float, clients: int | None) -> Any:
    library, gaussian = _library(), _gaussian(noise_multiplier, clients)
    if clients is None:
        return library.PoissonSampledDpEvent(rate, gaussian)
    return library.SampledWithoutReplacementDpEvent(clients, max(1, round(rate * clients)), gaussian)
