"""Bad input at every public entry: each mistake raises at once, in words, never from inside JAX."""

import dataclasses
import functools
import hashlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import autorank_jax
from autorank_jax import aggregators, datasets, engine, federated, models
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.checkpoint import CheckpointError, read_about, restore_state, save_state
from autorank_jax.cli import main as cli
from autorank_jax.engine import local, simulation
from autorank_jax.evaluation import make_evaluate
from autorank_jax.experiment.config import ConfigurationError, Experiment, experiment_from
from autorank_jax.federated import faults, participation, partition
from autorank_jax.models.vision import MLP
from autorank_jax.ranks import budgets, mcda, policies
from autorank_jax.ranks.criteria import loss_entropy
from autorank_jax.ranks.table_file import read_criteria

KEY = jax.random.key(0)
X, Y = np.zeros((6, 4), np.float32), np.array([0, 1, 2, 0, 1, 2])
LABELS = np.arange(60) % 10
TREE = {"a": jnp.arange(3.0), "b": jnp.zeros((2, 2), jnp.int32)}
TRAINING = local.LocalTraining(None, None, None, 1)


def parts(*lists, **options):
    return federated.from_parts(X, Y, [np.array(p, np.int64) for p in lists], **options)


def ids(values, x=X, y=Y, **options):
    return federated.from_client_ids(x, y, values, **options)


def task(**options):
    return task_from_nnx(MLP((4, 3, 2), rngs=nnx.Rngs(0)), **{"max_rank": 2} | options)


def state(ranks=None, **options):
    server = task().server
    ranks = {path: np.ones(2, int) for path in server.trainable.adapters} if ranks is None else ranks
    return simulation.init_state(server, aggregators.rbla(), ranks, **options)


def stats(**options):
    return federated.client_stats(parts([0, 1, 2], [3, 4, 5]), classes=3)._replace(**options)


def experiment(**options):
    dataclasses.replace(Experiment(), **options).validate()


def saved(folder, **options):
    save_state(folder, TREE, step=7, config={"rounds": 5}, **options)
    return folder


def about(folder, change):
    """Change what a checkpoint says about itself, with a seal that is right again."""
    path = saved(folder) / "step_00000007" / "about.json"
    content = json.loads(path.read_text())["content"]
    content |= change
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"content": content, "checksum": seal}))
    return folder


def damaged(folder, name, how):
    path = next((saved(folder) / "step_00000007").rglob(name))
    how(path)
    return folder


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def written(folder, text, name="file.csv"):
    path = folder / name
    path.write_text(text)
    return path


CASES = {
    # client data
    "overlap": (lambda _: parts([0, 1, 2], [2, 3, 4, 5]), "the first is example 2 in clients 0, 1"),
    "repetition": (lambda _: parts([0, 1, 1], [2, 3, 4, 5]), "expected every example in one client only"),
    "gap": (lambda _: parts([0, 1], [3, 4, 5], require_all=True), "expected every example in some client, got 1 in"),
    "empty client": (lambda _: parts([], [0, 1, 2, 3, 4, 5]), "got none for client 0: leave it out, or allow_empty"),
    "number too large": (lambda _: parts([0, 1], [2, 6]), "expected example numbers in 0 .. 5, got 6 for client 1"),
    "negative number": (lambda _: parts([-1, 1], [2]), "got -1 for client 0"),
    "no clients": (lambda _: federated.from_parts(X, Y, []), "at least one example in some client, got 0 clients"),
    "masks for numbers": (
        lambda _: federated.from_parts(X, Y, [np.arange(6) < 3, np.arange(6) >= 3]), "use np.flatnonzero",
    ),
    "client numbers for parts": (lambda _: federated.from_parts(X, Y, [0, 0, 1, 1, 2, 2]), "use from_client_ids"),
    "labels from one": (lambda _: ids(Y, y=Y + 1, classes=3), "targets as labels in 0 .. 2, got 1 .. 3; probably"),
    "label of minus one": (lambda _: ids(Y, y=Y - 1, classes=3), "got -1 .. 1"),
    "real labels": (lambda _: ids(Y, y=Y + 0.5, classes=3), "expected targets as integers, got float64"),
    "one-hot labels": (lambda _: ids(Y, y=np.eye(6), classes=6), "got (6, 6); probably one-hot"),
    "lengths": (lambda _: ids(Y, y=Y[:5]), "of one length, got inputs 6, targets 5"),
    "missing values": (lambda _: ids(Y, x=X * np.nan), "got NaN in example 0, 1, 2"),
    "infinite values": (lambda _: ids(Y, x=X + np.inf), "got infinity in example 0, 1, 2"),
    "lists": (lambda _: ids(Y, x=X.tolist()), "probably a list: use np.asarray"),
    "text": (lambda _: ids(Y, x=np.array(list("abcdef"))), "got <U1: encode them"),
    "names of clients": (lambda _: ids(np.array(list("aabbcc"))), "np.unique(names, return_inverse=True)[1]"),
    "too few client numbers": (lambda _: ids(np.array([0, 1])), "one per example, got (2,)"),
    "equal ids": (lambda _: parts([0, 1, 2], [3, 4, 5], ids=[7, 7]), "expected different ids, got 7 more than once"),
    "hashes as ids": (lambda _: parts([0, 1, 2], [3, 4, 5], ids=[1, 2**40]), "number clients 0, 1"),
    # splits
    "more clients than examples": (lambda _: partition.iid(LABELS, 61, seed=0), "each of 61 clients, got 60"),
    "half a client": (lambda _: partition.iid(LABELS, 2.5, seed=0), "expected clients as a whole number"),
    "alpha": (lambda _: partition.dirichlet(LABELS, 3, alpha=0, seed=0), "expected alpha above 0 and finite, got 0"),
    "alpha nan": (lambda _: partition.dirichlet(LABELS, 3, alpha=float("nan"), seed=0), "got nan"),
    "sigma": (lambda _: partition.quantity(LABELS, 3, sigma=-1, seed=0), "expected sigma of at least 0"),
    "staircase": (lambda _: partition.staircase(LABELS, 3, seed=0), "expected 10 clients for 10 classes"),
    "shards": (lambda _: partition.shards(LABELS, 3, classes_per_client=2, seed=0), "expected classes_per_client in"),
    "seed": (lambda _: partition.iid(LABELS, 3, seed=-1), "expected seed >= 0, got -1"),
    "name of a split": (lambda _: partition.partition("stairs", LABELS, 3, seed=0), "expected a split out of"),
    "fraction": (lambda _: partition.holdout([np.arange(3)], 20, seed=0), "probably a percentage"),
    # criteria, scores, ranks
    "one criterion as a vector": (lambda _: mcda.critic_weights(np.ones(3)), "a single criterion is `[:, None]`"),
    "normalisation": (lambda _: mcda.topsis(np.ones((2, 2)), np.ones(2), normalization="max"), "got 'max'"),
    "weights": (lambda _: mcda.topsis(np.ones((2, 2)), np.ones(3)), "weights: expected shape (2,), got (3,)"),
    "losses": (lambda _: loss_entropy(np.ones((3, 0))), "at least one epoch"),
    "no probe": (lambda _: policies.autorank()(KEY, stats(epoch_losses=None)), "got None: autorank_jax.probe"),
    "criterion": (lambda _: policies.autorank(criteria=("entropy",))(KEY, stats()), "got 'entropy'"),
    "no criteria": (lambda _: policies.autorank(criteria=())(KEY, stats()), "expected at least one, got none"),
    "smallest ratio": (lambda _: policies.by_size(min_ratio=10), "probably a percentage or a rank"),
    "uniform ratio": (lambda _: policies.uniform(0.0), "expected ratio in (0, 1], got 0"),
    "ranks by hand": (lambda _: policies.manual([8, 16]), "got 8, probably a percentage or a rank"),
    "ratios of other clients": (lambda _: policies.manual([0.5] * 3)(KEY, stats()), "of 2 clients, got shape (3,)"),
    "maximum rank": (lambda _: policies.ranks_from_ratios([0.5], {"a": 0.5}), "max_ranks as a dict, each value"),
    "counts": (lambda _: policies.autorank_ranks([[1.0, float("nan")]], max_rank=4), "as finite numbers >= 0, got nan"),
    "budget": (lambda _: budgets.with_budget(policies.uniform(), 0.01), "of at least min_ratio = 0.1, got"),
    "budget of what": (lambda _: budgets.with_budget(policies.uniform(), 0.5, weight="flops"), "got 'flops'"),
    "profile": (lambda _: budgets.resource_profile("weak", KEY, 3), "expected a resource profile out of"),
    # models, training, rules, rounds
    "no layer matches": (lambda _: task(where="conv*"), "conv"),
    "rank of a layer": (lambda _: task(max_rank=0), "got 0"),
    "batch size": (lambda _: local.make_local_training(task(), optax.sgd(0.1), batch_size=0), "batch_size >= 1, got 0"),
    "proximal term": (lambda _: local.with_proximal_term(lambda *_: 0, -1), "expected a proximal strength >= 0"),
    "scale": (lambda _: local.alpha_over_rank(0), "expected a positive LoRA alpha, got 0"),
    "rule": (lambda _: aggregators.make_rule("rlba"), "probably 'rbla'"),
    "clipping": (lambda _: aggregators.with_norm_clipping(aggregators.rbla(), float("nan")), "positive max_norm"),
    "energy": (lambda _: aggregators.florist(tau=90), "expected an energy threshold tau in (0, 1], got 90"),
    "two server optimisers": (
        lambda _: aggregators.with_server_optimizer(
            aggregators.with_server_optimizer(aggregators.rbla(), optax.sgd(1.0)), optax.sgd(1.0)
        ),
        "got one that has it: chain both with optax.chain",
    ),
    "lanes": (lambda _: engine.make_round(TRAINING, aggregators.rbla(), lanes=0), "expected lanes >= 1, got 0"),
    "levels": (lambda _: engine.make_round(TRAINING, aggregators.rbla(), rank_levels=0), "rank_levels >= 1, got 0"),
    "rank of a client": (lambda _: state({p: np.full(2, 9) for p in ("layers/0", "layers/1")}), "in 1..2, got 9..9"),
    "ranks of another model": (lambda _: state({"head": np.ones(2, int)}), "expected ranks for the adapters"),
    "epochs": (lambda _: state(local_epochs=0), "expected local_epochs >= 1, got 0"),
    "rounds": (lambda _: simulation.simulate(KEY, lambda *_: 0, state(), parts([0]), rounds=0), "rounds >= 1, got 0"),
    "cohort": (lambda _: participation.sample_uniformly(0), "expected a cohort of at least one client, got 0"),
    "cohort by size": (lambda _: participation.sample_by_size(0), "expected a cohort of at least one client, got 0"),
    "probability": (lambda _: participation.sample_independently(50), "probably a percentage"),
    "drop-out": (lambda _: faults.drop_out(-0.1), "expected probability in [0, 1], got -0.1"),
    "schedule": (lambda _: faults.drop_out_schedule([[3, 4]]), "of bools of shape (rounds, clients), got int64 of"),
    "budget of steps": (lambda _: faults.limit_steps(0), "probably to drop clients out: use drop_out"),
    # what is of another kind
    "one criterion as text": (lambda _: policies.autorank(criteria="size"), "one name alone: ('size',)"),
    "criterion misspelt": (lambda _: policies.autorank(criteria=("sizes",)), "got 'sizes', probably 'size'"),
    "criterion twice": (lambda _: policies.autorank(criteria=("size", "size")), "once, got 'size' twice"),
    "too few directions": (
        lambda _: policies.autorank(criteria=("size", "classes"), benefit=(True,)), "benefit of 2 criteria",
    ),
    "ratio as text": (lambda _: policies.by_size(min_ratio="0.1"), "probably text that was not converted: 0.1"),
    "policy not called": (lambda _: budgets.with_budget(policies.uniform, 0.5), "probably not called: uniform()"),
    "proportions": (lambda _: policies.autorank_ranks([[0.9, 0.1], [0.5, 0.5]], max_rank=4), "probably proportions"),
    "percentages of labels": (lambda _: policies.autorank_ranks([[99.5, 0.5]], max_rank=4), "sum to 100 in every row"),
    "maximum rank as text": (lambda _: policies.autorank_ranks([[1, 2]], max_rank="16"), "was not converted: 16"),
    "maximum rank as a flag": (lambda _: policies.autorank_ranks([[1, 2]], max_rank=True), "whole number, got True"),
    "ragged counts": (lambda _: policies.autorank_ranks([[1, 2], [3]], max_rank=4), "rows of 1 and 2"),
    "negative counts": (lambda _: policies.autorank_ranks([[1, -2]], max_rank=4), "numbers >= 0, got -2"),
    "one maximum rank": (lambda _: policies.ranks_from_ratios([0.5], 16), "got 16; ar.max_ranks(task) makes them"),
    "one rank for all": (
        lambda _: simulation.init_state(task().server, aggregators.rbla(), 8), "expected ranks as a dict, each value",
    ),
    "computed ranks": (
        lambda _: state({p: np.full(2, 2.0) for p in ("layers/0", "layers/1")}), "probably ranks that were computed",
    ),
    "ratios for ranks": (
        lambda _: state({p: np.full(2, 0.5) for p in ("layers/0", "layers/1")}), "probably ratios: ranks_from_ratios",
    ),
    "rank of nobody": (lambda _: state({p: np.zeros(2, int) for p in ("layers/0", "layers/1")}), "in 1..2, got 0..0"),
    "rounds as text": (
        lambda _: simulation.simulate(KEY, lambda *_: 0, state(), parts([0]), rounds="5"), "not converted: 5",
    ),
    "seed for a key": (
        lambda _: simulation.simulate(3, lambda *_: 0, state(), parts([0]), rounds=5), "a seed: jax.random.key(3)",
    ),
    "several keys": (
        lambda _: budgets.resource_profile("random", jax.random.split(KEY, 2), 3), "several: one key is wanted",
    ),
    "dataset of no name": (lambda _: datasets.load_dataset(None), "expected name as text, got None"),
    "model by name": (lambda _: task_from_nnx("mlp", max_rank=2), "expected model as a Flax module, got 'mlp'"),
    "class of a model": (lambda _: task_from_nnx(nnx.Linear, max_rank=2), "probably the class itself: Linear(...)"),
    "lanes as text": (lambda _: engine.make_round(TRAINING, aggregators.rbla(), lanes="4"), "not converted: 4"),
    "lanes as a quotient": (lambda _: engine.make_round(TRAINING, aggregators.rbla(), lanes=4.0), "a quotient: 4"),
    "batch size as a flag": (
        lambda _: local.make_local_training(task(), optax.sgd(0.1), batch_size=True), "a whole number, got True",
    ),
    "optimizer not called": (
        lambda _: local.make_local_training(task(), optax.sgd, batch_size=4), "probably not called: optax.sgd(...)",
    ),
    "optimizer in part": (
        lambda _: local.make_local_training(task(), functools.partial(optax.sgd, momentum=0.9), batch_size=4),
        "probably not called: optax.sgd(...)",
    ),
    "learning rate for an optimizer": (
        lambda _: local.make_local_training(task(), 0.05, batch_size=4), "its learning rate alone: optax.sgd(0.05)",
    ),
    "name for an optimizer": (lambda _: local.make_local_training(task(), "sgd", batch_size=4), "got 'sgd'"),
    "no optimizer": (lambda _: local.make_local_training(task(), None, batch_size=4), "of hparams, got None"),
    "MultiSteps": (
        lambda _: local.make_local_training(task(), optax.MultiSteps(optax.sgd(0.1), 2), batch_size=4),
        "probably one step too early: .gradient_transformation()",
    ),
    "loss of a task for a local one": (
        lambda _: local.make_local_training(task(), optax.sgd(0.1), batch_size=4, loss=task().loss),
        "expected loss as a function of 5 arguments",
    ),
    "one layer alone": (lambda _: MLP((784,), rngs=nnx.Rngs(0)), "2 or more whole numbers >= 1, got (784,)"),
    "layer of no width": (lambda _: MLP((784, 0, 10), rngs=nnx.Rngs(0)), "whole numbers >= 1, got (784, 0, 10)"),
    "layer of half a unit": (lambda _: MLP((784, 1.5), rngs=nnx.Rngs(0)), "each a whole number, got (784, 1.5)"),
    "small image": (
        lambda _: models.CNN((1, 4, 4), 2, image=(2, 2), rngs=nnx.Rngs(0)), "an image of at least 4 pixels a side",
    ),
    "transformer of no depth": (
        lambda _: models.Transformer(4, 2, models.Size(8, 0, 2, 8, 8), rngs=nnx.Rngs(0)), "got (8, 0, 2, 8, 8)",
    ),
    "labels and images swapped": (
        lambda _: ids(Y, x=Y, y=np.zeros((6, 4, 4)), classes=3), "probably inputs and targets swapped",
    ),
    "test labels as text": (
        lambda _: make_evaluate(task(), np.zeros((6, 4, 4)), np.array(list("abcdef"))),
        "expected numbers at targets, got <U1: encode them, labels by np.unique(labels, return_inverse=True)[1]",
    ),
    "test set swapped": (
        lambda _: make_evaluate(task(), Y, np.zeros((6, 4, 4))), "expected inputs that the model takes, got an array",
    ),
    "clients as text": (lambda _: partition.iid(LABELS, "3", seed=0), "text that was not converted: 3"),
    # files
    "dataset": (lambda _: datasets.load_dataset("mnits", fetch=False), "mnits"),
    "dataset file": (lambda d: datasets.read_dataset(written(d, "no zip", "x.npz"), name="x"), "x.npz"),
    "criteria file": (lambda d: read_criteria(d / "none.csv"), "No such file"),
    "empty criteria file": (lambda d: read_criteria(written(d, "")), "got an empty file"),
    "ragged criteria file": (lambda d: read_criteria(written(d, "a,b\n1\n")), "expected 2 values in line 2, got 1"),
    "words in a criteria file": (lambda d: read_criteria(written(d, "a,b\n1,x\n2,3\n")), "column 'b', got 'x'"),
    # configuration
    "config of another kind": (lambda _: experiment_from([1]), "config: expected options by name, got list"),
    "config with an unknown option": (lambda _: experiment_from({"ruonds": 3}), "probably 'rounds'"),
    "config with a word": (lambda _: experiment_from({"rounds": "three"}).validate(), "rounds: expected a number"),
    "config with a number": (lambda _: experiment_from({"split": 3}), "split: expected a name, got 3"),
    "config without a list": (lambda _: experiment_from({"hidden": 8}), "hidden: expected a list of numbers, got 8"),
    "config of names": (lambda _: experiment_from({"rank_policies": "full"}), "expected a list of names, got 'full'"),
    "drop-out of a run": (lambda _: experiment(drop_out=30), "drop-out: expected a number of at least 0 and below 1"),
    "stragglers of a run": (lambda _: experiment(stragglers=float("nan")), "stragglers: expected"),
    "steps of stragglers": (lambda _: experiment(straggler_steps=0), "straggler-steps: expected a whole number"),
    "clipping of a run": (lambda _: experiment(clip_norm=-1.0), "clip-norm: expected a number of at least 0"),
    "config with a word for a switch": (lambda _: experiment_from({"personal": "yes"}), "expected true or false"),
    "whole weights with ranks": (
        lambda _: experiment(aggregators=("fedavg",)), "expected fedavg alone and with the rank policy full alone",
    ),
    "whole weights beside adapters": (
        lambda _: experiment(aggregators=("rbla", "fedavg"), rank_policies=("full",)), "got rbla,fedavg with full",
    ),
    "clients alone": (lambda _: experiment(aggregators=("local_only",)), "personal: expected it with local_only"),
    "validation of a run": (lambda _: experiment(validation=10), "validation: expected a number of at least 0"),
    "step of the server": (lambda _: experiment(server_learning_rate=0), "server-learning-rate: expected a number"),
    "momentum of the server": (lambda _: experiment(server_momentum=90), "server-momentum: expected a number of"),
    "sampling of a run": (lambda _: experiment(sampling="by-size"), "probably 'by_size'"),
    # checkpoints
    "no checkpoint": (lambda d: restore_state(d, TREE), "expected checkpoints in"),
    "another step": (lambda d: restore_state(saved(d), TREE, step=3), "expected a checkpoint of step 3"),
    "another configuration": (
        lambda d: restore_state(saved(d), TREE, config={"rounds": 6}), "rounds: expected 6, got 5",
    ),
    "another option": (
        lambda d: restore_state(saved(d), TREE, config={"rounds": 5, "lanes": 2}), "lanes: expected 2, got nothing",
    ),
    "another shape": (
        lambda d: restore_state(saved(d), TREE | {"a": jnp.zeros(4)}), "['a']: expected float32[4], got float32[3]",
    ),
    "another type": (lambda d: restore_state(saved(d), TREE | {"a": jnp.zeros(3, int)}), "expected int32[3]"),
    "another array": (lambda d: restore_state(saved(d), {"a": TREE["a"]}), "['b']: expected nothing, got int32[2, 2]"),
    "newer format": (lambda d: read_about(about(d, {"format": 2})), "written by a newer autorank-jax: upgrade"),
    "truncated arrays": (
        lambda d: restore_state(damaged(d, "_METADATA", cut_short), TREE), "got a wrong checksum of",
    ),
    "missing arrays": (lambda d: restore_state(damaged(d, "_METADATA", Path.unlink), TREE), "got no "),
    "truncated description": (
        lambda d: restore_state(damaged(d, "about.json", cut_short), TREE), "about.json that does not read; delete",
    ),
    "edited description": (
        lambda d: read_about(
            damaged(d, "about.json", lambda p: p.write_text(p.read_text().replace('"rounds": 5', '"rounds": 6')))
        ),
        "wrong checksum of",
    ),
    "negative step": (lambda d: save_state(d, TREE, step=-1), "expected step >= 0"),
    "keep nothing": (lambda d: save_state(d, TREE, step=0, keep=0), "keep=0"),
    "text in a state": (lambda d: save_state(d, {"name": "x"}, step=0), "expected arrays of numbers to save, got str"),
    "folder that is a file": (lambda d: save_state(written(d, "x"), TREE, step=0), "expected to write a checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_named(name, tmp_path):
    call, message = CASES[name]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as caught:
        call(tmp_path)
    package = Path(autorank_jax.__file__).parent
    assert Path(str(caught.traceback[-1].path)).is_relative_to(package), "raised by the package"
    assert isinstance(caught.value, CheckpointError | ConfigurationError) or len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --config {0}/none.json", "config: expected the file {0}/none.json, got: No such file"),
        ("run --config {0}/text.json", "config: expected JSON in {0}/text.json"),
        ("run --config {0}/odd.json", "probably 'rounds'"),
        ("run --config", "config: expected a path, got none"),
        ("run --resume {0}", "without checkpoints/run.json"),
        ("run --resume {0} --config {0}/odd.json", "expected no --config beside it"),
        ("run --checkpoint-every -1 --rounds 0", "checkpoint-every: expected a whole number of at least 0, got -1"),
        ("run --keep-checkpoints 0", "keep-checkpoints: expected a whole number of at least 1, got 0"),
        (
            "run --drop-out 30",
            "drop-out: expected a number of at least 0 and below 1, got 30.0, probably a percentage",
        ),
        ("run --sampling weighted", "sampling: expected one of uniform, by_size, independent"),
        ("run --straggler-steps 0", "straggler-steps: expected a whole number of at least 1"),
        ("run --clip-norm -1", "clip-norm: expected a number of at least 0"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, tmp_path, capsys):
    written(tmp_path, "no JSON", "text.json")
    written(tmp_path, '{"ruonds": 3}', "odd.json")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(arguments.format(tmp_path).split()) == 2
    said = capsys.readouterr()
    assert message.format(tmp_path) in said.err
    assert all(line.startswith("autorank-jax: ") for line in said.err.splitlines())
    assert said.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_there_are_many():
    assert len(CASES) >= 60
