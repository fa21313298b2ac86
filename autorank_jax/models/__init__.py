"""Models to federate: MLP, convolutional networks, transformers, BERT-style encoders with pretrained weights."""

from autorank_jax.models.vision import CNN, MLP, DeepCNN, max_pool

__all__ = ["CNN", "MLP", "DeepCNN", "max_pool"]
