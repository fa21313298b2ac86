"""Does AutoRank help, where, and which part of it? Rank policies × aggregation rules × splits × settings.

Fashion-MNIST, MLP 784-200-200-10 with maximum ranks 160, 160, 100, batch 64, SGD with momentum 0.9, one local epoch,
20 rounds, evaluated every second one, five seeds; a seed varies initial weights, adapters, split and batch order.
Settings are the criteria (each alone, all, all without the loss) and what may do better: floors under the ratios, a
server with momentum. They are tried under the first two rules on the first two splits, with the learning rates of all
criteria, which are chosen as in `paper.py` for every policy, rule and split. Answers are mean differences paired over
seeds, with 95 % t intervals and Holm's correction of final accuracies within each question.

Command:  AUTORANK_JAX_DATA=DIR python benchmarks/study.py            (many hours on two cores; may be stopped and
          started again, and begins with what matters most; rules and
          settings narrow what is run, all of theirs are reported; other
          splits, rounds and seeds need an --out of their own)
          AUTORANK_JAX_DATA=DIR python benchmarks/study.py --confirm  (the best pairs on fresh seeds, and on MNIST)
          python benchmarks/study.py --quick                          (embedded subset, two minutes on two cores)
Writes:   a JSON per cell in benchmarks/results/study, then study.json, study.md and pictures beside it
Expect:   see benchmarks/README.md
"""

import argparse
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import answers
import matplotlib as mpl
import numpy as np
import pictures
from answers import ALL, Point, Question, Table
from curves import table_of
from grid import NOTHING, Bounds, add_grid_options, check_pattern, count, keep_published, words
from plan import SPLITS
from tuning import Choice, Grid, choose_rates, run_tuned

from autorank_jax.experiment.config import GLOBAL_RULES, Experiment
from autorank_jax.ranks.criteria import CRITERIA
from benchmarks import harness

RESULTS = Path(__file__).parent / "results"
RULES = ("rbla", "raflora", "owner_merge", "flexlora")
POLICIES: Mapping[str, str] = {
    "autorank": "AutoRank",
    "uniform_bytes": "one rank, AutoRank's bytes",
    "uniform": "one rank, AutoRank's FLOPs without the probe",
    "by_size_bytes": "by size, AutoRank's bytes",
    "shuffled": "AutoRank shuffled",
}
PAIR = ("autorank", "uniform_bytes")
CRITERIA_ALONE: Mapping[str, Mapping[str, Any]] = {
    "without loss_entropy": {"criteria": tuple(name for name in CRITERIA if name != "loss_entropy")},
    **{f"{name} alone": {"criteria": (name,)} for name in CRITERIA},
}
BETTER: Mapping[str, Mapping[str, Any]] = {
    "floor 0.5": {"min_ratio": 0.5},
    "server momentum 0.5": {"server_momentum": 0.5, "server_learning_rate": 0.5},
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {ALL: {}, **BETTER, **CRITERIA_ALONE}
STUDIED = ("staircase", "dirichlet-0.4-10")
"""By default; `--splits` takes all of `paper.py`."""
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
    folder: Path
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
    if setting != ALL:  # what changes criteria alone is compared with all criteria, the rest with one rank as well
        wanted = PAIR[:1] if setting in CRITERIA_ALONE else PAIR
        policies = tuple(p for p in policies if p in wanted)
    options = {"eval_every": 2, "local_epochs": 1, **SPLITS[split], **SETTINGS[setting], **plan.options}
    return Experiment(dataset=plan.dataset, rank_policies=policies, aggregators=(rule,), **options)


Rates = Mapping[tuple[str, str], Mapping[str, Choice]]
"""Learning rates by rule and split, then by policy, as far as they are chosen."""


def rates_of(plan: Plan, rule: str, split: str, bounds: Bounds) -> Mapping[str, Choice]:
    """Choose the learning rates under a rule on a split; shuffled ranks have AutoRank's."""
    tuned = plan._replace(policies=tuple(p for p in plan.policies if p != "shuffled"))
    found = choose_rates(experiment_of(tuned, rule, ALL, split), plan.grid, plan.folder, f"{split}/{rule}", bounds)
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
        name = f"{split}/{rule}-{setting.replace(' ', '_')}"
        tuned, _ = run_tuned(experiment, rates[rule, split], plan.folder, name, **how)
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
        folder=options.out / ("study_mini" if quick else "study"),
        together=quick,
        grid=Grid((0.03,)) if quick else Grid(more_seeds=1),
    )


def tables(plan: Plan, table: Table, pairs: Sequence[tuple[Point, float]]) -> str:
    """Return the answers that the cells give, and the best pairs, in Markdown."""
    axes = {"rules": plan.rules, "settings": plan.settings, "splits": plan.splits}
    asked = [answers.answer(table, q, plan.splits, len(plan.seeds)) for q in answers.questions(**axes)]
    return "\n".join([heading(plan), *filter(None, asked), answers.best_text(table, pairs, plan.splits)])


def report(plan: Plan, table: Table, rates: Rates, pairs: Sequence[tuple[Point, float]]) -> None:
    """Print and write the tables of what is there, and pictures; nothing where no cell is there."""
    if not table:
        print("No cell is complete yet.")
        return
    text = tables(plan, table, pairs)
    print(text)
    harness.write_text(plan.folder.with_suffix(".md"), text)
    about = {"options": dict(plan.options), "reported_with": harness.versions()}  # cells name what they were run with
    harness.write_json(plan.folder.with_suffix(".json"), numbers(table, rates) | about)
    draw(plan, table)


def numbers(table: Table, rates: Rates) -> dict[str, Any]:
    """Return what the cells reached, and at which learning rates, as JSON."""
    return {
        "points": {" | ".join(point): table_of(runs) for point, runs in table.items()},
        "learning_rates": {
            " | ".join(at): {p: c._asdict() for p, c in own.items()} for at, own in rates.items() if own
        },
    }


def heading(plan: Plan, title: str = "Rank policies under aggregation rules") -> str:
    """Return what a reader of the tables has to know."""
    policies = "; ".join(f"`{name}`: {words}" for name, words in POLICIES.items())
    return (
        f"# {title}: {plan.dataset}, {plan.options['rounds']} rounds\n\n"
        "Differences are in points of test accuracy, paired over seeds: mean [95 % t interval]; p of a paired t test "
        "of final accuracy, Holm-corrected over the rows of a table. Budgets are those of either side, one / other; "
        f"training counts the probe.\n{policies}.\n"
    )


def draw(plan: Plan, table: Table) -> None:
    """Draw AutoRank minus one rank of equal bytes by rule, settings minus all criteria, and curves."""
    one = Point("autorank", plan.rules[0], ALL, "")
    rules = {rule: one._replace(rule=rule) for rule in plan.rules}
    settings = {name: one._replace(setting=name) for name in plan.settings if name != ALL}
    maps = {
        "rules": (
            "AutoRank minus one rank of equal bytes",
            {n: (p, p._replace(policy=PAIR[1])) for n, p in rules.items()},
        ),
        "settings": (f"AutoRank, {one.rule}: setting minus all criteria", {n: (p, one) for n, p in settings.items()}),
    }
    about = f"{plan.dataset}, {plan.options['rounds']} rounds, mean of {len(plan.seeds)} seeds"
    star = f"* corrected p < {answers.BEYOND:g}"
    asked = answers.questions(rules=plan.rules, settings=plan.settings, splits=plan.splits)
    beyond = set().union(*(answers.shown(table, question, plan.splits) for question in asked))
    for what, (title, rows) in maps.items():
        values = answers.grid_of(table, list(rows.values()), plan.splits)
        pairs = [[tuple(p._replace(split=split) for p in row) for split in plan.splits] for row in rows.values()]
        if np.isfinite(values).any():
            pictures.heat_map(
                values,
                list(rows),
                [split.replace("-", "\n", 1) for split in plan.splits],
                plan.folder.with_name(f"{plan.folder.name}-{what}.png"),
                title=f"{title}\n{about}\n{star}",
                label="points of final accuracy",
                differences=True,
                shown=np.array([[pair in beyond for pair in row] for row in pairs]),
            )
    for split, rule in itertools.product(plan.splits, plan.rules[:NARROW]):
        series = {POLICIES[p]: table.get(Point(p, rule, ALL, split), {}) for p in plan.policies}
        if seen := {title: runs for title, runs in series.items() if runs}:
            path = plan.folder.with_name(f"{plan.folder.name}-{split}-{rule}.png")
            pictures.accuracy_curves(seen, path, f"{plan.dataset}, {split}, {rule}")


def winners(pairs: Sequence[tuple[Point, float]]) -> tuple[Point, ...]:
    """Return the best pair, and the best of those with AutoRank's ranks, where that is another."""
    points = [point for point, _ in pairs]
    return tuple(dict.fromkeys([*points[:1], *[point for point in points if point.policy == "autorank"][:1]]))


def confirm(plan: Plan, best: Sequence[Point], rates: Rates, bounds: Bounds) -> str:
    """Run the best pairs on fresh seeds and on MNIST, beside AutoRank and one rank with their rules and the first."""
    rules = tuple(dict.fromkeys((*(point.rule for point in best), plan.rules[0])))
    policies = tuple(p for p in POLICIES if p in (*(point.policy for point in best), *PAIR))
    parts = []
    for dataset in (plan.dataset, *(("mnist",) if plan.dataset == "fashion_mnist" else ())):
        fresh = plan._replace(
            dataset=dataset,
            policies=policies,
            rules=rules,
            settings=(ALL,),
            seeds=range(FRESH, FRESH + len(plan.seeds)),
            folder=plan.folder.with_name(f"{plan.folder.name}-confirm-{dataset}"),
        )
        table, _ = run_plan(fresh, order(fresh), rates, bounds)
        others = [Point(p, rule, ALL, "all") for rule in rules for p in PAIR]
        for one in best:
            rows = tuple(
                (f"{other.policy} + {other.rule}, {split}", one._replace(split=split), other._replace(split=split))
                for other in others
                if other != one
                for split in (*plan.splits, "all")
            )
            title = f"{dataset}, fresh seeds: {one.policy} + {one.rule} minus"
            parts.append(answers.answer(table, Question(title, rows), plan.splits, len(fresh.seeds)))
    return "\n".join(filter(None, parts)) or "Nothing is confirmed yet.\n"


def confirmed(plan: Plan, pairs: Sequence[tuple[Point, float]], rates: Rates, bounds: Bounds) -> str:
    """Run what is missing of the best pairs on fresh seeds; return their tables in Markdown."""
    return f"{heading(plan, 'The best pairs on fresh seeds')}\n{confirm(plan, winners(pairs), rates, bounds)}"


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--confirm", action="store_true", help="run the best pairs on fresh seeds and on MNIST")
    parser.add_argument("--rules", default="", help="comma-separated; default " + ",".join(RULES))
    parser.add_argument("--settings", default="", help="comma-separated; default all: " + ", ".join(SETTINGS))
    parser.add_argument("--rounds", type=int, default=None, help="default 20")
    note = "; the best pair is chosen among what is complete on these, and no others are reported"
    add_grid_options(parser, splits=STUDIED, out=RESULTS, note=note)
    return parser.parse_args(arguments)


@harness.mistakes_in_words()
def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then answer from what there is."""
    options = options_of(arguments)
    mpl.use("Agg")
    plan = make_plan(options)
    bounds = NOTHING if options.report else Bounds.within(options.limit_minutes, options.cells)
    with harness.shared_programs():
        run_plan(plan, order(plan), {}, bounds)
        check_pattern(options.cells, plan.folder)
        whole, table, rates = read_all(plan)
        pairs = answers.best_pairs(table, whole.rules, whole.splits, len(whole.seeds))
        report(whole, table, rates, pairs)
        if options.confirm:
            if not pairs:
                raise SystemExit(
                    "confirm: expected complete cells to choose the best pair from, got none; run the study first"
                )
            text = confirmed(whole, pairs, rates, bounds)
            print(text)
            harness.write_text(plan.folder.with_name(f"{plan.folder.name}-confirm.md"), text)


if __name__ == "__main__":
    main()
