"""The names that an experiment checks without loading the registries are theirs."""

from autorank_jax.aggregators import RULES, make_rule
from autorank_jax.experiment import names
from autorank_jax.federated.partition import SPLITS
from autorank_jax.ranks import criteria


def test_names_are_those_of_the_registries():
    assert tuple(RULES) == names.AGGREGATORS
    assert tuple(name for name in RULES if make_rule(name).traffic.down.kernels) == names.MERGING
    assert tuple(criteria.CRITERIA) == names.CRITERIA
    assert criteria.NEEDS_LOSSES == names.NEEDS_LOSSES
    assert {name: split.options for name, split in SPLITS.items()} == names.SPLITS
    assert tuple(SPLITS) == tuple(names.SPLITS)
