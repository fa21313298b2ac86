"""Optimisers of optax as clients': each trains, or is refused in one line. Rounds are traced; nothing is compiled."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

from autorank_jax import aggregators
from autorank_jax.engine import init_state, make_local_training, make_round
from tests.engine.test_optimizers import CLIENTS, data, task


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


WORKING = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1),
    "nadam": lambda: optax.nadam(0.1),
    "adamax": lambda: optax.adamax(0.1),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "adabelief": lambda: optax.adabelief(0.1),
    "adagrad": lambda: optax.adagrad(0.1),
    "adadelta": lambda: optax.adadelta(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1),
    "radam": lambda: optax.radam(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "lars": lambda: optax.lars(0.1),
    "lion": lambda: optax.lion(0.1),
    "yogi": lambda: optax.yogi(0.1),
    "novograd": lambda: optax.novograd(0.1),
    "fromage": lambda: optax.fromage(0.1),
    "adafactor": lambda: optax.adafactor(0.1),
    "sm3": lambda: optax.sm3(0.1),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=0),
    "sign_sgd": lambda: optax.sign_sgd(0.1),
    "polyak_sgd": optax.polyak_sgd,
    "lbfgs": optax.lbfgs,
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau()),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 10)),
    "schedule_free": lambda: contrib.schedule_free_adamw(0.1),
    "sam": lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True),
    "prodigy": contrib.prodigy,
    "dadapt": contrib.dadapt_adamw,
    "dog": contrib.dog,
    "momo": contrib.momo,
    "mechanic": lambda: contrib.mechanize(optax.sgd(0.1)),
    "ademamix": lambda: contrib.ademamix(0.1),
    "sophia": lambda: contrib.sophia(0.1),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    "multi_steps": lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    "muon": lambda: contrib.muon(0.1),
    "adopt": lambda: contrib.adopt(0.1),
    "cocob": contrib.cocob,
    "acprop": lambda: contrib.acprop(0.1),
    "dowg": contrib.dowg,
    "adan": lambda: optax.adan(0.1),
    "rprop": lambda: optax.rprop(0.1),
    "optimistic": lambda: optax.optimistic_gradient_descent(0.1),
    "masked": lambda: optax.masked(optax.adam(0.1), matrices),
    "by part": lambda: optax.partition({True: optax.adam(0.1), False: optax.set_to_zero()}, matrices),
    "injected schedule": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.1, 0, 9)),
    "skipping": lambda: optax.MultiSteps(
        optax.sgd(0.1), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "flattened": lambda: optax.flatten(optax.adam(0.1)),
    "named chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("sgd", optax.sgd(0.1))),
    "line search": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3)),
    "adaptive clipping": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "averaged": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "half momentum": lambda: optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16),
    "of hparams, in part": lambda: lambda h: functools.partial(optax.sgd, momentum=0.9)(h["learning_rate"]),
}
REFUSED = {
    "gradients of each example": lambda: optax.chain(
        contrib.differentially_private_aggregate(1.0, 1.0, key=0), optax.sgd(0.1)
    ),
    "mask of other parameters": lambda: optax.masked(optax.adam(0.1), {"kernel": True}),
    "lookahead": lambda: optax.lookahead(optax.sgd(0.1), 2, 0.5),
    "a function of parameters": lambda: optax.stateless(lambda updates, _: updates["kernel"]),
}


def trace(optimizer):
    local = make_local_training(task(), optimizer, batch_size=4)
    rule = aggregators.rbla()
    state = init_state(task().server, rule, None, clients=CLIENTS)
    return jax.eval_shape(make_round(local, rule, lanes=2), jax.random.key(0), state, data())


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WORKING)
def test_optimisers_work(name):
    with jax.numpy_rank_promotion("allow"):
        state, info = trace(WORKING[name]())
    assert state.server.trainable.adapters["layers/0"].lora_a.shape == (4, 2)
    assert info.loss.shape == ()


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", REFUSED)
def test_optimisers_are_refused_in_one_line(name):
    with pytest.raises(ValueError, match="expected an optimizer") as caught:
        trace(REFUSED[name]())
    assert len(str(caught.value).splitlines()) == 1
