"""Names of what an experiment chooses from, written once more: options are checked and explained without JAX.

The registries themselves are `aggregators.RULES`, `ranks.criteria.CRITERIA` and `federated.partition.SPLITS`.
"""

from collections.abc import Mapping

AGGREGATORS = (
    "zero_pad", "rbla", "hetlora", "flexlora", "flora", "ffa_lora", "raflora", "owner_merge", "fedavg", "local_only",
    "fedex_lora", "fedsa_lora", "rolora", "florist", "lora_fair",
)  # fmt: skip
DIFFERENTIALLY_PRIVATE = ("zero_pad", "rbla", "ffa_lora", "rolora", "fedsa_lora", "fedavg")
"""Of them, those of whose sums one client changes no more than the clip: `with_differential_privacy` takes them."""
MERGING = ("flora", "owner_merge", "fedex_lora")
"""Of them, those that change the base weights, which a quantised base does not allow."""
WHOLE_RULES = ("fedavg",)
"""Rules that train whole weights: there are no adapters, hence no ranks."""
PERSONAL_RULES = ("local_only", "fedsa_lora")
"""Rules that leave adapters, or half of them, with the clients: no server model is worth testing."""
GLOBAL_RULES = tuple(name for name in AGGREGATORS if name not in (*WHOLE_RULES, *PERSONAL_RULES))
"""Rules that train the adapters of one global model."""
CRITERIA = ("size", "classes", "label_entropy", "gini_simpson", "loss_entropy")
NEEDS_LOSSES = frozenset({"loss_entropy"})
"""Of the criteria, those that need a probe."""
SPLITS: Mapping[str, tuple[str, ...]] = {
    "iid": (),
    "dirichlet": ("alpha",),
    "shards": ("classes_per_client",),
    "quantity": ("sigma",),
    "staircase": (),
    "dirichlet_lognormal": ("alpha", "sigma"),
}
"""Every split, and the options that it heeds."""
POLICIES: Mapping[str, str] = {
    "autorank": "ratio grows with the complexity of the client's data: CRITIC and TOPSIS on the criteria",
    "covered": "AutoRank's ratios, the highest cut until clients with half of all examples have them, for rbla",
    "by_size": "ratio grows with the client's number of examples",
    "uniform": "one ratio for all: AutoRank's mean over examples, so equal training FLOPs",
    "uniform_bytes": "one ratio for all: AutoRank's mean over clients, so about equal bytes",
    "by_size_bytes": "ratio grows with the number of examples, at AutoRank's mean over clients",
    "full": "ratio 1 for all",
    "shuffled": "AutoRank's ratios in random order",
    "reversed": "AutoRank's ratios, largest to the least complex client",
    "manual": "the ratios given as --ratios",
}
"""Every rank policy, and what it does."""
SAMPLINGS = ("uniform", "by_size", "independent")
SCORED = ("autorank", "covered", "uniform", "uniform_bytes", "by_size_bytes", "shuffled", "reversed")
"""Policies that need AutoRank's scores, if only for their mean."""
