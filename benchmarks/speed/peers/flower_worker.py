"""Flower: a `ServerApp` and a `ClientApp` under the simulation runtime, one Ray actor per core, PyTorch clients.

The server app stays in its main function for the whole benchmark and sends one round of messages per command.
"""

import os
import sys
import time

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "PEER_WORKLOAD": sys.argv[1]}

import torch
from common import CORES, owned_weights, serve, truncated
from flower_app import client_app, workload
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from torch_network import Values, tensors

server_app = ServerApp()
server = tensors(workload().trainable)
owners = tensors(owned_weights(workload()))
starts = [tensors(truncated(workload(), client)) for client in range(workload().clients)]


def message_to(node: int, client: int) -> Message:
    """Write the message that trains one client from the server's values, cut to its rank."""
    content = RecordDict({"values": ArrayRecord(starts[client]), "config": ConfigRecord({"client": client})})
    return Message(content=content, message_type="train", dst_node_id=node)


def federated_round(grid: Grid) -> Values:
    """Train everybody, then average what each value's owners moved it by."""
    nodes = sorted(grid.get_node_ids())
    replies = grid.send_and_receive([message_to(node, client) for client, node in enumerate(nodes)])
    moved = {name: torch.zeros_like(value) for name, value in server.items()}
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"a client failed: {reply.error.reason}")
        client = reply.content["config"]["client"]
        for name, value in reply.content["values"].to_torch_state_dict().items():
            part = tuple(slice(length) for length in value.shape)
            moved[name][part] += float(workload().size[client]) * (value - starts[client][name])
    return {name: server[name] + moved[name] / owners[name].clamp(min=1) for name in server}


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for all nodes to register, then answer commands."""
    del context
    while len(list(grid.get_node_ids())) < len(starts):
        time.sleep(0.1)
    serve(lambda: federated_round(grid), lambda values: {name: value.numpy() for name, value in values.items()})


if __name__ == "__main__":
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": CORES}}
    run_simulation(server_app, client_app, num_supernodes=len(starts), backend_config=resources)
