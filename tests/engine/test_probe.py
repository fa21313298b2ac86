"""The public probe: loss curves for rank policies, nothing else kept."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autorank_jax as ar
from autorank_jax.engine import local
from autorank_jax.engine.probe import part_of, part_sizes
from autorank_jax.types import Trains
from tests.engine.test_optimizers import CLIENTS, data, task

EPOCHS = 3


def training(optimizer=None, **options):
    return ar.make_local_training(task(), optimizer or optax.sgd(0.3), batch_size=4, **options)


def start(rule=None):
    return ar.init_state(task().server, rule or ar.aggregators.rbla(), None, clients=CLIENTS, max_epochs=EPOCHS)


def round_losses(ranks):
    """What one ordinary round records."""
    state = start()
    state = state._replace(ranks={"layers/0": jnp.full(CLIENTS, ranks, jnp.int32)})
    state = state._replace(hparams=state.hparams | {"local_epochs": jnp.asarray(EPOCHS, jnp.int32)})
    return jax.jit(ar.make_round(training(), ar.aggregators.rbla()))(jax.random.key(4), state, data())[0].epoch_losses


@pytest.mark.slow
def test_the_default_policy_works_with_the_probe():
    stats = ar.probe(jax.random.key(4), training(), start(), data(), epochs=EPOCHS, ratio=1.0, share=1.0)
    np.testing.assert_allclose(stats.epoch_losses, round_losses(2), rtol=1e-6)
    np.testing.assert_array_equal(stats.epochs, [EPOCHS] * CLIENTS)
    plain = ar.client_stats(data())
    np.testing.assert_array_equal(stats.label_counts, plain.label_counts)
    ratios, info = ar.policies.autorank()(jax.random.key(0), stats)
    assert ratios.shape == (CLIENTS,)
    assert info.matrix.shape[1] == 5


def test_a_probe_at_a_small_rank_under_any_rule():
    """The rule of the state does not matter, not even one that freezes a factor or keeps clients' models."""
    stats = [
        ar.probe(jax.random.key(4), training(), start(rule), data(), epochs=EPOCHS, ratio=0.5, share=1.0, lanes=2)
        for rule in (ar.aggregators.ffa_lora(), ar.aggregators.local_only())
    ]
    np.testing.assert_allclose(stats[0].epoch_losses, round_losses(1), rtol=1e-6)
    np.testing.assert_array_equal(stats[0].epoch_losses, stats[1].epoch_losses)
    assert not np.allclose(stats[0].epoch_losses[:, 1:], round_losses(2)[:, 1:])
    assert ar.aggregators.ffa_lora().trains(()) == Trains(lora_a=False)


def test_a_part_is_drawn_of_every_clients_own_examples():
    parts = [np.arange(0, 400), np.arange(400, 440), np.array([440, 441]), np.array([], int)]
    whole = ar.from_parts(np.zeros((442, 1), np.float32), np.zeros(442, np.int32), parts, classes=1, allow_empty=True)
    order = jnp.concatenate([whole.order[400:], whole.order[:400]])  # clients need not lie in order
    moved = whole._replace(order=order, start=jnp.array([42, 0, 40, 42], jnp.int32))
    for one in (whole, moved):
        found = [np.asarray(column) for column in part_of(jax.random.key(3), one, 0.25)[2:5]]
        assert found[2].tolist() == [100, 32, 2, 0]
        assert found[1].tolist() == one.start.tolist()
        drawn = [found[0][start : start + size].tolist() for start, size in zip(*found[1:], strict=True)]
        for own, part in zip(drawn, parts, strict=True):
            assert len(set(own)) == len(own)
            assert set(own) <= set(part.tolist())
        assert max(drawn[0]) > 200 > min(drawn[0])  # not the first ones
        assert drawn[0] != part_of(jax.random.key(4), one, 0.25).order[one.start[0] :][:100].tolist()
    assert part_of(jax.random.key(3), whole, 1.0) is whole
    assert part_sizes([400, 33, 5], 0.1).tolist() == [40, 32, 5]


def test_a_part_is_the_same_whoever_else_is_there():
    sizes = [90, 200, 120, 70]
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    whole = ar.from_parts(np.zeros((480, 1), np.float32), np.zeros(480, np.int32), parts, classes=1)

    def drawn(data):
        part = part_of(jax.random.key(5), data, 0.5)
        rows = zip(part.id.tolist(), part.start.tolist(), part.size.tolist(), strict=True)
        return {name: part.order[start : start + size].tolist() for name, start, size in rows}

    some = np.array([3, 1])
    fewer = whole._replace(start=whole.start[some], size=whole.size[some], id=whole.id[some])
    assert drawn(fewer) == {name: own for name, own in drawn(whole).items() if name in fewer.id.tolist()}
    assert len(drawn(fewer)) == 2


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_a_part_lies_where_the_data_were_put():
    whole = data()
    placed = jax.device_put(whole, jax.devices()[1])
    assert part_of(jax.random.key(3), placed, 0.5).order.devices() == {jax.devices()[1]}
    state = jax.device_put(start(), jax.devices()[1])
    ar.probe(jax.random.key(4), training(), state, whole, epochs=2)  # not put anywhere: it goes with the state


def test_the_probe_of_a_share_looks_at_no_other_example(monkeypatch):
    monkeypatch.setattr(importlib.import_module("autorank_jax.engine.probe"), "FEWEST", 1)
    whole, key = data(), jax.random.key(4)
    part = part_of(key, whole, 0.5)
    kept = np.concatenate([np.asarray(part.order[s : s + n]) for s, n in zip(part.start, part.size, strict=True)])
    assert len(kept) < len(whole.order)
    inputs = np.full_like(whole.inputs, np.nan)
    inputs[kept] = np.asarray(whole.inputs)[kept]
    found = [
        ar.probe(key, training(), start(), one, epochs=EPOCHS, share=0.5)
        for one in (whole, whole._replace(inputs=jnp.asarray(inputs)))
    ]
    np.testing.assert_array_equal(found[0].epoch_losses, found[1].epoch_losses)
    assert np.isfinite(found[0].epoch_losses).all()
    np.testing.assert_array_equal(found[0].size, whole.size)  # other statistics are of all


def exploding(clients):
    """A loss that is infinite for the clients of these labels."""

    def loss(frozen, trainable, start, batch, key):
        losses = local.from_task_loss(task().loss)(frozen, trainable, start, batch, key)
        return jnp.where(jnp.any(batch.inputs[:, 0] > clients), jnp.inf, losses)

    return loss


@pytest.mark.slow
def test_clients_without_a_curve_are_told():
    highest = [float(np.max(np.asarray(data().inputs)[8 * k : 8 * k + 8, 0])) for k in range(CLIENTS)]
    between = sum(sorted(highest)[-2:]) / 2
    with pytest.warns(UserWarning, match="the training of 1 of 3 clients was not finite: they have no loss curve"):
        stats = ar.probe(jax.random.key(4), training(loss=exploding(between)), start(), data(), epochs=2)
    assert sorted(stats.epochs.tolist()) == [0, 2, 2]
    with pytest.raises(ValueError, match="expected finite losses of a probe, got none of any client: try a smaller"):
        ar.probe(jax.random.key(4), training(loss=exploding(-99.0)), start(), data(), epochs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1}, "expected epochs >= 2, got 1"),
        ({"ratio": 4}, r"expected ratio in \(0, 1\], got 4, probably"),
        ({"share": 25}, r"expected share in \(0, 1\], got 25, probably a percentage"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ar.probe(jax.random.key(0), training(), start(), data(), **options)


def test_a_probe_inside_jit_is_refused():
    examples, state = data(), start()
    with pytest.raises(
        TypeError, match="client_stats: expected arrays with values, got traced ones, probably inside j"
    ):
        jax.eval_shape(lambda d: ar.client_stats(d).size, examples)
    with pytest.raises(TypeError, match="expected arrays with values, got traced ones, probably inside jit"):
        jax.eval_shape(lambda d: ar.probe(jax.random.key(0), training(), state, d).size, examples)
