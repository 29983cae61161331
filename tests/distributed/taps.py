"""What the ranks run: retention passes on hidden states of a model that FSDP2 spreads over them, in one way or another.

The loss does not reach what the model returns, where FSDP2 has a backward begin.
"""

import torch
import torch.distributed as dist
from heads import gradients_of, mean_of, trained
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from craft_optim.anchors import AnchorCache, CombinedRetention, HiddenRetention, LogitRetention

CLASSES, WIDTH, LENGTH, ANCHORS = 40, 8, 6, 16
CACHED = [0, 1, 2, -1, "decoder.layers.1.mix", "decoder.layers.2", "decoder.layers.2.mix"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.mix, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.out(self.mix(self.input_layernorm(x)).relu())


class Decoder(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(CLASSES, WIDTH), nn.LayerNorm(WIDTH)
        self.layers, self.checkpointed = nn.ModuleList(Block() for _ in range(4)), checkpointed

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.norm(x)


class Net(nn.Module):
    """As a language model of transformers, but for attention."""

    def __init__(self, tied=False, frozen=False, checkpointed=False, silent=False):
        super().__init__()
        torch.manual_seed(5)
        self.decoder, self.head = Decoder(checkpointed), nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.requires_grad_(not frozen)
        if tied:
            self.head.weight = self.decoder.embedding.weight
        self.silent = silent

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        logits = self.head(self.decoder(ids))
        return logits.argmax(-1) if self.silent else logits


def examples():
    return torch.randint(CLASSES, (ANCHORS, LENGTH), generator=torch.Generator().manual_seed(1))


def moved(**options):
    """A model that has moved away from its teacher."""
    model = Net(**options)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


LAYERS = [f"decoder.layers.{i}" for i in range(4)]
# Of each way the modules, or groups of them, that are given to `fully_shard`, inner ones first; "" is the model
WAYS = {
    "plain": [],
    "root": [""],
    "layers and root": [*LAYERS, ""],
    "later layers and root": [*LAYERS[2:], ""],
    "earlier layers and root": [*LAYERS[:2], ""],
    "head and root": ["head", ""],
    "decoder and root": ["decoder", ""],
    "every part": ["decoder.embedding", *LAYERS, "decoder.norm head", ""],
    "pairs of layers": [" ".join(LAYERS[:2]), " ".join(LAYERS[2:]), "decoder.norm head", ""],
    "decoder alone": ["decoder"],
}


def spread(model, way, **options):
    for part in WAYS[way]:
        modules = [model.get_submodule(name) for name in part.split()] or [model]
        fully_shard(modules[0] if len(modules) == 1 else modules, **options)
    return model


def _closure(model, cache, layers, kind, **settings):
    cache = AnchorCache.open(cache)
    hidden = HiddenRetention(model, cache, layers=layers, **settings)
    if kind == "hidden":
        return hidden
    if kind == "two passes":
        return CombinedRetention(
            {"one": hidden, "two": HiddenRetention(model, cache, layers=layers, seed=1, **settings)}
        )
    return CombinedRetention({"logits": LogitRetention(model, cache, **settings), "hidden": hidden})


def passes(cache, way, layers, kind="hidden", options=None, **model_options):
    """The second pass: its loss, its gradients, and how often the head's backward ran."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = spread(moved(**model_options), way, **(options or {}))
    retention = _closure(model, cache, layers, kind, batch_size=ANCHORS // size, strict=False, workers=0)
    retention.shard(rank, size, mean_of if size > 1 else None)
    parts = [isinstance(p, DTensor) for p in model.parameters()]
    retention.loss(0).backward()
    model.zero_grad()
    of_head = []
    model.head.register_forward_hook(lambda _, args, out: out.register_hook(of_head.append) and None)
    loss = retention.loss(1)
    loss.backward()
    assert parts == [isinstance(p, DTensor) for p in model.parameters()], "all is shared out again"
    return {"loss": float(mean_of(loss.detach())), "gradients": gradients_of(model), "head": len(of_head)}


def train(cache, way, layers, options=None):
    """Whole parameters after some steps, and metrics."""
    batch_size = ANCHORS // dist.get_world_size()
    model = spread(moved(), way, **(options or {}))
    retention = _closure(model, cache, layers, "hidden", batch_size=batch_size, strict=False, workers=0)
    return trained(model, retention, examples())
