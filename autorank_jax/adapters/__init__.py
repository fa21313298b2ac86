"""LoRA adapters on models as they are: `y = x W + (x A) diag(m) B`, `W` frozen, `m` the client's rank mask.

- `Adapter`: `lora_a` and `lora_b` of one layer, 2-D for one client; stacked layers have axes `*layers` in front.
  `Trainable`: what clients train. The scale, 1, `α/r` or `α/√r`, belongs to local training:
  `make_local_training(scale=...)`.
- `Task`: a model as the engine sees it, functions and start values: `task_from_nnx`, `task_from_linen`,
  `task_from_function`, `task_from_causal_lm`, and `task_from_lora_params` for models that carry their adapters;
  anything else by building a `Task`. `max_rank` names the layers, by pattern if you like; `scan_blocks` runs a list of
  equal blocks as one scan.
- losses: `classification_loss`, `regression_loss`, `token_loss`, or any function of outputs and targets to `(batch,)`.
- `merge` gives the trained model back, `export_peft` a folder for Hugging Face PEFT.

```python
import jax
import optax
from flax import nnx

import autorank_jax as ar


class MyModel(nnx.Module):
    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(num_heads=4, in_features=28, decode=False, rngs=rngs)
        self.head = nnx.Linear(28, 10, rngs=rngs)

    def __call__(self, images):  # (b, 28, 28): a row of pixels is a token
        return self.head((images + self.attend(images)).mean(axis=1))


images = ar.load_dataset("fashion_mnist_mini")
parts = ar.partition.iid(images.y_train, 8, seed=0)
data = ar.from_parts(images.x_train, images.y_train, parts)
task = ar.task_from_nnx(MyModel(nnx.Rngs(0)), max_rank={"attend/*": 8, "head": 4})
ranks = ar.ranks_from_ratios([0.25, 0.5, 0.75, 1.0] * 2, ar.max_ranks(task.server.trainable))
rule = ar.aggregators.rbla()
round_fn = ar.make_round(ar.make_local_training(task, optax.sgd(0.1), batch_size=32), rule)
state, info = jax.jit(round_fn)(jax.random.key(1), ar.init_state(task.server, rule, ranks), data)
model = ar.merge(task, state.server)  # MyModel again, plain Flax
```
"""

from typing import TYPE_CHECKING

from autorank_jax.interface.lazy import lazy

if TYPE_CHECKING:
    from autorank_jax.adapters.causal_lm import task_from_causal_lm, token_weighted
    from autorank_jax.adapters.functions import task_from_function
    from autorank_jax.adapters.linen import task_from_linen
    from autorank_jax.adapters.lora import max_ranks
    from autorank_jax.adapters.lora_params import task_from_lora_params, with_qwix
    from autorank_jax.adapters.losses import classification_loss, regression_loss, token_loss
    from autorank_jax.adapters.nnx import task_from_nnx
    from autorank_jax.adapters.peft import export_peft
    from autorank_jax.adapters.task import merge
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "classification_loss",
    "export_peft",
    "max_ranks",
    "merge",
    "regression_loss",
    "task_from_causal_lm",
    "task_from_function",
    "task_from_linen",
    "task_from_lora_params",
    "task_from_nnx",
    "token_loss",
    "token_weighted",
    "with_qwix",
]
