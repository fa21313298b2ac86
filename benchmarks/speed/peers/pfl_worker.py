"""pfl: its simulated backend, its PyTorch model and its SGD, with element-weighted statistics for RBLA.

The model has one shape for everybody, so clients train matrices padded with zeros.
"""

import dataclasses
import sys

import numpy as np
import torch
from common import load, masks, seen, serve
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.bridge import FrameworkBridgeFactory
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.stats import ElementWeightedMappedVectorStatistics
from torch_network import Values, choose_threads, make_loss, tensors

workload = load(sys.argv[1])
loss = make_loss(workload)
server = tensors(workload.trainable)
owned = tensors(masks(workload))


class Network(torch.nn.Module):
    """The values of the workload as parameters, and the loss that pfl asks for."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in server.items():
            self.register_parameter(name, torch.nn.Parameter(value.clone()))

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch."""
        return loss(dict(self.named_parameters()), x, y)

    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> Metrics:
        """Refuse: nothing is evaluated here."""
        raise NotImplementedError


class OwnedStatistics(ElementWeightedMappedVectorStatistics):
    """Element-weighted statistics; pfl 0.6.0's backend also asks them for one weight, for its metrics."""

    @property
    def weight(self) -> float:
        """Return what the metrics count this client as."""
        return 1.0


class RBLA(FederatedAveraging):
    """FedAvg with ranks: a client starts from its own rank positions and reports those alone.

    pfl evaluates in its first iteration whatever the frequency; that is left out.
    """

    def get_next_central_contexts(self, *args):
        """Ask for training alone."""
        contexts, model, metrics = super().get_next_central_contexts(*args)
        if contexts:
            contexts = tuple(dataclasses.replace(context, do_evaluation=False) for context in contexts)
        return contexts, model, metrics

    def train_one_user(self, initial_model_state, model, user_dataset, central_context):
        """Train from the client's own rank positions; return the differences, weighted by its examples."""
        client = int(user_dataset.user_id)
        mask = {name: value[client] for name, value in owned.items()}
        with torch.no_grad():
            for name, value in model.variable_map.items():
                value.mul_(mask[name])
        FrameworkBridgeFactory.sgd_bridge().do_sgd(model, user_dataset, central_context.model_train_params)
        size = float(workload.size[client])
        moved, weights = {}, {}
        for name, value in model.variable_map.items():
            weights[name] = (size * mask[name]).expand_as(value).clone()
            moved[name] = weights[name] * (value.detach() - initial_model_state[name])
        return OwnedStatistics(moved, weights), Metrics()


def dataset_of(client: int) -> Dataset:
    """Make a client's dataset in the order of its only epoch; pfl would shuffle nothing either."""
    chosen = seen(workload, client).reshape(-1)
    raw = [torch.from_numpy(array[chosen]) for array in (workload.inputs, workload.targets)]
    return Dataset(raw, user_id=str(client))


if len(workload.order) != 1:
    raise SystemExit("pfl iterates every epoch in the same order: expected a workload of one local epoch")
datasets = [dataset_of(client) for client in range(workload.clients)]
queue = iter(())


def next_user() -> int:
    """Sample users one after the other, each once."""
    return next(queue)


backend = SimulatedBackend(training_data=FederatedDataset(datasets.__getitem__, next_user), val_data=None)
train_params = NNTrainHyperParams(
    local_batch_size=workload.batch_size, local_num_epochs=1, local_learning_rate=workload.learning_rate
)
algorithm_params = NNAlgorithmParams(
    central_num_iterations=1, evaluation_frequency=2, train_cohort_size=workload.clients, val_cohort_size=None
)


network = Network()
model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))


def run() -> Values:
    """Run one central iteration from the start values."""
    global queue  # noqa: PLW0603
    queue = iter(range(workload.clients))
    model.set_parameters(server)
    RBLA().run(algorithm_params, backend, model, train_params)
    return {name: value.detach() for name, value in model.variable_map.items()}


def export(values: Values) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in values.items()}


serve(run, export, choose_threads)
