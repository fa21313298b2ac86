"""PyTorch with all clients side by side: `torch.func.vmap` of the gradient, padded to the longest client."""

import sys

import numpy as np
import torch
from common import load, masks, owned_weights, padded_batches, serve
from torch.func import grad, vmap
from torch_network import Values, choose_threads, make_loss, tensors

workload = load(sys.argv[1])
x, y = torch.from_numpy(workload.inputs), torch.from_numpy(workload.targets)
batch, weight = (torch.from_numpy(array) for array in padded_batches(workload))
server, owned, owners = tensors(workload.trainable), tensors(masks(workload)), tensors(owned_weights(workload))
dtype = next(iter(server.values())).dtype
size = torch.from_numpy(workload.size).to(dtype)
gradients = vmap(grad(make_loss(workload)))


def run() -> Values:
    """Take every client's next step at once; a padded step has no weight and so no gradient."""
    start = {name: value * owned[name] for name, value in server.items()}
    values = {name: value.clone() for name, value in start.items()}
    for step in range(batch.shape[1]):
        chosen = batch[:, step]
        slopes = gradients(values, x[chosen], y[chosen], weight[:, step])
        for name, slope in slopes.items():
            values[name] -= workload.learning_rate * slope
    return {
        name: server[name] + torch.tensordot(size, values[name] - start[name], 1) / owners[name].clamp(min=1)
        for name in server
    }


def export(values: Values) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in values.items()}


serve(run, export, choose_threads)
