"""Accuracy of the server and of the clients, and what a round costs."""

from autorank_jax.evaluation.costs import client_costs
from autorank_jax.evaluation.metrics import (
    class_accuracy,
    classification_metrics,
    label_weighted_accuracy,
    make_evaluate,
    summarise_clients,
    with_personal_scores,
)

__all__ = [
    "class_accuracy",
    "classification_metrics",
    "client_costs",
    "label_weighted_accuracy",
    "make_evaluate",
    "summarise_clients",
    "with_personal_scores",
]
