"""Models to federate; any Flax NNX or Linen model of yours will do as well.

`vision`: `MLP`, `CNN`, `DeepCNN` (six convolutions, group normalisation). `convolution`: a convolution that stays one
product under `vmap`. `transformer`: encoder, decoder and classifier of one `Size`. `bert`: a BERT-style encoder with
pretrained weights from safetensors, and its tokenizer (extra `text`). `causal_lm`: Llama, SmolLM2, Mistral, Qwen 2 and
3 as Hugging Face publishes them, `load_causal_lm(folder)`; federate one with `ar.task_from_causal_lm`.

```python
import autorank_jax as ar
import numpy as np
from flax import nnx

tokens = np.random.default_rng(0).integers(0, 50, (64, 17)).astype(np.int32)
texts = ar.from_client_ids(tokens[:, :-1], tokens[:, 1:], np.arange(64) % 4)
decoder = ar.models.Decoder(50, ar.models.Size(width=32, depth=1, heads=2, hidden=64, length=16), rngs=nnx.Rngs(0))
language_task = ar.task_from_nnx(decoder, max_rank={"blocks/*": 4}, loss=ar.token_loss)
print(len(language_task.server.trainable.adapters) > 3)
```
"""

from autorank_jax.models.causal_checkpoint import causal_name, load_causal_lm
from autorank_jax.models.causal_config import CausalConfig, Rope
from autorank_jax.models.causal_lm import ByteTokenizer, CausalLM, init_causal_lm
from autorank_jax.models.transformer import Decoder, Encoder, Size, TextClassifier, Transformer
from autorank_jax.models.vision import CNN, MLP, DeepCNN, max_pool

__all__ = [
    "CNN",
    "MLP",
    "ByteTokenizer",
    "CausalConfig",
    "CausalLM",
    "Decoder",
    "DeepCNN",
    "Encoder",
    "Rope",
    "Size",
    "TextClassifier",
    "Transformer",
    "causal_name",
    "init_causal_lm",
    "load_causal_lm",
    "max_pool",
]
