"""Lines about options that make no experiment."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from autorank_jax.interface import describe

MOST = 2**31 - 1
"""The largest whole number of int32."""


class ConfigurationError(ValueError):
    """Options that make no experiment: one line per mistake, all of them."""

    def __init__(self, problems: Iterable[str]) -> None:
        """Keep the lines in `problems`."""
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


MANY = 8
"""Names from which on a near miss is told without all others."""


def unknown(option: str, words: Iterable[Any], allowed: Iterable[str], *, listed: str = "") -> Iterable[str]:
    """Yield a line for every word that is not allowed, with what comes close.

    Args:
        option: whose words these are.
        words: as they are given.
        allowed: all names.
        listed: where all names are explained, if they are too many for a line.
    """
    names = list(allowed)
    for word in words:
        if word not in names:
            text = word if isinstance(word, str) else ""
            longer = [name for name in names if text and name.startswith(text)]
            close = longer or difflib.get_close_matches(text.lower(), names, n=1)
            hint = f", probably {' or '.join(map(repr, close[:3]))}" if close else ""
            if option == "model" and "/" in text:
                hint = ", probably the folder of a language model: the command finetune trains it"
            known = f"{len(names)} names" if listed or (hint and len(names) > MANY) else ", ".join(names)
            where = f" ({listed})" if listed and not hint else ""
            yield f"{option}: expected one of {known}, got {describe(word)}{hint}{where}"


def outside(
    option: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    whole: bool = False,
    open_start: bool = False,
    open_end: bool = False,
    cause: str = "",
) -> Iterable[str]:
    """Yield a line if a number is not in its range or not whole."""
    kind = "a whole number" if whole else "a number"
    right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    high = MOST if whole and right_type and high == math.inf and value > MOST else high
    above = right_type and (value > low if open_start else value >= low)
    if right_type and above and (value < high if open_end else value <= high) and value < math.inf:
        return
    if right_type and isinstance(value, float) and not math.isfinite(value):
        kind = "a finite number"
    bounds = f"above {low}" if open_start else f"of at least {low}"
    bounds += "" if high == math.inf else f" and {'below' if open_end else 'at most'} {high}"
    probably = f", probably {cause}" if cause and right_type and value > high else ""
    if probably and cause == "a percentage" and value <= 100 * high:
        probably += f": {value / 100:g}"
    yield f"{option.replace('_', '-')}: expected {kind} {bounds}, got {describe(value)}{probably}"


def not_in_float32(option: str, value: float) -> Iterable[str]:
    """Yield a line if a number above 0 is 0 or infinite in float32."""
    limits = np.finfo(np.float32)
    if 0 < value < math.inf and not float(limits.tiny) <= value <= float(limits.max):
        yield (
            f"{option.replace('_', '-')}: expected a number that float32 holds, {limits.tiny:.2g} to {limits.max:.2g}, "
            f"got {describe(value)}"
        )


def one_in_float32(option: str, value: float) -> Iterable[str]:
    """Yield a line if a number below 1 is 1 in float32."""
    if isinstance(value, float) and 1 - 2**-25 <= value < 1:
        yield f"{option.replace('_', '-')}: expected a number that is below 1 in float32, got {describe(value)}"
