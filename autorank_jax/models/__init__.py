"""Models to federate; any Flax NNX or Linen model of yours will do as well.

`vision`: `MLP`, `CNN`, `DeepCNN` (six convolutions, group normalisation). `convolution`: a convolution that stays one
product under `vmap`. `transformer`: encoder, decoder and classifier of one `Size`. `bert`: a BERT-style encoder with
pretrained weights from safetensors, and its tokenizer (extra `text`). `causal_lm`: Llama, SmolLM2, Mistral, Qwen 2 and
3 as Hugging Face publishes them, `load_causal_lm(folder)`; federate one with `ar.task_from_causal_lm`. `quantized`: its
frozen matrices in 8 or 4 bits a number.

A federation of a language model, from its folder to adapters that `peft` loads:

```python
import jax
import optax

import autorank_jax as ar

sizes = ar.models.CausalConfig(vocabulary=258, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, hidden=64)
model = ar.models.init_causal_lm(sizes, tokenizer=ar.models.ByteTokenizer())  # or load_causal_lm("FOLDER")
train, test = ar.datasets.split_instructions(ar.load_instructions(), test=0.2)  # or load_instructions("FILE.jsonl")
clients = ar.text_clients(train, model.tokenizer, length=128, clients_by="category")
task = ar.task_from_causal_lm(model, max_rank={"*_proj": 8})
best, _ = ar.autorank_ranks(clients.stats.label_counts, max_rank=8)
ranks = {path: best for path in ar.max_ranks(task)}
rule = ar.aggregators.rbla()
round_fn = ar.make_round(ar.make_local_training(task, optax.sgd(0.3, momentum=0.9), batch_size=4), rule, rank_levels=1)
inputs, targets, _, _ = ar.text_rows(test, model.tokenizer, length=128)
evaluate = ar.evaluation.make_evaluate_language(task, inputs, targets)
run = jax.jit(lambda key, state: ar.simulate(key, round_fn, state, clients.data, rounds=5, evaluate=evaluate))
state, history = run(jax.random.key(1), ar.init_state(task.server, rule, ranks))
folder = ar.export_peft("adapters", task, state.server, names=ar.models.causal_name)
print(history.metrics["perplexity"], sorted(file.name for file in folder.iterdir()))
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
