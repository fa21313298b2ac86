"""Models that carry their adapters: as ours on the same model, whatever put them there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import autorank_jax as ar
from autorank_jax.types import Adapter

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(20, 4)).astype(np.float32)
TARGETS = RNG.integers(0, 3, 20)


class Plain(nnx.Module):
    def __init__(self, kind):
        rngs = nnx.Rngs(0)
        self.first, self.second = kind(4, 6, rngs=rngs), kind(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def carrying(d_in, d_out, *, rngs):
    return nnx.LoRALinear(d_in, d_out, lora_rank=3, rngs=rngs)


def pair():
    """Return tasks of one model, with our adapters and with its own, both from one start that does something."""
    model, theirs = Plain(nnx.Linear), Plain(carrying)
    ours = ar.task_from_nnx(model, max_rank=3, train_dense=())
    moved = {}
    for path, adapter in ours.server.trainable.adapters.items():
        moved[path] = Adapter(adapter.lora_a, jnp.asarray(RNG.normal(size=adapter.lora_b.shape), adapter.lora_b.dtype))
        layer = getattr(theirs, path)
        layer.kernel.set_value(getattr(model, path).kernel[...])
        layer.lora.lora_a.set_value(moved[path].lora_a)
        layer.lora.lora_b.set_value(moved[path].lora_b)
    server = ours.server._replace(trainable=ours.server.trainable._replace(adapters=moved))
    return ours._replace(server=server), ar.task_from_lora_params(theirs), theirs


def after_a_round(task, rule):
    ranks = {path: jnp.asarray([1, 3]) for path in ar.max_ranks(task)}
    data = ar.from_parts(jnp.asarray(INPUTS), jnp.asarray(TARGETS), [range(8), range(8, 20)])
    round_fn = ar.make_round(ar.make_local_training(task, optax.sgd(0.3), batch_size=4), rule, rank_levels=1)
    return jax.jit(round_fn)(jax.random.key(0), ar.init_state(task.server, rule, ranks), data)[0].server


def test_gradients_are_those_of_our_adapters():
    ours, theirs, _ = pair()
    batch = ar.Batch(jnp.asarray(INPUTS), jnp.asarray(TARGETS), jnp.ones(20))

    def gradients(task):
        def loss(trainable):
            return jnp.sum(task.loss(task.server.frozen, trainable, batch, jax.random.key(0)))

        return jax.jit(jax.grad(loss))(task.server.trainable).adapters

    found = gradients(theirs)
    for path, gradient in gradients(ours).items():
        assert jnp.max(jnp.abs(gradient.lora_b)) > 0.1
        for one, other in zip(gradient, found[f"{path}/lora"], strict=True):
            np.testing.assert_allclose(other, one, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rbla", "raflora"])
def test_a_round_is_that_of_our_adapters(rule):
    ours, theirs, model = pair()
    assert sorted(ar.max_ranks(theirs)) == ["first/lora", "second/lora"]
    made = ar.aggregators.RULES[rule]()
    one, other = after_a_round(ours, made), after_a_round(theirs, made)
    for path, adapter in one.trainable.adapters.items():
        product = other.trainable.adapters[f"{path}/lora"]
        np.testing.assert_allclose(product.lora_a @ product.lora_b, adapter.lora_a @ adapter.lora_b, atol=1e-5)
        assert jnp.max(jnp.abs(adapter.lora_b - ours.server.trainable.adapters[path].lora_b)) > 1e-3
    trained = ar.merge(theirs, other)
    np.testing.assert_allclose(trained(jnp.asarray(INPUTS)), ar.merge(ours, one)(jnp.asarray(INPUTS)), atol=1e-5)
    assert jnp.max(jnp.abs(trained(jnp.asarray(INPUTS)) - model(jnp.asarray(INPUTS)))) > 1e-3


def test_rules_that_merge_into_the_base_are_refused():
    _, theirs, _ = pair()
    with pytest.raises(ValueError, match="to be a Base with a kernel for every adapter"):
        after_a_round(theirs, ar.aggregators.flora())


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (None, "expected a model that carries nnx.LoRAParams, got one without"),
        ({"w_lora_a": (4, 2)}, "expected both factors of every adapter, got 'w_lora_a' alone"),
        ({"w_up": (4, 2)}, r"named \*lora_a and \*lora_b, got 'w_up'"),
        ({"w_lora_a": (4, 2), "w_lora_b": (3, 5)}, r"got \(4, 2\) and \(3, 5\)$"),
        ({"w_lora_a": (2, 5, 2), "w_lora_b": (2, 2, 7)}, "which are both: choose another rank"),
    ],
)
def test_what_is_no_adapter_is_refused(shapes, said):
    model = Plain(nnx.Linear)
    for name, shape in (shapes or {}).items():
        setattr(model, name, nnx.LoRAParam(jnp.zeros(shape)))
    with pytest.raises(ValueError, match=said):
        ar.task_from_lora_params(model)


class Einsum(nnx.Module):
    """A layer of nobody's class: it multiplies by a parameter."""

    def __init__(self):
        self.w = nnx.Param(jnp.asarray(RNG.normal(size=(4, 2, 8)), jnp.float32))

    def __call__(self, x):
        return jnp.einsum("bd,dnh->bnh", x, self.w[...]).reshape(x.shape[0], -1)


def of_qwix(**options):
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    provider = qwix.LoraProvider(module_path=".*", rank=3, alpha=6.0, **options)
    return qwix.apply_lora_to_model(Einsum(), provider, jnp.ones((2, 4)), rngs=nnx.Rngs(0))


class Inner(nnx.Module):
    def __init__(self):
        self.a = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.a(x)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_layer_gets_no_adapter():
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8)
    model = qwix.quantize_model(Inner(), qwix.PtqProvider([rule]), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="probably quantised: adapt what qwix' LoRA gives by task_from_lora_params"):
        ar.task_from_nnx(model, max_rank=2)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("ignore")
def test_qwix_adapts_any_product():
    task = ar.task_from_lora_params(of_qwix())
    assert {path: tuple(map(jnp.shape, a)) for path, a in task.server.trainable.adapters.items()} == {
        "w": ((4, 3), (3, 16))
    }
    x, frozen = jnp.asarray(INPUTS, jnp.float32), task.server.frozen
    adapter = Adapter(*(jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((4, 3), (3, 16))))
    trainable = task.server.trainable._replace(adapters={"w": adapter})
    expected = x @ (frozen.rest["w"].reshape(4, 16) + 6 / 3 * adapter.lora_a @ adapter.lora_b)
    np.testing.assert_allclose(task.predict(frozen, trainable, x), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_takes_its_bytes():
    def bytes_of(task):
        step = jax.jit(lambda server, x: task.predict(server.frozen, server.trainable, x))
        return step.lower(task.server, jnp.ones((2, 4))).compile().memory_analysis().argument_size_in_bytes

    whole, small = (ar.task_from_lora_params(of_qwix(**o)) for o in ({}, {"weight_qtype": "int8"}))
    saved = bytes_of(whole) - bytes_of(small)
    assert saved == 4 * 64 - 64 - 4 * 16  # a scale for each of 16 channels
    state = after_a_round(small, ar.aggregators.rbla())
    assert jnp.any(state.trainable.adapters["w"].lora_b != 0)


class Scaled(nnx.Module):
    """Adapters as qwix names them, with a factor of their own."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(rngs.params.normal((4, 3)))
        self.kernel_lora_a = nnx.LoRAParam(rngs.params.normal((4, 2)))
        self.kernel_lora_b = nnx.LoRAParam(rngs.params.normal((2, 3)))

    def __call__(self, x):
        return x @ self.kernel[...] + 5.0 * (x @ self.kernel_lora_a[...] @ self.kernel_lora_b[...])


class Around(nnx.Module):
    def __init__(self, rngs):
        self.head = Scaled(rngs)

    def __call__(self, x):
        return self.head(x)


def test_exported_factors_give_what_the_model_computes(tmp_path):
    model = Around(nnx.Rngs(0))
    task = ar.task_from_lora_params(model)
    with pytest.raises(ValueError, match=r"^expected scale=, the factor by which the model multiplies .*, got None$"):
        ar.export_peft(tmp_path, task, task.server)
    for odd in (0.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="expected scale=, the factor"):
            ar.export_peft(tmp_path, task, task.server, scale=odd)
    with pytest.raises(ValueError, match=r"scale: expected one for each of \['head/kernel'\], got \['head'\]"):
        ar.export_peft(tmp_path, task, task.server, scale={"head": 5.0})
    folder = ar.export_peft(tmp_path, task, task.server, scale={"head/kernel": np.float32(5.0)})
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["head"]
    a, b = (tensors[f"base_model.model.head.lora_{side}.weight"] for side in "AB")
    update = config["lora_alpha"] / config["r"] * (b @ a)
    theirs = np.asarray(model(np.eye(4, dtype=np.float32)) - model.head.kernel[...])
    np.testing.assert_allclose(update.T, theirs, rtol=1e-5, atol=1e-5)
    ours = ar.task_from_nnx(Plain(nnx.Linear), max_rank=2)
    with pytest.raises(ValueError, match=r"expected no scale, .*, got 2"):
        ar.export_peft(tmp_path, ours, ours.server, scale=2)


def test_carried_adapters_are_exported_under_the_names_of_their_layers(tmp_path):
    _, task, _ = pair()
    tensors = load_file(ar.export_peft(tmp_path, task, task.server, scale=1.0) / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in tensors} == {"first", "second"}
    assert sorted(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == ["first", "second"]


class Foreign(nnx.Module):
    """Layers of three kinds that are no layers of Flax."""

    def __init__(self):
        self.einsum, self.named = Einsum(), type("Named", (nnx.Linear,), {})(16, 6, rngs=nnx.Rngs(0))
        self.out = nnx.Param(jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32))

    def __call__(self, x):
        return jnp.dot(jnp.tanh(self.named(self.einsum(x))), self.out[...])


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("ignore")
def test_layers_of_any_class_are_adapted_and_train(tmp_path):
    pytest.importorskip("qwix", reason="qwix is not installed")
    model = Foreign()
    task = ar.task_from_lora_params(ar.adapters.with_qwix(model, jnp.ones((1, 4)), rank=3))
    assert set(task.report.adapted) == {"einsum/w", "named/kernel", "out"}
    x = jnp.asarray(INPUTS)
    np.testing.assert_allclose(task.predict(task.server.frozen, task.server.trainable, x), model(x), rtol=1e-5)
    trained = after_a_round(task, ar.aggregators.rbla()).trainable
    assert all(bool(jnp.any(adapter.lora_b != 0)) for adapter in trained.adapters.values())
    moved = Adapter(*(jnp.asarray(RNG.normal(size=f.shape), f.dtype) for f in trained.adapters["out"]))
    server = task.server.trainable._replace(adapters=task.server.trainable.adapters | {"out": moved})
    hidden = np.tanh(model.named(model.einsum(x)))
    expected = hidden @ (model.out[...] + moved.lora_a @ moved.lora_b)  # the scale is 1
    np.testing.assert_allclose(task.predict(task.server.frozen, server, x), expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"^expected names=, as no module in PyTorch is known for .* 'einsum/w', got"):
        ar.export_peft(tmp_path, task, task.server, scale=1.0)
    ar.export_peft(tmp_path, task, task.server, scale=1.0, names=lambda path: path.replace("/", "_"))
    chosen = ar.task_from_lora_params(ar.adapters.with_qwix(model, jnp.ones((1, 4)), rank=3, where="named"))
    assert set(chosen.report.adapted) == {"named/kernel"}
    with pytest.raises(
        ValueError, match=r"^expected where as a regular expression for the path of some module, got 'x'"
    ):
        ar.adapters.with_qwix(model, jnp.ones((1, 4)), rank=3, where="x")
    with pytest.raises(ValueError, match=r"^expected where as a regular expression, got '\('"):
        ar.adapters.with_qwix(model, jnp.ones((1, 4)), rank=3, where="(")
    with pytest.raises(ValueError, match=r"^expected inputs that the model takes"):
        ar.adapters.with_qwix(model, jnp.ones((1, 5)), rank=3)
