"""From the clients' data to their ranks: criteria → CRITIC weights → TOPSIS score → rank ratio → integer ranks.

AutoRank (S. Chen, O. Tavallaie, N. Nazemi, X. Chen, A. Y. Zomaya, arXiv 2412.15553) gives clients whose data are more
complex a higher LoRA rank. This is an independent reimplementation; the paper's equations and tables are not available to
us in full. Each statement is marked **[S]** stated by the paper's abstract or public summaries, **[R]** read off the first
author's later public code or result files, **[D]** our decision, a default with a switch.

1. **Criteria** of each client's data: examples, classes [S as indicators; as columns of their own D], label entropy
   `-Σ p ln p` and Gini-Simpson `1 - Σ p²` [S], and the entropy of the training loss over five probing epochs [S for the idea,
   D for the form]. All are benefits: more complex, higher rank [R].
2. **Weights** by CRITIC: `w_j ∝ σ_j Σ_k (1 - ρ_jk)` on min-max scaled columns [S].
3. **Score** by TOPSIS: closeness `d⁻ / (d⁺ + d⁻)` to the ideal client [S], columns normalised by their L2 norm [R].
4. **Rank**: `r = max(1, ⌊ρ R⌋)`, `ρ = ρ_min + (1 - ρ_min) s` with the min-max scaled score `s` [S], `ρ_min = 0.1` [D], truncation [R].
5. **Local model**: `y = x W + (x A) diag(m) B + b`; `W` frozen, `A` Kaiming-uniform, `B` zero, biases trained, scale 1 [R].
6. **Aggregation**: RBLA (arXiv 2408.08699) averages each rank position over the clients that own it [S; that AutoRank uses it: R].
   Here the default is `raflora`, which averages products instead, as the study in README recommends [D].

The staircase split of the author's files [R] nests classes and sizes, so that *any* rule that grows with size gives nearly the
same ranks. Conclusions need random splits, equal budgets, shuffled ranks and several seeds.

A policy is any `(key, ClientStats) -> (ratios, RankInfo)`: `policies` has `autorank`, `by_size`, `uniform`, `manual`;
`budgets` adapts them (`with_budget`, `with_one_ratio`, `with_coverage`, `with_caps`), `controls` shuffles or reverses
their ratios. A criterion of your own is a function `ClientStats -> (clients,)` in `autorank(criteria=(..., mine))`, or a
column of `client_stats(extra=...)`; `manual/contributing.md` says where one of this package goes. `criteria` and `mcda` hold the equations, `table_file` reads tables;
`private_counts` releases label counts with noise, for ranks under differential privacy.

```python
from autorank_jax import autorank_ranks

ranks, info = autorank_ranks([[90, 10], [40, 60], [300, 280]], max_rank=64)
print(ranks.shape, info.weights.shape)
```
"""  # noqa: E501

from typing import TYPE_CHECKING

from autorank_jax.interface.lazy import lazy

if TYPE_CHECKING:
    from autorank_jax.ranks.criteria import complexity_matrix, gini_simpson, label_entropy, loss_entropy
    from autorank_jax.ranks.mcda import critic_weights, topsis
    from autorank_jax.ranks.policies import autorank_ranks, ranks_from_ratios
    from autorank_jax.ranks.private import private_counts
    from autorank_jax.ranks.reranking import with_reranking
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "autorank_ranks",
    "complexity_matrix",
    "critic_weights",
    "gini_simpson",
    "label_entropy",
    "loss_entropy",
    "private_counts",
    "ranks_from_ratios",
    "topsis",
    "with_reranking",
]
