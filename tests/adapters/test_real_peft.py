"""The real `peft` and `transformers` as oracles: adapters load there, and a BERT encoder gives the same embeddings."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.adapters.task import merge
from autorank_jax.models.bert import bert_name, load_bert
from autorank_jax.models.transformer import mean_pool
from tests.adapters.test_peft import SMALL, Mixed, bert_names, bert_task, export, trained

pytestmark = pytest.mark.filterwarnings("ignore")
reason = "peft, transformers and torch are not installed: pip install 'autorank-jax[peft]'"
torch = pytest.importorskip("torch", reason=reason)
peft = pytest.importorskip("peft", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)


def torch_bert():
    """Make a small BertModel with weights of its own."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=SMALL.width,
        num_hidden_layers=SMALL.depth,
        num_attention_heads=SMALL.heads,
        intermediate_size=SMALL.hidden,
        max_position_embeddings=SMALL.length,
        initializer_range=0.5,
    )
    return transformers.BertModel(config).eval()


IDS, MASK = np.arange(12).reshape(2, 6) % 20, np.array([[1] * 6, [1, 1, 1, 1, 0, 0]])
TEXTS = {"ids": jnp.asarray(IDS, jnp.int32), "mask": jnp.asarray(MASK)}


def torch_outputs(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK)).last_hidden_state.numpy()


def test_loaded_encoder_gives_the_outputs_of_transformers(tmp_path):
    base = torch_bert()
    base.save_pretrained(tmp_path, safe_serialization=True)
    encoder = load_bert(tmp_path)
    theirs = torch_outputs(base)
    np.testing.assert_allclose(encoder(TEXTS)[MASK == 1], theirs[MASK == 1], atol=1e-4)
    pooled = (theirs * MASK[..., None]).sum(1) / MASK.sum(1, keepdims=True)
    np.testing.assert_allclose(mean_pool(encoder(TEXTS), TEXTS["mask"]), pooled, atol=1e-4)


def test_peft_gives_the_same_outputs(tmp_path):
    task = bert_task()
    server = trained(task)
    base = torch_bert()
    base.load_state_dict(torch_weights(merge(task, task.server).encoder), strict=False)
    folder = export(tmp_path, task, server, names=bert_names)
    adapted = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    theirs = torch_outputs(adapted)
    model = merge(task, server)
    model.eval()
    np.testing.assert_allclose(model.encoder(TEXTS)[MASK == 1], theirs[MASK == 1], atol=1e-4)


def torch_weights(encoder):
    """Return the weights of an encoder under BertModel's names."""
    tensors = {}
    for path, value in nnx.to_flat_state(nnx.state(encoder, nnx.Param)):
        *layer, leaf = map(str, path)
        array = np.asarray(value.get_value())
        tensors[f"{bert_name('/'.join(layer))}.{'bias' if leaf == 'bias' else 'weight'}"] = torch.tensor(
            array.T if leaf == "kernel" else array
        )
    return tensors


def test_peft_gives_the_same_outputs_for_convolutions_and_embeddings(tmp_path):
    class Torch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv = torch.nn.Embedding(7, 4), torch.nn.Conv1d(4, 6, 3, padding=1)
            self.head = torch.nn.Linear(6, 3)

        def forward(self, ids):
            return self.head(torch.relu(self.conv(self.embed(ids).transpose(1, 2))).mean(2))

    task = task_from_nnx(Mixed(nnx.Rngs(0)), max_rank={"embed": 2, "conv": 3, "head": 4})
    server, base = trained(task), Torch()
    start = merge(task, task.server)
    base.load_state_dict(
        {
            "embed.weight": torch.tensor(np.asarray(start.embed.embedding[...])),
            "conv.weight": torch.tensor(np.asarray(start.conv.kernel[...]).transpose(2, 1, 0).copy()),
            "conv.bias": torch.tensor(np.asarray(start.conv.bias[...])),
            "head.weight": torch.tensor(np.asarray(start.head.kernel[...]).T.copy()),
            "head.bias": torch.tensor(np.asarray(start.head.bias[...])),
        }
    )
    adapted = peft.PeftModel.from_pretrained(base, str(export(tmp_path, task, server))).eval()
    ids = np.arange(10).reshape(2, 5) % 7
    with torch.no_grad():
        theirs = adapted(torch.tensor(ids)).numpy()
    np.testing.assert_allclose(merge(task, server)(jnp.asarray(ids)), theirs, atol=1e-4)
