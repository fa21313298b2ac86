"""Does AutoRank help, where, and which part of it? Rank policies × aggregation rules × splits × settings.

Fashion-MNIST, MLP 784-200-200-10 with maximum ranks 160, 160, 100, batch 64, SGD with momentum 0.9, one local epoch,
20 rounds, evaluated every second one, five seeds; a seed varies initial weights, adapters, split and batch order.
Settings are the criteria (each alone, all, all without the loss) and what may do better: floors under the ratios, a
server with momentum. They are tried under the first two rules on the first two splits, with the learning rates of all
criteria, which are chosen as in `paper.py` for every policy, rule and split. Answers are mean differences paired over
seeds, with 95 % t intervals and Holm's correction of final accuracies within each question.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.study.policies_by_rules    (many hours on two cores; may be stopped
          and started again, and begins with what matters most; rules and settings narrow what is run, all of theirs are
          reported; other splits, rounds and seeds need an --out of their own)
          AUTORANK_JAX_DATA=DIR python -m benchmarks.study.policies_by_rules --confirm
          (the best pairs on fresh seeds, and on MNIST)
          python -m benchmarks.study.policies_by_rules --quick    (embedded subset, two minutes on two cores)
Writes:   a line per cell in benchmarks/study/results/policies_by_rules.jsonl
Expect:   see benchmarks/study/rules.md
"""

import argparse
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from autorank_jax.experiment import Experiment
from autorank_jax.experiment.names import GLOBAL_RULES
from autorank_jax.ranks.criteria import CRITERIA, NEEDS_LOSSES
from benchmarks import harness
from benchmarks.study import questions
from benchmarks.study.cell_file import CellFile
from benchmarks.study.cells import NOTHING, Bounds
from benchmarks.study.columns import FULL_PROBE, SPLITS, STUDIED
from benchmarks.study.options import (
    RESULTS,
    add_cell_options,
    check_pattern,
    count,
    keep_published,
    make_parser,
    words,
)
from benchmarks.study.questions import ALL, Point, Question, Table
from benchmarks.study.tuning import Choice, Grid, choose_rates, run_tuned

RULES = ("rbla", "raflora", "owner_merge", "flexlora")
POLICIES: Mapping[str, str] = {
    "autorank": "AutoRank",
    "uniform_bytes": "uniform rank, AutoRank's bytes",
    "uniform": "uniform rank, AutoRank's FLOPs (probe not counted)",
    "by_size_bytes": "ranks by size, AutoRank's bytes",
    "shuffled": "AutoRank's ranks, shuffled",
}
PAIR = ("autorank", "uniform_bytes")
CRITERIA_ALONE: Mapping[str, Mapping[str, Any]] = {
    "without loss_entropy": {"criteria": tuple(name for name in CRITERIA if name not in NEEDS_LOSSES)},
    **{f"{name} alone": {"criteria": (name,)} for name in CRITERIA},
}
BETTER: Mapping[str, Mapping[str, Any]] = {
    "floor 0.5": {"min_ratio": 0.5},
    "server momentum 0.5": {"server_momentum": 0.5, "server_learning_rate": 0.5},
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {ALL: {}, **BETTER, **CRITERIA_ALONE}
NARROW = 2
"""Settings other than all criteria are tried under so many rules, on so many splits."""
FRESH = 100
"""The first seed of the confirmation."""


class Plan(NamedTuple):
    """What the command line asks for."""

    dataset: str
    policies: tuple[str, ...]  # under all criteria; elsewhere those of them that are needed
    rules: tuple[str, ...]  # the first is the method's own
    splits: tuple[str, ...]
    settings: tuple[str, ...]
    seeds: range
    options: Mapping[str, Any]  # of every experiment
    file: CellFile
    prefix: str  # of the names of cells
    together: bool  # all seeds in one cell
    grid: Grid  # of learning rates


Place = tuple[str, str, str]
"""Rule, setting and split."""


def everything(plan: Plan) -> Plan:
    """Return the plan with all rules and settings: what is reported, whatever part of them is run."""
    return plan._replace(rules=tuple(dict.fromkeys((*RULES, *GLOBAL_RULES))), settings=tuple(SETTINGS))


def order(plan: Plan) -> list[Place]:
    """Return what to run: all criteria first, the other settings under few rules."""
    wide = [(rule, ALL, split) for rule in plan.rules for split in plan.splits if ALL in plan.settings]
    others = [setting for setting in plan.settings if setting != ALL]
    few = plan.rules[:NARROW], plan.splits[:NARROW]
    return wide + [(rule, setting, split) for setting in others for rule in few[0] for split in few[1]]


def experiment_of(plan: Plan, rule: str, setting: str, split: str) -> Experiment:
    """Return the experiment of a cell, for the first seed."""
    policies = plan.policies
    if (
        setting != ALL
    ):  # what changes criteria alone is compared with all criteria, the rest with a uniform rank as well
        wanted = PAIR[:1] if setting in CRITERIA_ALONE else PAIR
        policies = tuple(p for p in policies if p in wanted)
    options = {
        "eval_every": 2,
        "local_epochs": 1,
        "rank_levels": 4,
        **FULL_PROBE,
        **SPLITS[split],
        **SETTINGS[setting],
        **plan.options,
    }
    return Experiment(dataset=plan.dataset, rank_policies=policies, aggregators=(rule,), **options)


Rates = Mapping[tuple[str, str], Mapping[str, Choice]]
"""Learning rates by rule and split, then by policy, as far as they are chosen."""


def rates_of(plan: Plan, rule: str, split: str, bounds: Bounds) -> Mapping[str, Choice]:
    """Choose the learning rates under a rule on a split; shuffled ranks have AutoRank's."""
    tuned = plan._replace(policies=tuple(p for p in plan.policies if p != "shuffled"))
    name = f"{plan.prefix}{split}/{rule}"
    found = choose_rates(experiment_of(tuned, rule, ALL, split), plan.grid, plan.file, name, bounds)
    return {**found, **({"shuffled": found["autorank"]} if "autorank" in found else {})}


def run_plan(plan: Plan, places: Iterable[Place], rates: Rates, bounds: Bounds) -> tuple[Table, Rates]:
    """Run what is missing at some places within bounds, and return what is there.

    Args:
        plan: what the places belong to.
        places: in this order.
        rates: those that are known; others are chosen where a rule and split are first reached.
        bounds: of the cells to run.

    Returns:
        Runs, and learning rates with those that were chosen.
    """
    table: Table = {}
    rates = dict(rates)
    how = {"seeds": plan.seeds, "together": plan.together, "bounds": bounds, "apart": False}
    for rule, setting, split in places:
        if (rule, split) not in rates:
            rates[rule, split] = rates_of(plan, rule, split, bounds)
        experiment = experiment_of(plan, rule, setting, split)
        name = f"{plan.prefix}{split}/{rule}-{setting.replace(' ', '_')}"
        tuned = run_tuned(experiment, rates[rule, split], plan.file, name, **how)
        table |= {Point(policy, rule, setting, split): one.runs for policy, one in tuned.items() if one.runs}
    return table, rates


def read_all(plan: Plan) -> tuple[Plan, Table, Rates]:
    """Read the cells of all rules and settings, and return the plan of those that have some."""
    whole = everything(plan)
    table, rates = run_plan(whole, itertools.product(whole.rules, whole.settings, whole.splits), {}, NOTHING)
    rules, settings = {RULES[0], *(point.rule for point in table)}, {ALL, *(point.setting for point in table)}
    shown = whole._replace(
        rules=tuple(rule for rule in whole.rules if rule in rules),
        settings=tuple(setting for setting in whole.settings if setting in settings),
    )
    return shown, table, rates


def make_plan(options: argparse.Namespace) -> Plan:
    """Turn the command line into a plan."""
    quick = options.quick
    keep_published(options, RESULTS, ("seeds", "rounds", "splits"))
    chosen = {"rules": RULES, "splits": STUDIED, "settings": tuple(SETTINGS)}
    if quick:
        chosen = {"rules": RULES[:2], "splits": STUDIED[:2], "settings": (ALL, "floor 0.5", "size alone")}
    known = {"rules": GLOBAL_RULES, "splits": SPLITS, "settings": SETTINGS}
    chosen = {what: tuple(words(what, getattr(options, what), chosen[what], known[what])) for what in known}
    given = {"rounds": count("rounds", options.rounds, 4 if quick else 20)} | ({"rank_levels": 1} if quick else {})
    return Plan(
        "fashion_mnist_mini" if quick else "fashion_mnist",
        tuple(POLICIES)[: 4 if quick else None],
        **chosen,
        seeds=range(count("seeds", options.seeds, 2 if quick else 5)),
        options=given,
        file=CellFile(options.out / ("policies_by_rules_mini.jsonl" if quick else "policies_by_rules.jsonl")),
        prefix="",
        together=quick,
        grid=Grid((0.03,)) if quick else Grid(more_seeds=1),
    )


def tables(plan: Plan, table: Table, pairs: Sequence[tuple[Point, float]], rates: Rates) -> str:
    """Return the answers that the cells give, the best pairs, and these on fresh seeds, in Markdown."""
    axes = {"rules": plan.rules, "settings": plan.settings, "splits": plan.splits}
    asked = [questions.answer(table, q, plan.splits, len(plan.seeds)) for q in questions.questions(**axes)]
    fresh = confirm(plan, winners(pairs), rates, NOTHING)
    return "\n".join([heading(plan), *filter(None, asked), questions.best_text(table, pairs, plan.splits), *fresh])


def heading(plan: Plan) -> str:
    """Return what a reader of the tables has to know."""
    policies = "; ".join(f"`{name}`: {words}" for name, words in POLICIES.items())
    return (
        f"# Rank policies under aggregation rules: {plan.dataset}, {plan.options['rounds']} rounds\n\n"
        "Differences are in points of test accuracy, paired over seeds: mean [95 % t interval]; p of a paired t test "
        "of final accuracy, Holm-corrected over the rows of a table. Budgets are those of either side, one / other: "
        "ratios of a client's rank to the maximum rank, mean over clients (bytes) and over examples (training); the "
        "share of all examples that the clients of the highest rank hold; training with the probe. At equal FLOPs: "
        "what either had reached when it had spent as much on training, the probe counted, as the dearer of the two "
        f"spends in the first fifth of its rounds, or the cheaper one in all.\n\n{policies}.\n"
    )


def winners(pairs: Sequence[tuple[Point, float]]) -> tuple[Point, ...]:
    """Return the best pair, and the best of those with AutoRank's ranks, where that is another."""
    points = [point for point, _ in pairs]
    return tuple(dict.fromkeys([*points[:1], *[point for point in points if point.policy == "autorank"][:1]]))


def confirm(plan: Plan, best: Sequence[Point], rates: Rates, bounds: Bounds) -> list[str]:
    """Run the best pairs on fresh seeds and on MNIST, beside AutoRank and a uniform rank under their rules.

    Returns:
        Tables in Markdown, of what is there within bounds.
    """
    parts = []
    for fresh in fresh_plans(plan, best) if best else ():
        table, _ = run_plan(fresh, order(fresh), rates, bounds)
        asked = [questions.answer(table, q, plan.splits, len(fresh.seeds)) for q in fresh_questions(fresh, best)]
        parts += filter(None, asked)
    return parts


def fresh_plans(plan: Plan, best: Sequence[Point]) -> list[Plan]:
    """Return what the confirmation runs: a plan for each dataset."""
    return [
        plan._replace(
            dataset=dataset,
            policies=tuple(p for p in POLICIES if p in (*(point.policy for point in best), *PAIR)),
            rules=tuple(dict.fromkeys((*(point.rule for point in best), plan.rules[0]))),
            settings=(ALL,),
            seeds=range(FRESH, FRESH + len(plan.seeds)),
            prefix=f"fresh-{dataset}/",
        )
        for dataset in (plan.dataset, *(("mnist",) if plan.dataset == "fashion_mnist" else ()))
    ]


def fresh_questions(fresh: Plan, best: Sequence[Point]) -> list[Question]:
    """Return one question for each of the best pairs: it minus the others of the confirmation."""
    others = [Point(policy, rule, ALL, "all") for rule in fresh.rules for policy in PAIR]
    return [
        Question(
            f"{fresh.dataset}, fresh seeds: {one.policy} + {one.rule} minus",
            tuple(
                (f"{other.policy} + {other.rule}, {split}", one._replace(split=split), other._replace(split=split))
                for other in others
                if other != one
                for split in (*fresh.splits, "all")
            ),
        )
        for one in best
    ]


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--confirm", action="store_true", help="run the best pairs on fresh seeds and on MNIST")
    parser.add_argument("--rules", default="", help="comma-separated; default " + ",".join(RULES))
    parser.add_argument("--settings", default="", help="comma-separated; default all: " + ", ".join(SETTINGS))
    parser.add_argument("--rounds", type=int, default=None, help="default 20")
    note = "; the best pair is chosen among what is complete on these, and no others are reported"
    add_cell_options(parser, splits=STUDIED, note=note)
    return parser.parse_args(arguments)


@harness.mistakes_in_words()
def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then answer from what there is."""
    options = options_of(arguments)
    plan = make_plan(options)
    bounds = NOTHING if options.report else Bounds.within(options.limit_minutes, options.cells)
    with harness.shared_programs():
        run_plan(plan, order(plan), {}, bounds)
        check_pattern(options.cells, plan.file)
        whole, table, rates = read_all(plan)
        pairs = questions.best_pairs(table, whole.rules, whole.splits, len(whole.seeds))
        if options.confirm:
            if not pairs:
                raise SystemExit(
                    "confirm: expected complete cells to choose the best pair from, got none; run the study first"
                )
            confirm(whole, winners(pairs), rates, bounds)
    if not table:
        print("No cell is complete yet.")
        return
    print(tables(whole, table, pairs, rates))


if __name__ == "__main__":
    main()
