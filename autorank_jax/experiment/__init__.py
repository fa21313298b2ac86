"""One experiment, from its options to its results: what `autorank-jax run` does, without printing.

An experiment compares rank policies under aggregation rules, over seeds. `run` reads top-down like the method: load →
partition → probe → rank → rounds for every rule, policy and seed → results. Its nouns:

- `Experiment`: all options in one frozen dataclass; `validate()` names every mistake at once.
- `Federation` (`setup`): the clients, the model and the keys of one seed.
- `Scores`: what AutoRank saw of the clients under one seed, and the ranks that every policy gave them.
- `Position` (`position`): where it stands. A checkpoint holds one, and a resumed experiment ends in the same bits.
- `Run` and `Row`: one policy under one rule and seed, and one round of it.
- `Results`: everything that was found; `summarize` sums it up as in `summary.json`.

What happens meanwhile goes to `on_event` as an `Event`: `Stage`, `Leveled`, `Compiled` and `Scored` before the rounds,
then `Started`, `RoundDone` and `Finished` for every run, `Resumed` and `Stopped` where they apply.

The modules `language*` do the same for one federation of a language model, under one policy and rule (`autorank-jax
finetune`): `run_language(LanguageOptions(...))` returns `LanguageResults`, a `LanguageRow` for every round in them.

```python
from autorank_jax.experiment import Experiment, run_experiment, summarize

experiment = Experiment(
    dataset="synthetic", split="dirichlet_lognormal", clients=4, hidden=(8,), rank_policies=("autorank",), rounds=2,
    local_epochs=1, probe_epochs=2, rank_levels=1,
)
results = run_experiment(experiment, on_round=lambda end: print(end.row.round, end.row.participants))
print(summarize(results)["policies"]["autorank"]["final_accuracy"]["mean"] > 0.1)
```

"""

from typing import TYPE_CHECKING

from autorank_jax.interface.lazy import lazy

if TYPE_CHECKING:
    from autorank_jax.experiment.checkpoints import Checkpoints
    from autorank_jax.experiment.config import ConfigurationError, Experiment, experiment_from
    from autorank_jax.experiment.events import (
        Compiled,
        Event,
        Finished,
        Leveled,
        Resumed,
        RoundDone,
        Scored,
        Stage,
        Started,
        Stopped,
    )
    from autorank_jax.experiment.language import run_language
    from autorank_jax.experiment.language_options import LanguageOptions
    from autorank_jax.experiment.language_results import LanguageResults, LanguageRow
    from autorank_jax.experiment.position import RoundEnd
    from autorank_jax.experiment.results import DivergedError, Results, Row, Run, Scores, summarize
    from autorank_jax.experiment.run import run_experiment
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "Checkpoints",
    "Compiled",
    "ConfigurationError",
    "DivergedError",
    "Event",
    "Experiment",
    "Finished",
    "LanguageOptions",
    "LanguageResults",
    "LanguageRow",
    "Leveled",
    "Results",
    "Resumed",
    "RoundDone",
    "RoundEnd",
    "Row",
    "Run",
    "Scored",
    "Scores",
    "Stage",
    "Started",
    "Stopped",
    "experiment_from",
    "run_experiment",
    "run_language",
    "summarize",
]
