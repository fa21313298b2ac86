"""What an experiment is: all its options in one frozen dataclass, checked at once."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from autorank_jax import datasets
from autorank_jax.experiment import privacy
from autorank_jax.experiment.mistakes import ConfigurationError, not_in_float32, one_in_float32, outside, unknown
from autorank_jax.experiment.names import (
    AGGREGATORS,
    CRITERIA,
    NEEDS_LOSSES,
    PERSONAL_RULES,
    POLICIES,
    SAMPLINGS,
    SCORED,
    SPLITS,
    WHOLE_RULES,
)
from autorank_jax.interface import checked, describe

MODELS: Mapping[str, str] = {
    "mlp": "multi-layer perceptron, 784-200-200-10 on Fashion-MNIST",
    "cnn": "two 3×3 convolutions and a linear layer",
    "deep_cnn": "six 3×3 convolutions with group normalisation and a global mean",
}
WIDTHS: Mapping[str, tuple[int, ...]] = {"mlp": (200, 200), "cnn": (16, 32), "deep_cnn": (32, 32, 64, 64, 128, 128)}
"""Hidden layers, or channels of the convolutions, of every model where none are given."""
OPTIMIZERS = ("sgd", "adam", "adamw")
RATE_SCHEDULES = ("constant", "cosine", "step", "warm_up")
MOST_STRANGE = 3
"""Names in a file of options that are none, from more than which on it is another file."""
BEFORE: Mapping[str, Any] = {"probe_ratio": 1.0, "probe_share": 1.0}
"""What runs did before these options came, which is not their default."""
WRITTEN = 30  # options in a file: from so many on it is one that a run wrote, and no one's own choice of a few


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All options of a run. The defaults are the main job.

    Attributes:
        dataset: name of a dataset; `autorank-jax data` lists them
        split: who gets which examples: iid, dirichlet, shards, quantity, staircase, dirichlet_lognormal
        clients: number of clients
        alpha: Dirichlet concentration of the label mixes, small = few classes per client
        sigma: size imbalance of the log-normal splits, 0 = equal sizes
        classes_per_client: for the split 'shards'
        model: mlp, cnn or deep_cnn (six convolutions, group normalisation, global mean)
        hidden: widths of the hidden layers or channels of the convolutions; default 200,200 for mlp, 16,32 for cnn,
            32,32,64,64,128,128 for deep_cnn
        max_ranks: maximum rank of every layer, one number for all or one each; default 160,160,100 for the default mlp
        rank_policies: what gives the clients their ranks, each tried in turn; the end of this help explains them
        ratios: rank ratio of every client, for the policy 'manual'
        min_ratio: smallest rank ratio, of the least complex client
        criteria: columns of the decision matrix; default all that there are
        probe_epochs: epochs of the probe, a training of every client before there are ranks, thrown away but for its
            losses, for the criterion loss_entropy; the default is cheap, a full probe has 5, and 1 and 1 for these:
        probe_ratio: rank of the probe over the maximum rank; saves FLOPs, but seconds only with several rank levels
        probe_share: share of its examples that every client is probed with, 32 examples at least
        rerank_every: rounds after which ranks are set anew, 0 = set once
        aggregators: aggregation rules, each tried in turn, rbla for the paper's own; the end of this help explains them
        rounds: rounds of federated training
        local_epochs: passes over its data that a client makes each round
        batch_size: examples per local step
        optimizer: what the clients train with: sgd, adam, adamw
        learning_rate: of the clients' optimizer
        rate_schedule: of the learning rate over rounds: constant; cosine, to 0; step, a tenth after half and again
            after three quarters; warm_up, from a tenth over the first tenth
        momentum: of the optimizer sgd
        participation: share of the clients that take part in a round
        sampling: how those that take part are chosen: uniform, by_size (larger clients more often), independent
            (cohorts vary in size)
        drop_out: share of the participants that drop out of each round and send nothing
        stragglers: share of the participants that only get straggler-steps done in each round
        straggler_steps: local steps of a straggler
        clip_norm: largest norm of what a client sends, longer updates are shrunk; 0 = any
        dp_epsilon: budget ε of the clients' differential privacy for all rounds together, with --aggregators rbla, for
            example, as raflora cannot be private; 0 = no privacy
        dp_delta: its δ, less than 1 / clients
        dp_clip: largest norm of what a private client adds to the sums
        dp_adaptive: share of the clients below the norm towards which dp-clip moves round by round; 0 = it stays
        dp_noise: noise of the sums as a multiple of dp-clip, a run whose ε is used up stops; 0 = the least that lasts
        dp_ranks: public, or private: from label counts that are released with noise at a tenth of ε
        dp_count_clip: largest norm of a client's label counts, for private ranks
        server_learning_rate: step of the server towards the clients' mean; 1 = all the way
        server_momentum: of the server's step
        seeds: how many seeds to run
        first_seed: the first of the seeds
        eval_every: rounds between evaluations on the test set; the last round always is
        targets: accuracies whose first round is reported
        validation: share of the training examples that takes the place of the test set, for choosing options without it
        personal: measure every client's own accuracy after the last round, before and after local training
        lanes: clients trained side by side, or auto
        rank_levels: adapter widths that are compiled, or auto: as many as save more seconds than they cost
    """

    dataset: str = "fashion_mnist_mini"
    split: str = "staircase"
    clients: int = 10
    alpha: float = 0.3
    sigma: float = 1.0
    classes_per_client: int = 2
    model: str = "mlp"
    hidden: tuple[int, ...] = ()
    max_ranks: tuple[int, ...] = ()
    rank_policies: tuple[str, ...] = ("autorank", "by_size", "uniform", "full")
    ratios: tuple[float, ...] = ()
    min_ratio: float = 0.1
    criteria: tuple[str, ...] = CRITERIA
    probe_epochs: int = 2
    probe_ratio: float = 0.1
    probe_share: float = 0.25
    rerank_every: int = 0
    aggregators: tuple[str, ...] = ("raflora",)
    rounds: int = 15
    local_epochs: int = 5
    batch_size: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    rate_schedule: str = "constant"
    momentum: float = 0.9
    participation: float = 1.0
    sampling: str = "uniform"
    drop_out: float = 0.0
    stragglers: float = 0.0
    straggler_steps: int = 1
    clip_norm: float = 0.0
    dp_epsilon: float = 0.0
    dp_delta: float = 1e-5
    dp_clip: float = 0.3
    dp_adaptive: float = 0.0
    dp_noise: float = 0.0
    dp_ranks: str = "public"
    dp_count_clip: float = 500.0
    server_learning_rate: float = 1.0
    server_momentum: float = 0.0
    seeds: int = 1
    first_seed: int = 0
    eval_every: int = 1
    targets: tuple[float, ...] = (0.6, 0.7, 0.75)
    validation: float = 0.0
    personal: bool = False
    lanes: int | Literal["auto"] = "auto"
    rank_levels: int | Literal["auto"] = "auto"

    def validate(self) -> None:
        """Check every option.

        Raises:
            ConfigurationError: naming all mistakes, one per line.
        """
        problems = [*_name_problems(self), *_number_problems(self), *_joint_problems(self)]
        if not problems and self.dp_epsilon:
            problems += _budget_problems(self)
        if problems:
            raise ConfigurationError(problems)

    @property
    def scored(self) -> bool:
        """Whether a policy needs AutoRank's scores."""
        return any(policy in SCORED for policy in self.rank_policies)

    @property
    def probed(self) -> bool:
        """Whether a probe must be run."""
        return self.scored and not NEEDS_LOSSES.isdisjoint(self.criteria)

    @property
    def probes_as_in_rounds(self) -> bool:
        """Whether loss curves of the probe may stand beside those of rounds: as long, of all examples, at all ranks."""
        return (self.probe_epochs, self.probe_ratio, self.probe_share) == (self.local_epochs, 1, 1)

    @property
    def cohort(self) -> int:
        """Number of clients that take part in a round."""
        return min(self.clients, max(1, math.floor(self.participation * self.clients + 0.5)))

    @property
    def eventful(self) -> bool:
        """Whether some rounds do without some of the clients, or of their steps."""
        return self.cohort < self.clients or self.sampling == "independent" or self.drop_out > 0 or self.stragglers > 0

    @property
    def privacy(self) -> privacy.Privacy | None:
        """The clients' differential privacy, None where there is none."""
        if not self.dp_epsilon:
            return None
        fixed = self.cohort < self.clients and self.sampling != "independent"
        rate = self.cohort / self.clients if self.sampling != "independent" else self.participation
        budget = self.dp_epsilon, self.dp_delta, self.dp_noise, self.dp_ranks
        return privacy.make_privacy(*budget, rounds=self.rounds, rate=rate, clients=self.clients if fixed else None)

    @property
    def all_seeds(self) -> range:
        """The seeds to run."""
        return range(self.first_seed, self.first_seed + self.seeds)


@checked
def experiment_from(config: Any) -> Experiment:
    """Make an experiment of what `config.json` holds; what is not there has its default, in a run's file as of then.

    Args:
        config: options by name.

    Raises:
        ConfigurationError: for unknown options and for values of another kind, all of them at once.
    """
    if not isinstance(config, Mapping):
        raise ConfigurationError([f"config: expected options by name, got {type(config).__name__}"])
    if len(config) >= WRITTEN and not BEFORE.keys() & config.keys():
        config = {**config, **BEFORE}
    strange = [str(name) for name in config if name not in Experiment.__dataclass_fields__]
    if len(strange) > MOST_STRANGE:
        names = f"{', '.join(strange[:MOST_STRANGE])} and {len(strange) - MOST_STRANGE} more"
        raise ConfigurationError([f"config: expected options of a run, got {names}, probably another file"])
    problems = list(unknown("config", strange, Experiment.__dataclass_fields__, listed="run --help-all"))
    values: dict[str, Any] = {}
    for name, field in Experiment.__dataclass_fields__.items():
        if name not in config:
            continue
        value, default = config[name], field.default
        if isinstance(default, tuple):
            kind = str if "str" in str(field.type) else (int, float)
            if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
                problems.append(f"{name.replace('_', '-')}: expected a list of {_words(kind)}, got {describe(value)}")
                continue
            value = tuple(float(item) if "float" in str(field.type) else item for item in value)
        elif isinstance(default, str) and name not in ("lanes", "rank_levels") and not isinstance(value, str):
            problems.append(f"{name.replace('_', '-')}: expected a name, got {describe(value)}")
            continue
        elif isinstance(default, bool) and not isinstance(value, bool):
            problems.append(f"{name.replace('_', '-')}: expected true or false, got {describe(value)}")
            continue
        elif isinstance(default, (int, float)) and not isinstance(value, (int, float)):
            problems.append(f"{name.replace('_', '-')}: expected a number, got {describe(value)}")
            continue
        elif isinstance(default, float) and type(value) is int:
            value = float(value) if abs(value) < 1e300 else math.inf
        values[name] = value
    if problems:
        raise ConfigurationError(problems)
    return Experiment(**values)


def _words(kind: Any) -> str:
    return "names" if kind is str else "numbers"


def _name_problems(e: Experiment) -> Iterable[str]:
    """Check the options that are names, or lists of names."""
    known = {info.name: info for info in datasets.available_datasets()}
    for line in unknown("dataset", [e.dataset], known):
        yield f"{line} (others of TensorFlow Datasets: first autorank-jax data fetch NAME)"
    if e.dataset in known and not known[e.dataset].present:
        yield (
            f"dataset: expected a file at {known[e.dataset].where}, got none; {datasets.how_to_get(e.dataset)}, or set "
            f"{datasets.ENVIRONMENT_VARIABLE} to the folder that holds {e.dataset}.npz"
        )
    yield from unknown("split", [e.split], SPLITS)
    yield from unknown("model", [e.model], MODELS)
    yield from unknown("rate-schedule", [e.rate_schedule], RATE_SCHEDULES)
    yield from unknown("optimizer", [e.optimizer], OPTIMIZERS)
    yield from unknown("sampling", [e.sampling], SAMPLINGS)
    yield from unknown("dp-ranks", [e.dp_ranks], privacy.RANKS)
    for option, words, allowed in (
        ("rank-policies", e.rank_policies, POLICIES),
        ("criteria", e.criteria, CRITERIA),
        ("aggregators", e.aggregators, AGGREGATORS),
    ):
        yield from unknown(option, words, allowed)
        if not words:
            yield f"{option}: expected at least one out of {', '.join(allowed)}, got none"
        if len(set(words)) < len(words):
            yield f"{option}: expected every name once, got {','.join(words)}"


def _number_problems(e: Experiment) -> Iterable[str]:
    """Check the options that are numbers."""
    for option in ("clients", "classes_per_client", "rounds", "batch_size", "eval_every", "straggler_steps"):
        yield from outside(option, getattr(e, option), 1, whole=True)
    for option, least, most in (("local_epochs", 1, 10_000), ("seeds", 1, 1000)):
        yield from outside(option, getattr(e, option), least, most, whole=True)
    yield from _probe_problems(e)
    for option in ("rerank_every", "first_seed"):
        yield from outside(option, getattr(e, option), 0, whole=True)
    for option in ("alpha", "learning_rate", "server_learning_rate", "dp_delta", "dp_clip", "dp_count_clip"):
        yield from outside(option, getattr(e, option), 0, open_start=True)
    for option in ("sigma", "clip_norm", "dp_epsilon", "dp_noise"):
        yield from outside(option, getattr(e, option), 0)
    for option in ("learning_rate", "server_learning_rate", "clip_norm"):
        yield from not_in_float32(option, getattr(e, option))
    yield from outside("dp_adaptive", e.dp_adaptive, 0, 1, open_end=True, cause="a percentage")
    yield from outside("drop_out", e.drop_out, 0, 1, open_end=True, cause="a percentage")
    yield from one_in_float32("drop_out", e.drop_out)
    yield from outside("stragglers", e.stragglers, 0, 1, cause="a percentage")
    yield from outside("momentum", e.momentum, 0, 1, cause="a percentage")
    yield from outside("server_momentum", e.server_momentum, 0, 1, cause="a percentage")
    yield from outside("validation", e.validation, 0, 0.5, cause="a percentage")
    for option in ("min_ratio", "probe_ratio", "probe_share", "participation"):
        yield from outside(option, getattr(e, option), 0, 1, open_start=True, cause="a percentage")
    for option, low in (("hidden", 1), ("max_ranks", 1)):
        for value in getattr(e, option):
            yield from outside(option, value, low, whole=True)
    for option, cause in (("ratios", "a rank or a percentage"), ("targets", "a percentage")):
        for value in getattr(e, option):
            yield from outside(option, value, 0, 1, open_start=True, cause=cause)
    for option in (name for name in ("lanes", "rank_levels") if getattr(e, name) != "auto"):
        yield from (
            line.replace(", got", ", or auto, got", 1) for line in outside(option, getattr(e, option), 1, whole=True)
        )


def _probe_problems(e: Experiment) -> Iterable[str]:
    hint = f"; to rank without a probe: --criteria {','.join(CRITERIA[:-1])}" if e.probe_epochs in (0, 1) else ""
    yield from (line + hint for line in outside("probe_epochs", e.probe_epochs, 2, 10_000, whole=True))


def _joint_problems(e: Experiment) -> Iterable[str]:
    """Check options against each other."""
    if "manual" in e.rank_policies and len(e.ratios) != e.clients:
        yield f"ratios: expected one for each of {e.clients} clients, for the policy manual, got {len(e.ratios)}"
    if e.ratios and "manual" not in e.rank_policies:
        yield "ratios: expected only with the policy manual, got them without it, probably forgotten in rank-policies"
    layers = len(e.hidden or WIDTHS.get(e.model, ())) + 1
    if len(e.max_ranks) not in (0, 1, layers):
        yield f"max-ranks: expected one number or one for each of {layers} layers, got {len(e.max_ranks)}"
    for rule in e.aggregators:
        if rule in WHOLE_RULES and (e.aggregators != (rule,) or e.rank_policies != ("full",)):
            yield (
                f"aggregators: expected {rule} alone and with the rank policy full alone, got "
                f"{','.join(e.aggregators)} with {','.join(e.rank_policies)}: it trains whole weights, without ranks"
            )
        if rule in PERSONAL_RULES and not e.personal:
            yield (
                f"personal: expected it with {rule}, got it without, probably forgotten: adapters stay with the "
                "clients, so that their own accuracy is the only measure"
            )
    yield from _idle_problems(e)
    if e.dp_epsilon:
        yield from privacy.problems(e)


def _budget_problems(e: Experiment) -> Iterable[str]:
    """Check whether some noise keeps the budget of a private experiment that has no other mistake: it takes seconds."""
    try:
        plan = e.privacy
        assert plan is not None
        once = plan.spent(1)
    except (ImportError, ValueError) as error:
        yield f"dp-epsilon: {error}"
    else:
        expected = plan.rate * e.clients
        if e.dp_adaptive and expected / 20 <= plan.noise / 2:
            yield (
                f"dp-adaptive: expected more than {10 * plan.noise:.3g} clients a round for noise of "
                f"{plan.noise:.3g}, got {expected:g}: the share below the norm would drown; leave it out"
            )
        if once > e.dp_epsilon:
            yield f"dp-noise: expected noise with which one round keeps ε = {e.dp_epsilon:g}, got {e.dp_noise:g}"


def without_effect(e: Experiment) -> Iterable[str]:
    """Yield a line for every option that was given and does nothing beside the others, though it may stay."""
    scaled = e.scored or "by_size" in e.rank_policies
    for option, heeded, needed in (
        *((name, e.probed, "a policy that scores clients by loss_entropy") for name in ("probe_epochs", *BEFORE)),
        ("min_ratio", scaled, "a policy whose ratios differ by client"),
        ("rerank_every", e.rerank_every < e.rounds, "more rounds"),
    ):
        if not heeded and getattr(e, option) != e.__dataclass_fields__[option].default:
            yield f"{option.replace('_', '-')}: has no effect without {needed}"


def _idle_problems(e: Experiment) -> Iterable[str]:
    """Check that no option is given which the others leave without effect."""
    changed = {name for name, field in e.__dataclass_fields__.items() if getattr(e, name) != field.default}
    if "momentum" in changed and e.optimizer in OPTIMIZERS and e.optimizer != "sgd":
        yield f"momentum: expected only with the optimizer sgd, got {e.momentum} with {e.optimizer}"
    for option in ("alpha", "sigma", "classes_per_client"):
        users = [name for name, options in SPLITS.items() if option in options]
        if option in changed and e.split in SPLITS and e.split not in users:
            yield (
                f"{option.replace('_', '-')}: expected only with the split {' or '.join(users)}, got "
                f"{getattr(e, option)} with {e.split}" + ", probably a forgotten --split" * ("split" not in changed)
            )
    for option in sorted(name for name in changed if name.startswith("dp_") and not e.dp_epsilon):
        yield f"{option.replace('_', '-')}: expected only with --dp-epsilon, got it without, probably forgotten"
    if "dp_count_clip" in changed and e.dp_ranks == "public":
        yield "dp-count-clip: expected only with --dp-ranks private, got it without, probably forgotten"
    if "straggler_steps" in changed and e.stragglers == 0:
        yield f"straggler-steps: expected only with --stragglers, got {e.straggler_steps} without, probably forgotten"
    if "sampling" in changed and e.sampling in SAMPLINGS and e.participation == 1:
        yield (
            f"sampling: expected only with --participation below 1, got {e.sampling} where all clients take part, "
            "probably forgotten"
        )
