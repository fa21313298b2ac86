"""The nouns of the package: NamedTuples that flow through jit, and the signatures of the functions that meet them.

Words for axes, used everywhere: `clients, cohort, lanes, classes, criteria, epochs, n` (examples), `d_in, d_out, r`
(rank positions of an adapter, `max_rank` of them).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Key = jax.Array
PyTree = Any


class Adapter(NamedTuple):
    """The low-rank update `ΔW = lora_a @ lora_b` of one layer, 2-D for one client.

    Where layers are stacked, both factors have axes `*layers` in front: a batch of matrices. A k×k convolution has
    `d_in = k·k·c_in`, so that every aggregation rule is written once. `ΔW` is in units of the weight itself: a LoRA
    scale is a matter of local training only (see `autorank_jax.engine.local`).
    """

    lora_a: Array  # (..., d_in, r)
    lora_b: Array  # (..., r, d_out)


class Trainable(NamedTuple):
    """What clients train."""

    adapters: dict[str, Adapter]  # by module path; max_rank may differ by layer
    dense: PyTree  # biases, heads: whatever is trained whole


class Base(NamedTuple):
    """Frozen weights into which products of adapters can be merged."""

    kernels: dict[str, Array]  # by adapter path, (d_in, d_out), (*layers, d_in, d_out) where stacked
    rest: PyTree  # everything else that is frozen


class Server(NamedTuple):
    """The global model. Frozen weights are passed unbatched and never stacked per client."""

    trainable: Trainable
    frozen: PyTree  # a `Base` where rules shall be able to merge into it, else anything


class Origin(NamedTuple):
    """What a task remembers of the model it was made of, for merging and export."""

    merge: Callable[[Server], Any]  # the user's model with the adapters merged in
    kinds: dict[str, str]  # by adapter path: "linear", "conv" or "embed"
    shapes: dict[str, tuple[int, ...]]  # by adapter path, the weight as the layer stores it


class TaskReport(NamedTuple):
    """What became of every parameter of a model; `print` shows it."""

    adapted: dict[str, int]  # by path of the layer, its maximum rank
    dense: tuple[str, ...]  # parameters trained whole
    frozen: tuple[str, ...]  # all others
    unadapted: dict[str, str]  # by path of layers among the frozen ones that hold matrices, why they have no adapter
    sides: dict[str, tuple[int, int]] = {}  # noqa: RUF012  # by path of the adapted layers, (d_in, d_out)
    quantized: dict[str, str] = {}  # noqa: RUF012  # frozen parameters of few bits, adapted or not: their format

    def __str__(self) -> str:
        """Return a line for each layer and parameter."""
        useful = {path: min(self.sides.get(path, (rank,))) for path, rank in self.adapted.items()}
        lines = [
            f"adapted: {path}, maximum rank {rank}"
            + (f" (beyond {useful[path]} nothing is gained)" * (rank > useful[path]))
            for path, rank in self.adapted.items()
        ]
        lines += [f"trained whole: {name}" for name in self.dense] + [f"frozen: {name}" for name in self.frozen]
        lines += [f"frozen as {form}: {name}" for name, form in self.quantized.items()]
        lines += [f"holds matrices but is not adapted: {path}, because {why}" for path, why in self.unadapted.items()]
        return "\n".join(lines)


class Task(NamedTuple):
    """A model as the engine sees it: start values and functions only."""

    server: Server  # the start
    loss: Callable[[PyTree, Trainable, "Batch", Key], Array]  # frozen, trainable, batch, key -> per-example losses (b,)
    predict: Callable[..., Array]  # frozen, trainable, inputs[, key] -> outputs; with a key as in training (dropout)
    origin: Origin | None = None  # None where the task was built by hand
    report: TaskReport | None = None  # likewise
    check: Callable[[PyTree], None] | None = None  # raises ValueError for known inputs that the model does not take


class Batch(NamedTuple):
    """Examples of one client in one step; `weight` is 0 where a short batch is padded."""

    inputs: PyTree  # leaves (b, ...)
    targets: PyTree  # leaves (b, ...)
    weight: Array  # (b,) 0 or 1


class Tokens(NamedTuple):
    """Texts as a decoder takes them: several may lie in one row, one behind the other."""

    ids: Array  # (b, length) int32
    segments: Array  # (b, length) int32: 1, 2, ... for the texts of a row, 0 where padded

    @property
    def shape(self) -> tuple[int, ...]:
        """Return `(b, length)`."""
        return self.ids.shape


class Scored(NamedTuple):
    """What a decoder is given where losses are wanted in place of logits."""

    inputs: PyTree  # ids (b, length), or `Tokens`
    targets: Array  # (b, length) integers, the token that follows; negative: not counted


class Penalised(NamedTuple):
    """What a local loss with a penalty returns: training minimises the mean of `losses` plus `penalty`."""

    losses: Array  # (b,) the task's own, which are what is recorded
    penalty: Array  # ()


class FederatedData(NamedTuple):
    """All clients' examples, flat: nothing is padded to the largest client."""

    inputs: PyTree  # leaves (n, ...); uint8 images stay uint8
    targets: PyTree  # leaves (n, ...)
    order: Array  # (n_used,) int32 example numbers, grouped by client
    start: Array  # (clients,) int32 first position of a client in `order`
    size: Array  # (clients,) int32 examples
    id: Array  # (clients,) int32 identity: random numbers follow it, not the position
    owner: Array | None = None  # (clients,) int32 device that holds the examples; None: every device holds all


class ClientStats(NamedTuple):
    """What a rank policy may look at, one row per client."""

    size: Array  # (clients,) examples; of texts rows, or what else was asked for
    label_counts: Array  # (clients, classes) or (clients, groups)
    epoch_losses: Array | None  # (clients, epochs) mean training loss per local epoch
    epochs: Array | None  # (clients,) how many of those epochs were run; 0 = no curve yet; None = all of them
    extra: Array | None  # (clients, k) the user's own criteria
    max_ratio: Array  # (clients,) cap by device, 1 where none
    where: Array  # (clients,) bool; absent clients count nowhere


@jax.tree_util.register_static
class Names(tuple[str, ...]):
    """Names that are part of a pytree's structure, so that they go through jit beside arrays."""


class RankInfo(NamedTuple):
    """What a rank policy has to say about its ratios. Policies that do not score report zeros of width 0."""

    matrix: Array  # (clients, criteria)
    weights: Array  # (criteria,)
    closeness: Array  # (clients,)
    criteria: Names = Names()  # of the columns


RankPolicy = Callable[[Key, ClientStats], tuple[Array, RankInfo]]  # ratios (clients,) or (clients, layers) in (0, 1]


class Client(NamedTuple):
    """One client as an aggregation rule sees it."""

    row: Array  # () row of the client in `FederatedData`
    masks: dict[str, Array]  # by adapter path, (..., width of the rank level): 1 where the client owns the position
    weight: Array  # () its share in sums; 0 where it counts nowhere
    state: PyTree  # what the client kept from earlier rounds; () where the rule keeps nothing


Hparams = dict[str, Array]


class Trains(NamedTuple):
    """Which parts of the model a rule lets clients train this round. Python bools save the work, arrays do not."""

    lora_a: bool | Array = True
    lora_b: bool | Array = True
    dense: bool | Array = True


class Setting(NamedTuple):
    """What stays the same during the local training of one client."""

    client: Client
    start: Trainable
    frozen: PyTree
    trains: Trains


class LocalState(NamedTuple):
    """What one client changes while it trains."""

    params: Trainable
    optimizer: PyTree


class LocalTraining(NamedTuple):
    """Local training of ONE client, as the engine calls it. Made by `autorank_jax.engine.local.make_local_training`."""

    begin: Callable[[Hparams, Trainable, Client], LocalState]  # from the start that the rule hands out
    step: Callable[[Hparams, Setting, LocalState, Batch, Key], tuple[LocalState, Array]]  # -> (b,) losses
    end: Callable[[LocalState, Client], Trainable]  # what is sent back
    batch_size: int


class ClientUpdate(NamedTuple):
    """What a client sends back: zero beyond its rank, in `trained` as in `start`.

    Its width is that of the client's rank level, so `summand` must not assume `max_rank`; the engine appends the zeros.
    """

    trained: Trainable
    start: Trainable
    client: Client


class Plan(NamedTuple):
    """What is known before anyone trains; `owners` are cut to the width of the client's rank level in `summand`."""

    owners: dict[str, Array]  # by adapter path, (..., max_rank) summed weight of those that own the position
    weight: Array  # () summed weight of all participants
    total: Array  # () summed weight of all clients, present or not
    prepared: PyTree = ()  # what the rule's `prepare` made


Sums = PyTree
AggState = PyTree


class Travels(NamedTuple):
    """What travels one way between server and client, as a share of each factor, averaged over rounds (½: in turn)."""

    lora_a: float = 1.0  # the client's rank positions of it
    lora_b: float = 1.0  # likewise
    dense: float = 1.0
    kernels: bool = False  # what is merged into the adapted base weights, as whole matrices
    stack: bool = False  # where that is less: in place of these matrices all participants' factors
    live: bool = False  # positions at which the server's lora_b is zero are left out


class Traffic(NamedTuple):
    """What a rule sends between the server and a client in a round."""

    up: Travels = Travels()
    down: Travels = Travels()
    kept: tuple[str, ...] = ()  # path patterns of what stays with its client, and travels neither way


def _same_state(state: AggState) -> AggState:
    return state


class ServerStep(NamedTuple):
    """A rule's server step taken apart, so that a server optimiser can come between the mean and its writing back.

    `read` and `mean` return trees of the same structure, unless sums are sketched: then nothing reads, as server
    optimisers refuse. Where nobody reported, `mean` is what `read` gives.
    """

    read: Callable[[Server], PyTree]  # what the rule averages, as the server has it
    mean: Callable[[Sums, AggState, Server], tuple[PyTree, PyTree]]  # the cohort's; bools where anyone reported
    write: Callable[[Key, PyTree, AggState, Server], Server]  # put (optimised) values into the model
    advance: Callable[[AggState], AggState] = _same_state  # the rule's own state, after every round


def _no_client_state(server: Server) -> PyTree:  # noqa: ARG001
    return ()


def _keep_nothing(update: ClientUpdate, server: Server) -> PyTree:  # noqa: ARG001
    return ()


def _same_ranks(ranks: dict[str, Array], clients: PyTree) -> dict[str, Array]:  # noqa: ARG001
    return ranks


def _prepare_nothing(key: Key, state: AggState, server: Server) -> PyTree:  # noqa: ARG001
    return ()


def _report_nothing(sums: Sums, before: Server, after: Server) -> dict[str, Array]:  # noqa: ARG001
    return {}


class Aggregator(NamedTuple):
    """An aggregation rule: a sum over clients, then one server step. The first five fields make a rule.

    The sum form makes lanes, devices and hosts free: any order, any grouping. All fields but `trains` are pure
    functions of arrays; the engine calls those of ONE client under `vmap`, and adds nothing of a client that does not
    count, whatever its summand.

    - `init(server) -> state`: what the rule remembers; `()` where it remembers nothing.
    - `start(server, state, client) -> Trainable`: what a client is handed; the engine cuts it to the client's rank.
    - `trains(state) -> Trains`: which factors clients train this round.
    - `summand(update, server, plan) -> sums`: what ONE client adds, at the width of its rank level, `w_k` times
      something for a weighted mean; any tree of arrays. Denominators are summed too.
    - `update(key, sums, state, server) -> (server, state)`: the server step. Where nobody reported, sums are zero: it
      must then leave the server as it is.
    - `client_init(server) -> kept`: what ONE client keeps before its first round; `()` where clients keep nothing.
    - `client_keep(update, server) -> kept`: what it keeps after a round; the next round finds it in `client.state`.
    - `exact_plan`: whether the summand divides by `plan.owners`; a round is then run again if a client turns out
      non-finite, because the plan counted it.
    - `step`: what `update` consists of, for server optimisers over what is no factor; None where it is not taken apart.
    - `report(sums, before, after) -> {name: array}`: diagnostics of a round.
    - `traffic`: what travels, for costs; by default everything that is trained, both ways.
    - `client_ranks(ranks, clients) -> ranks`: at which clients train, of `State.ranks` and `State.clients`.
    - `prepare(key, state, server) -> prepared`: what all summands of a round share, such as random matrices; made once
      a round with the key of its `update`, and found in `plan.prepared`. A rule with a `step` must do without it too,
      as under a server optimiser, whose values are whole.
    """

    init: Callable[[Server], AggState]
    start: Callable[[Server, AggState, Client], Trainable]
    trains: Callable[[AggState], Trains]
    summand: Callable[[ClientUpdate, Server, Plan], Sums]
    update: Callable[[Key, Sums, AggState, Server], tuple[Server, AggState]]
    client_init: Callable[[Server], PyTree] = _no_client_state
    client_keep: Callable[[ClientUpdate, Server], PyTree] = _keep_nothing
    exact_plan: bool = False
    step: ServerStep | None = None
    report: Callable[[Sums, Server, Server], dict[str, Array]] = _report_nothing
    traffic: Traffic = Traffic()
    client_ranks: Callable[[dict[str, Array], PyTree], dict[str, Array]] = _same_ranks
    prepare: Callable[[Key, AggState, Server], PyTree] = _prepare_nothing


class State(NamedTuple):
    """Everything that a round reads and writes. A pytree of arrays: ranks and hyper-parameters are data."""

    server: Server
    aggregator: AggState
    ranks: dict[str, Array]  # by adapter path, (clients,) int32; (clients, *layers) where those of a stack differ
    round: Array  # () int32 rounds done
    hparams: dict[str, Any]  # scalars, or schedules of the round: "learning_rate", "local_epochs", the user's own
    epoch_losses: Array  # (clients, max_epochs) of each client's latest round
    epochs: Array  # (clients,) int32 epochs recorded there; 0 = never seen
    clients: PyTree  # what clients keep between rounds, leaves (clients, ...); () where the rule keeps nothing


class RoundInfo(NamedTuple):
    """Scalars about one round."""

    loss: Array  # () mean training loss over `examples`, each before the step it was used in; NaN where there are none
    participants: Array  # () int32 clients that were to train
    dropped: Array  # () int32 of them, dropped out and sent nothing
    excluded: Array  # () int32 of them, left out because their update was not finite
    cut_short: Array  # () int32 of them, stopped by their budget of steps before their epochs were over
    steps: Array  # () int32 local steps of clients that were not excluded
    examples: Array  # () float examples in those steps, counted once per epoch
    lane_steps: Array  # () int32 steps that lanes were held for, whether busy, idle or with clients excluded later
    diagnostics: dict[str, Array]  # the rule's own, {} unless asked for


RoundFn = Callable[[Key, State, FederatedData], tuple[State, RoundInfo]]
EvaluateFn = Callable[[State], dict[str, Array]]
