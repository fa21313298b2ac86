"""Federated rounds: local training of one client, lanes that train many, the round, many rounds."""

from autorank_jax.engine.flops import FlopModel, training_flops
from autorank_jax.engine.lane_count import choose_lanes
from autorank_jax.engine.local import make_local_training, with_proximal_term
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state, simulate

__all__ = [
    "FlopModel",
    "choose_lanes",
    "init_state",
    "make_local_training",
    "make_round",
    "simulate",
    "training_flops",
    "with_proximal_term",
]
