"""Federated rounds: local training of one client, lanes that train many, the round, many rounds.

A client of rank `r` trains matrices whose rank positions beyond `r` are zero in *both* factors. Their gradient is then exactly
zero in both, so training padded matrices *is* training truncated ones, and ranks never change a shape. A fixed number of
lanes is vmapped; lanes pull clients from a queue, longest first, so that memory is O(lanes + data) and work O(total steps).
Rank levels run the loop once per static adapter width, so that cost follows rank.

- `make_local_training(task, optimizer, batch_size=...)`: of one client; `loss=mine` is
  `(frozen, trainable, start, batch, key) -> (batch,)`, and `local.with_penalty` keeps a penalty out of the recorded losses.
  `scale=` is the LoRA scale by rank, which the client applies and the server never sees: 1, or `alpha_over_rank(α)` =
  `α/r`, or `alpha_over_sqrt_rank(α)` = `α/√r`.
- `make_round(local, rule, lanes=...)`: `(key, state, data) -> (state, info)`, a pure function; `choose_lanes` counts lanes,
  `choose_levels` finds rank levels that pay for their compilation.
- `compile_ahead(round_fn, key, state, data)`: the round, compiled; unlike a jitted one it does not copy the frozen weights that it returns.
- `init_state`, `simulate`: the state before the first round, and a `lax.scan` over rounds.
- `sharding`: many devices and hosts. `training_flops`: what training costs by rank.

The program stays the same; results differ by rounding only.

| where | command |
|---|---|
| laptop, one virtual device per core | `autorank-jax run` |
| the same without depending on the number of cores | `autorank-jax run --devices 1` |
| one GPU, or all GPUs of a host | `autorank-jax run`, with JAX for CUDA installed |
| many hosts under Slurm, Kubernetes or Cloud TPU | `srun autorank-jax run --distributed --out SHARED/run` |
| many hosts by hand, on host `i` of 2 | `autorank-jax run --distributed --coordinator host0:1234 --num-processes 2 --process-id i --out SHARED/run` |

Devices take clients longest first; every device trains its share, then all add up once per round. In Python:
`make_round(..., mesh=sharding.client_mesh())`. GPUs and several real hosts are not measured yet.
When a process dies, the others end within a minute and say so; started again with `run --resume DIR`, all go on to the same bits.

```python
import autorank_jax as ar
import jax
import optax
from flax import nnx

images = ar.load_dataset("synthetic")
data = ar.from_parts(images.x_train, images.y_train, ar.partition.iid(images.y_train, 4, seed=0))
features = images.x_train[0].size
task = ar.task_from_nnx(ar.models.MLP((features, 8, images.classes), rngs=nnx.Rngs(0)), max_rank=4)
ranks = ar.ranks_from_ratios([0.25, 0.5, 0.75, 1.0], ar.max_ranks(task.server.trainable))
rule = ar.aggregators.rbla()
round_fn = ar.make_round(ar.make_local_training(task, optax.sgd(0.1), batch_size=64), rule, lanes=2)
state, info = jax.jit(round_fn)(jax.random.key(1), ar.init_state(task.server, rule, ranks), data)
print(int(info.participants), int(state.round))
```
"""  # noqa: E501

from autorank_jax.engine.ahead import compile_ahead
from autorank_jax.engine.flops import FlopModel, training_flops
from autorank_jax.engine.lane_count import choose_lanes
from autorank_jax.engine.levels import LevelChoice, Workload, choose_levels
from autorank_jax.engine.local import (
    alpha_over_rank,
    alpha_over_sqrt_rank,
    make_local_training,
    with_penalty,
    with_proximal_term,
)
from autorank_jax.engine.optimizers import scale_updates
from autorank_jax.engine.probe import probe
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import History, init_state, simulate

__all__ = [
    "FlopModel",
    "History",
    "LevelChoice",
    "Workload",
    "alpha_over_rank",
    "alpha_over_sqrt_rank",
    "choose_lanes",
    "choose_levels",
    "compile_ahead",
    "init_state",
    "make_local_training",
    "make_round",
    "probe",
    "scale_updates",
    "simulate",
    "training_flops",
    "with_penalty",
    "with_proximal_term",
]
