"""The options of a federation of language models, checked at once."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from autorank_jax.experiment.mistakes import ConfigurationError, not_in_float32, outside, unknown
from autorank_jax.experiment.names import GLOBAL_RULES, MERGING
from autorank_jax.interface import describe
from autorank_jax.interface.kinds import is_real, is_whole

LANGUAGE_POLICIES = ("autorank", "uniform_bytes", "full")
TEMPLATES = ("own", "plain")
SIZES = ("rows", "tokens", "examples")
DTYPES = ("auto", "float32", "bfloat16")
QUANTIZED = ("none", "int8", "nf4")
LANGUAGE_BEFORE: Mapping[str, Any] = {"probe_share": 1.0}
"""What runs did before this option came, which is not its default."""
_KINDS: Mapping[Any, tuple[type, ...]] = {
    bool: (bool,), int: (int,), float: (int, float), str: (str,), str | None: (str, NoneType),
    Path | None: (str, NoneType), float | None: (int, float, NoneType),
}  # fmt: skip
"""What JSON may have for a field."""
_WORDS: Mapping[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", is_whole),
    float: ("a number", is_real),
    float | None: ("a number", is_real),
    str: ("a text", lambda value: isinstance(value, str)),
    str | None: ("a text", lambda value: isinstance(value, str)),
    Path | None: ("a path", lambda value: isinstance(value, str | Path) and bool(str(value))),
}
"""What Python may have, in words, and how it is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageOptions:
    """All options of a federation of language models. Without model and data: a tiny one on embedded instructions.

    Attributes:
        model: folder of a causal decoder as Hugging Face publishes it (Llama, SmolLM2, Mistral without
            sliding windows, Qwen 2 and 3); a tiny random one if not given
        data: file of instructions in JSON lines; 74 that come with the package if not given
        skip_odd_lines: leave out lines that give no text, and say why
        clients_by: field whose values are the clients
        groups_by: field whose values the criteria count; default that of the clients
        clients: make so many clients in place of one for each value, by Dirichlet shares of the values; 0 = do not
        alpha: Dirichlet concentration of the shares, small = uneven
        size: of a client: rows, tokens, examples
        hold_out: share of each client's texts that is kept from training, to measure with
        template: of chats: own (as the tokenizer has it), plain
        max_length: tokens of a row, longer texts are cut
        dtype: of the weights: auto (as the files have it), float32, bfloat16
        quantize: frozen matrices of the blocks: none, int8, nf4
        max_rank: rank of the most complex client, by projection
        min_ratio: share of it that the least complex client gets
        policy: autorank (by the complexity of a client's data), uniform_bytes (AutoRank's mean for all, about equal
            bytes), full (everybody at the maximum)
        probe_epochs: epochs of the probe for loss_entropy, at a tenth of the maximum rank; 0 = without
        probe_share: share of its rows for it, 32 rows at least
        aggregator: aggregation rule
        rounds: rounds of federated training
        local_epochs: passes over a client's data each round
        batch_size: rows per local step
        learning_rate: of Adam, which every client begins anew each round; default 0.001, 0.01 for the tiny model
        lanes: clients trained side by side
        tokens: length of the generated samples
        seed: of split, adapters and order of batches
    """

    model: Path | None = None
    data: Path | None = None
    skip_odd_lines: bool = False
    clients_by: str = "category"
    groups_by: str | None = None
    clients: int = 0
    alpha: float = 0.3
    size: str = "rows"
    hold_out: float = 0.2
    template: str = "own"
    max_length: int = 256
    dtype: str = "auto"
    quantize: str = "none"
    max_rank: int = 8
    min_ratio: float = 0.1
    policy: str = "autorank"
    probe_epochs: int = 2
    probe_share: float = 0.25
    aggregator: str = "raflora"
    rounds: int = 5
    local_epochs: int = 1
    batch_size: int = 4
    learning_rate: float | None = None
    lanes: int = 1
    tokens: int = 32
    seed: int = 0

    @property
    def rate(self) -> float:
        """Return the learning rate, or its default."""
        return self.learning_rate if self.learning_rate is not None else 1e-3 if self.model else 1e-2

    @property
    def probed(self) -> bool:
        """Return whether there is a probe: ranks of equal size need none."""
        return self.probe_epochs > 0 and self.policy != "full"

    def validate(self) -> None:
        """Check all options that need no file.

        Raises:
            ConfigurationError: naming all mistakes.
        """
        odd = [
            f"{field.name.replace('_', '-')}: expected {_WORDS[field.type][0]}, got {describe(value)}"
            for field in dataclasses.fields(self)
            if not ((value := getattr(self, field.name)) is None and "None" in str(field.type))
            and not _WORDS[field.type][1](value)
        ]
        if odd:
            raise ConfigurationError(odd)
        ranges: dict[str, tuple[int, ...]] = {"rounds": (1,), "max_rank": (1,), "seed": (0,), "clients": (0,)}
        ranges |= {"max_length": (2, 2**16), "batch_size": (1, 2**16), "tokens": (1, 2**12), "lanes": (1, 2**12)}
        ranges |= {"local_epochs": (1, 10_000), "probe_epochs": (0, 10_000)}
        problems = [
            line for name, ends in ranges.items() for line in outside(name, getattr(self, name), *ends, whole=True)
        ]
        if 1 in (self.clients, self.probe_epochs):
            name = "clients" if self.clients == 1 else "probe_epochs"
            problems.append(f"{name.replace('_', '-')}: expected 0 or a whole number of at least 2, got 1")
        problems += [
            *outside("alpha", self.alpha, 0, open_start=True),
            *outside("hold_out", self.hold_out, 0, 1, open_start=True, open_end=True, cause="a percentage"),
            *outside("min_ratio", self.min_ratio, 0, 1, open_start=True, cause="a percentage"),
            *outside("probe_share", self.probe_share, 0, 1, open_start=True, cause="a percentage"),
            *outside("learning_rate", self.rate, 0, open_start=True),
            *not_in_float32("learning_rate", self.rate),
            *unknown("policy", [self.policy], LANGUAGE_POLICIES),
            *unknown("template", [self.template], TEMPLATES),
            *unknown("size", [self.size], SIZES),
            *unknown("dtype", [self.dtype], DTYPES),
            *unknown("quantize", [self.quantize], QUANTIZED),
            *unknown("aggregator", [self.aggregator], GLOBAL_RULES),
        ]
        if self.quantize in QUANTIZED[1:] and self.aggregator in MERGING:
            rules = ", ".join(name for name in GLOBAL_RULES if name not in MERGING)
            problems.append(f"aggregator: expected one of {rules} over a quantised base, got {self.aggregator!r}")
        if problems:
            raise ConfigurationError(problems)


def as_json(options: LanguageOptions) -> dict[str, Any]:
    """Return all options by name, as JSON has them."""
    values = dataclasses.asdict(options)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def language_options_from(content: Mapping[str, Any]) -> LanguageOptions:
    """Make options of what a run has noted of them.

    Raises:
        TypeError: for anything else, values of another kind among it.
    """
    values = {**LANGUAGE_BEFORE, **content} if "probe_epochs" in content else {**content}
    for field in (field for field in dataclasses.fields(LanguageOptions) if field.name in content):
        value = content[field.name]
        if type(value) not in _KINDS[field.type]:
            raise TypeError(field.name)
        if float in _KINDS[field.type] and type(value) is int:
            values[field.name] = float(value) if abs(value) < 1e300 else math.inf
        elif field.type == Path | None:
            values[field.name] = value and Path(value)
    return LanguageOptions(**values)
