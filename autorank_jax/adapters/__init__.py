"""LoRA adapters on Flax NNX and Linen models and on plain functions."""

from autorank_jax.adapters.functions import task_from_function
from autorank_jax.adapters.linen import task_from_linen
from autorank_jax.adapters.lora import max_ranks
from autorank_jax.adapters.losses import classification_loss, regression_loss, token_loss
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.adapters.peft import export_peft
from autorank_jax.adapters.task import merge

__all__ = [
    "classification_loss",
    "export_peft",
    "max_ranks",
    "merge",
    "regression_loss",
    "task_from_function",
    "task_from_linen",
    "task_from_nnx",
    "token_loss",
]
