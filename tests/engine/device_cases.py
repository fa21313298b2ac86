"""A small federation for comparing devices, and the processes that compare more devices than tests have.

All aggregation rules are fed by the same clients in one compiled round: what comes out is left in the rule's state.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from autorank_jax import aggregators
from autorank_jax.engine import local, sharding
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.experiment import setup
from autorank_jax.experiment.checkpoints import Checkpoints
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.run import run_experiment
from autorank_jax.federated.data import from_parts
from autorank_jax.federated.participation import Cohort, sample_uniformly
from autorank_jax.types import Adapter, Aggregator, Base, LocalState, LocalTraining, Server, Task, Trainable, Trains

SIZES = (9, 3, 40, 4, 8, 12, 5, 1, 22, 6, 7)
RANKS = {"layer": np.array([1, 4, 2, 3, 4, 1, 2, 3, 4, 2, 1])}
D_IN, D_OUT, MAX_RANK = 5, 3, 4
BATCH = 4
BROKEN = 4  # a client with NaN in its data


def make_task():
    rng = np.random.default_rng(0)
    adapter = Adapter(rng.normal(size=(D_IN, MAX_RANK)), rng.normal(size=(MAX_RANK, D_OUT)))
    base = Base({"layer": rng.normal(size=(D_IN, D_OUT))}, ())
    server = Server(Trainable({"layer": adapter}, rng.normal(size=D_OUT)), base)

    def loss(frozen, trainable, batch, key):
        x = batch.inputs + 0.01 * jax.random.normal(key, batch.inputs.shape, batch.inputs.dtype)
        a, b = trainable.adapters["layer"]
        outputs = jnp.tanh(x @ frozen.kernels["layer"] + x @ a @ b + trainable.dense[None, :])
        return jnp.sum(jnp.square(outputs - batch.targets), axis=1)

    return Task(jax.tree.map(jnp.asarray, server), loss, None)


def make_parts():
    rng, n = np.random.default_rng(1), sum(SIZES) + 5
    inputs, targets = rng.normal(size=(n, D_IN)), rng.normal(size=(n, D_OUT))
    return inputs, targets, np.split(rng.permutation(n)[: sum(SIZES)], np.cumsum(SIZES)[:-1])


def make_data(broken=False):
    """All examples on every device."""
    inputs, targets, parts = make_parts()
    data = from_parts(inputs, targets, parts, ids=3 * np.arange(len(SIZES)))
    return data._replace(inputs=data.inputs.at[parts[BROKEN][2]].set(jnp.nan)) if broken else data


def all_rules():
    rules = {name: rule() for name, rule in aggregators.RULES.items()}
    return rules | {"hetlora/pruned": aggregators.hetlora(prune=0.6)}


def side_by_side(rules, *, update=True):
    """Feed the same clients to many rules; clients start as FedSA-LoRA hands out, from factors of their own.

    Without `update` the sums themselves are left in the state: then one compiled `server_steps` serves all meshes.
    """

    def own(update, name):
        return update._replace(client=update.client._replace(state=update.client.state[name]))

    def start(server, state, client):  # noqa: ARG001
        return rules["fedsa_lora"].start(server, (), client._replace(state=client.state["fedsa_lora"]))

    return Aggregator(
        init=lambda server: (),  # noqa: ARG005
        start=start,
        trains=lambda state: Trains(),  # noqa: ARG005
        summand=lambda u, server, plan: {n: r.summand(own(u, n), server, plan) for n, r in rules.items()},
        update=lambda key, sums, state, server: (  # noqa: ARG005
            server,
            server_steps(rules, key, sums, server) if update else sums,
        ),
        client_init=lambda server: {n: r.client_init(server) for n, r in rules.items()},
        client_keep=lambda u, server: {n: r.client_keep(own(u, n), server) for n, r in rules.items()},
        exact_plan=any(rule.exact_plan for rule in rules.values()),
    )


def server_steps(rules, key, sums, server):
    """Return the server and the state of every rule after its step."""
    return {name: rule.update(key, sums[name], rule.init(server), server) for name, rule in rules.items()}


def sampled(key, data):
    """Eight of the clients, two of whom drop out."""
    cohort = sample_uniformly(8)(key, data)
    return Cohort(cohort.row, cohort.present & (jnp.arange(8) % 4 != 1))


def compile_round(rules, *, update=True, **options):
    task = make_task()
    training = local.make_local_training(task, optax.sgd(0.05, momentum=0.5), batch_size=BATCH)
    options = {"rank_levels": 2, "participation": sampled} | options
    return jax.jit(make_round(training, side_by_side(rules, update=update), **options))


def start_state(rules):
    return init_state(make_task().server, side_by_side(rules), RANKS, local_epochs=2, max_epochs=2)


def run_rounds(rules, data, rounds=1, mesh=None, **options):
    """Return the state and the information of the last round, on the host."""
    state, key = start_state(rules), jax.random.key(5)
    train = compile_round(rules, mesh=mesh, **options)
    if mesh is not None:
        state, key = sharding.replicate((state, key), mesh)
        data = data if data.owner is not None else sharding.replicate(data, mesh)
    for _ in range(rounds):
        state, info = train(key, state, data)
    return jax.tree.map(np.asarray, (state, info))


def assert_close(one, other, tolerance=1e-9):
    """Compare two trees of numbers."""
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), one, other)


def assert_same_round(one, other):
    """Compare the results of two rounds without how long lanes were held."""
    assert_close(*((state, info._replace(lane_steps=0)) for state, info in (one, other)))


def by_product(server):
    """Return what a server says, not how: the factors that an SVD gives have free signs."""
    products = {path: a @ b for path, (a, b) in server.trainable.adapters.items()}
    return products, server.trainable.dense, server.frozen


def owned(mesh):
    """The examples of `make_data`, each on its client's device only."""
    inputs, targets, parts = make_parts()
    return sharding.owned_data(mesh, inputs, targets, parts, ids=3 * np.arange(len(SIZES)))


# ------------------------------------------------------------------------------------- run in processes of their own


def compare_devices():
    """Compare 2, 4 and 8 devices with one by all rules: by sums and by server steps."""
    jax.config.update("jax_enable_x64", True)
    server, rules = make_task().server, all_rules()

    @jax.jit
    def step(sums):
        return server_steps(rules, jax.random.key(0), sums, server)

    def results(devices):
        mesh = sharding.client_mesh(jax.devices()[:devices]) if devices > 1 else None
        state, info = run_rounds(rules, make_data(broken=True), mesh=mesh, update=False)
        after = {name: (by_product(new), memory) for name, (new, memory) in step(state.aggregator).items()}
        return state, info._replace(lane_steps=0), after

    alone = results(1)
    assert (alone[1].participants, alone[1].excluded) == (6, 1)
    for devices in (2, 4, 8):
        assert_close(results(devices), alone)
    print("equal", flush=True)


def count_steps():
    """Print the steps that each of 8 devices takes with 1,000 clients of log-normal sizes."""
    clients, epochs = 1000, 2
    size = np.ceil(16 * np.exp(np.random.default_rng(0).normal(size=clients))).astype(int)
    n = int(size.sum())
    data = from_parts(np.zeros((n, 1), np.int8), np.zeros(n, np.int8), np.split(np.arange(n), np.cumsum(size)[:-1]))
    adapter = Adapter(jnp.zeros((3, 4)), jnp.zeros((4, 3)))
    server = Server(Trainable({"layer": adapter}, jnp.zeros(())), ())
    nothing = LocalTraining(
        begin=lambda hparams, start, client: LocalState(start, ()),  # noqa: ARG005
        step=lambda hparams, setting, state, batch, key: (state, jnp.zeros(BATCH)),  # noqa: ARG005
        end=lambda state, client: state.params,  # noqa: ARG005
        batch_size=BATCH,
    )
    rule = aggregators.zero_pad()._replace(
        client_init=lambda server: jnp.full((), -1, jnp.int32),  # noqa: ARG005
        client_keep=lambda update, server: jax.lax.axis_index("clients"),  # noqa: ARG005
    )
    mesh = sharding.client_mesh()
    state = init_state(server, rule, {"layer": np.full(clients, 4)}, local_epochs=epochs)
    key, state, data = sharding.replicate((jax.random.key(0), state, data), mesh)
    state, info = jax.jit(make_round(nothing, rule, mesh=mesh))(key, state, data)
    steps = epochs * -(-size // BATCH)
    assert info.steps == steps.sum()
    print(*np.bincount(np.asarray(state.clients), weights=steps, minlength=8).astype(int), flush=True)


def be_one_process(port, number):
    """Be one process of two that hold two devices each, and compare all four with one by all rules."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    mesh, rules = sharding.client_mesh(), all_rules()
    assert (mesh.devices.size, jax.local_device_count()) == (4, 2)
    data = owned(mesh)
    assert len(data.inputs.addressable_shards) == 2
    together = run_rounds(rules, data, mesh=mesh)
    if number == 0:
        assert_same_round(together, run_rounds(rules, make_data()))
    print("done", flush=True)


def make_wide_model(make_model, *args, **kwargs):
    """Make a model with parameters in 64 bits."""
    model, max_rank = make_model(*args, **kwargs)
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), nnx.state(model, nnx.Param)))
    return model, max_rank


def resume_elsewhere(folder):
    """Interrupt an experiment on one device and go on with it on four, and the other way round; compare with one."""
    jax.config.update("jax_enable_x64", True)
    setup.make_model = partial(make_wide_model, setup.make_model)
    experiment = Experiment(
        dataset="synthetic", split="dirichlet_lognormal", clients=6, hidden=(6,), rank_policies=("autorank",),
        rounds=2, local_epochs=1, probe_epochs=2, rank_levels=1, targets=(), drop_out=0.2,
    )  # fmt: skip

    def run(mesh, stop, path=None):
        """Return the state after the last round, None where it was interrupted."""
        states = []

        def on_round(end):
            states.append(end.state)
            if end.row.round == stop:
                raise KeyboardInterrupt

        checkpoints = None if path is None else Checkpoints(path)
        try:
            run_experiment(experiment, mesh=mesh, on_round=on_round, checkpoints=checkpoints)
        except KeyboardInterrupt:
            return None
        return states[-1]

    mesh = sharding.client_mesh()
    expected = run(None, stop=0)
    assert int(expected.round) == experiment.rounds
    for number, (first, then) in enumerate(((None, mesh), (mesh, None))):
        path = Path(folder) / str(number)
        assert run(first, stop=1, path=path) is None
        assert_close(run(then, stop=0, path=path), expected)
    print("equal", flush=True)
