"""From the clients' data to their ranks: complexity criteria, CRITIC weights, TOPSIS scores, policies, budgets."""

from autorank_jax.ranks.criteria import complexity_matrix, gini_simpson, label_entropy, loss_entropy
from autorank_jax.ranks.mcda import critic_weights, topsis
from autorank_jax.ranks.policies import autorank_ranks, ranks_from_ratios, with_reranking

__all__ = [
    "autorank_ranks",
    "complexity_matrix",
    "critic_weights",
    "gini_simpson",
    "label_entropy",
    "loss_entropy",
    "ranks_from_ratios",
    "topsis",
    "with_reranking",
]
