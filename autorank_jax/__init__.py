"""AutoRank: federated LoRA with a rank for every client, simulated fast in JAX.

```
dataset ─partition─▶ FederatedData ─criteria─▶ matrix ─CRITIC, TOPSIS─▶ rank ratios ─▶ ranks ─▶ rank masks
                          │                                                                        │
                          └────────────▶ round: lanes of clients train at their ranks ◀────────────┘
                                                   │  sums over clients
                                                   ▼
                                  aggregator: server step ──▶ next server ──▶ evaluation, history
```

A room per stage: `datasets` → `federated` → `adapters` (around your model, or one of `models`) → `ranks` → `engine`
with a rule of `aggregators` → `evaluation`; `experiment` and `cli` run all of it. Each explains itself: `help(...)`.

| term | meaning |
|---|---|
| client, cohort | a participant; those that take part in a round |
| rank position | one column of `lora_a` with its row of `lora_b`; a client owns the first `r` |
| rank ratio | rank over maximum rank, one per client (or client and layer) |
| lane | one of the stacked parameter sets that train side by side |
| rank level | one static adapter width; a client trains in the smallest that holds its ranks |
| probe | a short local training from the start, at a low rank on a part of the data, thrown away, for the loss criterion; its FLOPs are charged to the policies whose single ranks come from it (not to those that take its mean alone), no bytes, because base weights are there and adapters start from a seed |
| equal bytes, equal FLOPs | the same mean ratio over clients, over examples; costs differ by the rounding to whole ranks |
| double imbalance | clients differ in label mix and in amount of data |

If you know …

- **FedJAX**: `for_each_client` is `make_round`; clients need no padding to the longest, and their state is a pytree.
- **Flower**: there are no client processes; a strategy is an `Aggregator`, a client is a row of `FederatedData`.
- **PEFT**: `max_rank` is `r`, patterns are `target_modules`, and every client has its own rank of it; the scale is 1 by default.
"""  # noqa: E501

from typing import TYPE_CHECKING

from autorank_jax.interface.lazy import lazy

if TYPE_CHECKING:
    from autorank_jax import adapters, aggregators, datasets, engine, evaluation, experiment, federated, models, ranks
    from autorank_jax.adapters import (
        classification_loss,
        export_peft,
        max_ranks,
        merge,
        regression_loss,
        task_from_causal_lm,
        task_from_function,
        task_from_linen,
        task_from_lora_params,
        task_from_nnx,
        token_loss,
    )
    from autorank_jax.aggregators import keep_local, testing, with_server_optimizer
    from autorank_jax.checkpoint import restore_state, save_state
    from autorank_jax.datasets import load_dataset, load_instructions
    from autorank_jax.engine import (
        History,
        init_state,
        make_local_training,
        make_round,
        probe,
        scale_updates,
        sharding,
        simulate,
        training_flops,
        with_penalty,
        with_proximal_term,
    )
    from autorank_jax.evaluation import client_costs, label_weighted_accuracy, make_evaluate
    from autorank_jax.federated import (
        client_stats,
        faults,
        from_client_ids,
        from_parts,
        partition,
        sample_by_size,
        sample_independently,
        sample_uniformly,
        text_clients,
        text_rows,
    )
    from autorank_jax.models import Decoder
    from autorank_jax.ranks import (
        autorank_ranks,
        budgets,
        complexity_matrix,
        controls,
        critic_weights,
        gini_simpson,
        label_entropy,
        loss_entropy,
        policies,
        ranks_from_ratios,
        topsis,
        with_reranking,
    )
    from autorank_jax.types import (
        Adapter,
        Aggregator,
        Base,
        Batch,
        Client,
        ClientStats,
        ClientUpdate,
        FederatedData,
        LocalState,
        LocalTraining,
        Penalised,
        Plan,
        RankInfo,
        RoundInfo,
        Scored,
        Server,
        ServerStep,
        Setting,
        State,
        Task,
        Tokens,
        Traffic,
        Trainable,
        Trains,
        Travels,
    )
else:
    __getattr__, __dir__ = lazy(__name__)

__version__ = "0.2.0"

__all__ = [
    "Adapter",
    "Aggregator",
    "Base",
    "Batch",
    "Client",
    "ClientStats",
    "ClientUpdate",
    "Decoder",
    "FederatedData",
    "History",
    "LocalState",
    "LocalTraining",
    "Penalised",
    "Plan",
    "RankInfo",
    "RoundInfo",
    "Scored",
    "Server",
    "ServerStep",
    "Setting",
    "State",
    "Task",
    "Tokens",
    "Traffic",
    "Trainable",
    "Trains",
    "Travels",
    "adapters",
    "aggregators",
    "autorank_ranks",
    "budgets",
    "classification_loss",
    "client_costs",
    "client_stats",
    "complexity_matrix",
    "controls",
    "critic_weights",
    "datasets",
    "engine",
    "evaluation",
    "experiment",
    "export_peft",
    "faults",
    "federated",
    "from_client_ids",
    "from_parts",
    "gini_simpson",
    "init_state",
    "keep_local",
    "label_entropy",
    "label_weighted_accuracy",
    "load_dataset",
    "load_instructions",
    "loss_entropy",
    "make_evaluate",
    "make_local_training",
    "make_round",
    "max_ranks",
    "merge",
    "models",
    "partition",
    "policies",
    "probe",
    "ranks",
    "ranks_from_ratios",
    "regression_loss",
    "restore_state",
    "sample_by_size",
    "sample_independently",
    "sample_uniformly",
    "save_state",
    "scale_updates",
    "sharding",
    "simulate",
    "task_from_causal_lm",
    "task_from_function",
    "task_from_linen",
    "task_from_lora_params",
    "task_from_nnx",
    "testing",
    "text_clients",
    "text_rows",
    "token_loss",
    "topsis",
    "training_flops",
    "with_penalty",
    "with_proximal_term",
    "with_reranking",
    "with_server_optimizer",
]
