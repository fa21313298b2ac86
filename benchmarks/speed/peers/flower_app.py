"""Flower's client app, in a module of its own so that Ray's actors can import it."""

import functools
import os
from collections.abc import Callable

import torch
from common import Workload, batches, load
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch_network import make_loss, train_client

client_app = ClientApp()


@functools.cache
def workload() -> Workload:
    """Read the workload, once per process."""
    return load(os.environ["PEER_WORKLOAD"])


@functools.cache
def trainer() -> tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return the loss and the examples, made once per actor, which has one core."""
    torch.set_num_threads(1)
    return make_loss(workload()), (torch.from_numpy(workload().inputs), torch.from_numpy(workload().targets))


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the client that the message names, from the adapters it brings."""
    del context
    loss, examples = trainer()
    client = message.content["config"]["client"]
    start = message.content["values"].to_torch_state_dict()
    steps = [torch.from_numpy(batch) for batch in batches(workload(), client)]
    trained = train_client(loss, start, examples, steps, workload().learning_rate)
    content = RecordDict({"values": ArrayRecord(trained), "config": ConfigRecord({"client": client})})
    return Message(content=content, reply_to=message)
