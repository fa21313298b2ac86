"""AutoRank: federated LoRA with a rank for every client, simulated fast in JAX."""

__version__ = "0.1.0"
