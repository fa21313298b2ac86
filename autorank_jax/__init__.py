"""AutoRank: federated LoRA with a rank for every client, simulated fast in JAX.

The pipeline, a module each: `datasets` and `partition` → `federated_data` → `complexity` → `mcda` → `policies` →
`engine` (with `local` and `aggregators`) → `simulation` → `evaluation`.
"""

from autorank_jax import (
    aggregators,
    budgets,
    controls,
    datasets,
    dealing,
    faults,
    federated_data,
    models,
    partition,
    policies,
)
from autorank_jax.assembly import merge
from autorank_jax.checkpoint import restore_state, save_state
from autorank_jax.complexity import complexity_matrix, gini_simpson, label_entropy, loss_entropy
from autorank_jax.costs import client_costs, training_flops
from autorank_jax.datasets import load_dataset
from autorank_jax.engine import make_round
from autorank_jax.evaluation import label_weighted_accuracy, make_evaluate
from autorank_jax.export import export_peft
from autorank_jax.federated_data import client_stats, from_client_ids, from_parts
from autorank_jax.functions import task_from_function
from autorank_jax.linen import task_from_linen
from autorank_jax.local import make_local_training, with_proximal_term
from autorank_jax.lora import max_ranks
from autorank_jax.losses import classification_loss, regression_loss, token_loss
from autorank_jax.mcda import critic_weights, topsis
from autorank_jax.participation import sample_by_size, sample_independently, sample_uniformly
from autorank_jax.policies import autorank_ranks, ranks_from_ratios, with_reranking
from autorank_jax.simulation import init_state, simulate
from autorank_jax.tasks import task_from_nnx
from autorank_jax.types import (
    Adapter,
    Aggregator,
    Base,
    Batch,
    ClientStats,
    FederatedData,
    RankInfo,
    RoundInfo,
    Server,
    State,
    Task,
    Trainable,
)

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Aggregator",
    "Base",
    "Batch",
    "ClientStats",
    "FederatedData",
    "RankInfo",
    "RoundInfo",
    "Server",
    "State",
    "Task",
    "Trainable",
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
    "dealing",
    "export_peft",
    "faults",
    "federated_data",
    "from_client_ids",
    "from_parts",
    "gini_simpson",
    "init_state",
    "label_entropy",
    "label_weighted_accuracy",
    "load_dataset",
    "loss_entropy",
    "make_evaluate",
    "make_local_training",
    "make_round",
    "max_ranks",
    "merge",
    "models",
    "partition",
    "policies",
    "ranks_from_ratios",
    "regression_loss",
    "restore_state",
    "sample_by_size",
    "sample_independently",
    "sample_uniformly",
    "save_state",
    "simulate",
    "task_from_function",
    "task_from_linen",
    "task_from_nnx",
    "token_loss",
    "topsis",
    "training_flops",
    "with_proximal_term",
    "with_reranking",
]
