"""Clients: their data, who takes part in a round, and what goes wrong there.

- `FederatedData`: all clients' examples, flat; `from_parts(inputs, targets, parts)` or `from_client_ids(inputs, targets, ids)`
  make it of arrays or pytrees of arrays. Nothing is padded to the largest client.
- `ClientStats`: what rank policies may look at; `client_stats(data, classes=...)`, or `groups=` where there are no labels.
- `text_clients(instructions, tokenizer, length=..., clients_by="category")`: clients of instructions, texts packed into rows.
- `partition`: splits: IID, Dirichlet, shards, quantity, staircase, Dirichlet × log-normal. `partition.holdout` keeps a share of
  every client's examples from training, `split_test_set` shares a test set out by the clients' labels.
- participation: `everyone`, `sample_uniformly`, `sample_by_size`, `sample_independently`; `by_examples` and `equally` weigh.
- `faults`: drop-out, stragglers, broken clients.

```python
import autorank_jax as ar
import numpy as np

rng = np.random.default_rng(0)
x, owner = rng.normal(size=(400, 5)).astype(np.float32), rng.integers(0, 6, 400)
y = (x @ rng.normal(size=5)).astype(np.float32)
data = ar.from_client_ids(x, y, owner)
stats = ar.client_stats(data, groups=(y > 0).astype(int))  # no labels: count any grouping
print(data.size.shape, stats.label_counts.shape)
```
"""  # noqa: E501

from autorank_jax.federated.data import client_stats, from_client_ids, from_parts
from autorank_jax.federated.held_out import split_test_set
from autorank_jax.federated.participation import (
    by_examples,
    equally,
    everyone,
    sample_by_size,
    sample_independently,
    sample_uniformly,
)
from autorank_jax.federated.texts import TextClients, TextReport, text_clients, text_rows

__all__ = [
    "TextClients",
    "TextReport",
    "by_examples",
    "client_stats",
    "equally",
    "everyone",
    "from_client_ids",
    "from_parts",
    "sample_by_size",
    "sample_independently",
    "sample_uniformly",
    "split_test_set",
    "text_clients",
    "text_rows",
]
