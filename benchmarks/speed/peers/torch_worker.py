"""PyTorch, one client after the other: truncated matrices, autograd, `torch.optim.SGD`."""

import sys

import numpy as np
import torch
from common import batches, load, owned_weights, serve, truncated
from torch_network import Values, choose_threads, make_loss, tensors, train_client

workload = load(sys.argv[1])
loss = make_loss(workload)
examples = (torch.from_numpy(workload.inputs), torch.from_numpy(workload.targets))
server = tensors(workload.trainable)
starts = [tensors(truncated(workload, client)) for client in range(workload.clients)]
steps = [[torch.from_numpy(batch) for batch in batches(workload, client)] for client in range(workload.clients)]
owners = tensors(owned_weights(workload))


def run() -> Values:
    """Train everybody and average what each value's owners moved it by."""
    moved = {name: torch.zeros_like(value) for name, value in server.items()}
    for client, start in enumerate(starts):
        trained = train_client(loss, start, examples, steps[client], workload.learning_rate)
        for name, value in trained.items():
            part = tuple(slice(length) for length in value.shape)
            moved[name][part] += float(workload.size[client]) * (value - start[name])
    return {name: server[name] + moved[name] / owners[name].clamp(min=1) for name in server}


def export(values: Values) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in values.items()}


serve(run, export, choose_threads)
