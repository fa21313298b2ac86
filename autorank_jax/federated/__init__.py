"""Clients and their data: splits, batches, who takes part in a round, and what goes wrong there."""

from autorank_jax.federated.data import client_stats, from_client_ids, from_parts
from autorank_jax.federated.participation import (
    by_examples,
    equally,
    everyone,
    sample_by_size,
    sample_independently,
    sample_uniformly,
)

__all__ = [
    "by_examples",
    "client_stats",
    "equally",
    "everyone",
    "from_client_ids",
    "from_parts",
    "sample_by_size",
    "sample_independently",
    "sample_uniformly",
]
