"""What the ranks run: retention passes of a model with a large vocabulary, whose head FSDP2 spreads over them."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from craft_optim import CraftOptimizer, anchors
from craft_optim.anchors import AnchorCache, LogitRetention, OnlineRetention, TokenRetention
from craft_optim.anchors.valid_head import linear_head

CLASSES, WIDTH, LENGTH, ANCHORS = 40_000, 8, 20, 24
PIECE = 104  # positions
SILENT = 7  # begins anchors that do not count under `mask="some"`


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.mix(self.norm(x)).relu()


class Net(nn.Module):
    """As a language model of transformers, but for attention."""

    def __init__(self, tied, cap=None):
        super().__init__()
        self.config = SimpleNamespace(final_logit_softcapping=cap)
        self.embedding, self.block, self.norm = nn.Embedding(CLASSES, WIDTH), Block(), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        nn.init.normal_(self.head.weight, std=1.5)  # some classes are likely

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        logits, cap = self.head(self.norm(self.hidden(ids))), self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def hidden(self, ids):
        return self.block(self.embedding(ids))


class Adapted(Net):
    """Trains a layer that can be switched off, as PEFT's can."""

    def __init__(self, tied):
        super().__init__(tied)
        self.requires_grad_(False)
        self.adapter, self.on = nn.Linear(WIDTH, WIDTH), True

    @contextmanager
    def disable_adapter(self):
        self.on = False
        self.adapter.requires_grad_(False)
        try:
            yield
        finally:
            self.on = True

    def hidden(self, ids):
        x = super().hidden(ids)
        return x + self.adapter(x) if self.on else x


def network(tied=False, moved=False, kind=Net):
    """The teacher, or a model that has moved away from it."""
    torch.manual_seed(5)
    model = kind(tied)
    if moved:
        with torch.no_grad():
            for p in model.parameters():
                p += 0.3 * torch.randn_like(p)
    return model


def examples():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, CLASSES, (ANCHORS, LENGTH), generator=generator)
    ids[::2, 0] = SILENT
    return ids


def continued(model, ids):
    """As if the model had generated the second half."""
    return ids, torch.where(torch.arange(LENGTH) < LENGTH // 2, -100, model(ids).argmax(-1).roll(1, 1))


def _of_parts(*parts, root=True, **options):
    def spread(model):
        for part in parts:
            modules = [model.get_submodule(name) for name in part.split()]
            fully_shard(modules[0] if len(modules) == 1 else modules, **options)
        return fully_shard(model, **options) if root else model

    return spread


def _tensor_parallel(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
    return model


def _replicas(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


WAYS = {
    "plain": lambda model: model,
    "root": _of_parts(),
    "root that shares out": _of_parts(reshard_after_forward=True),
    "layers and root": _of_parts("block"),
    "layers and root that shares out": _of_parts("block", reshard_after_forward=True),
    "head and root": _of_parts("block", "head"),
    "norm with head, and root": _of_parts("block", "norm head"),
    "head alone": _of_parts("head", root=False),
    "bfloat16": _of_parts("head", mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
    "bfloat16, float32 outside": _of_parts(
        mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    ),
    "replicas": _replicas,
    "tensor parallel": _tensor_parallel,
}


class Largest(TorchDispatchMode):
    """The largest tensor of floating numbers that an operation returns, in elements."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.found = max(self.found, x.numel())
        return out


@contextmanager
def _listening():
    """What the log says about logits within the block."""
    said, handler, log = [], logging.Handler(), logging.getLogger("craft_optim")
    handler.emit = lambda record: said.append(record.getMessage())
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield said
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def mean_of(x):
    dist.all_reduce(x := x.clone())
    return x / dist.get_world_size()


def _closure(kind, model, cache, way, tied, **settings):
    if kind in ("module", "adapters"):
        teacher = WAYS[way](network(tied).requires_grad_(False)) if kind == "module" else None
        return OnlineRetention(model, [*examples()], teacher=teacher, **settings)
    made = {"logits": LogitRetention, "tokens": TokenRetention}[kind]
    return made(model, AnchorCache.open(cache), workers=0, **settings)


def gradients_of(model):
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            apart = isinstance(p, DTensor) or dist.get_world_size() == 1
            found[name] = whole.clone() if apart else mean_of(whole)
    return found


def passes(cache, way, kind="logits", tied=False, frozen=False, mask=None, whole=False):
    """The second pass and, again, its loss without gradients; whether it was in pieces, and its largest tensor."""
    rank, size = (0, 1) if way == "tensor parallel" else (dist.get_rank(), dist.get_world_size())
    model = network(tied, moved=True, kind=Adapted if kind == "adapters" else Net)
    model.head.requires_grad_(not frozen and kind != "adapters")
    model = WAYS[way](model)
    settings = {"batch_size": ANCHORS // size, "strict": False}
    if mask == "some":  # on the first rank alone
        settings["mask"] = lambda ids: (ids[:, :1] != SILENT).expand(ids.shape) & (rank == 0)
    retention = _closure(kind, model, cache, way, tied, **settings)
    retention.shard(rank, size, mean_of if size > 1 else None)
    spread = [isinstance(p, DTensor) for p in model.parameters()]
    with _listening() as said:
        for number in range(2):
            retention.loss(number).backward()  # finds out
    assert spread == [isinstance(p, DTensor) for p in model.parameters()], "all is shared out again"
    model.zero_grad()
    if whole and isinstance(retention, OnlineRetention):
        retention._heads = dict.fromkeys(retention._heads)
    elif whole:
        retention._run._linear = None
    largest = Largest()
    with largest:
        loss = retention.loss(1)
        loss.backward()
    gradients = gradients_of(model)
    with torch.no_grad():
        again = retention.loss(1)
    assert torch.equal(again, loss.detach())
    drift = retention.drift(count=4, batch_size=4) if mask is None else 0.0
    return {
        "loss": float(mean_of(loss.detach())),
        "gradients": gradients,
        "largest": largest.found,
        "said": said,
        "drift": drift,
    }


def train(cache, way):
    """Whole parameters after some steps, and metrics."""
    model = WAYS[way](network(moved=True))
    batch_size = ANCHORS // dist.get_world_size()
    retention = LogitRetention(model, AnchorCache.open(cache), batch_size, strict=False, workers=0)
    return trained(model, retention, examples())


def trained(model, retention, ids_of_all):
    """Whole parameters after some steps of a language model, and metrics."""
    rank, size = dist.get_rank(), dist.get_world_size()
    optimizer = CraftOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), retention, epsilon=0.1)
    for step in range(4):
        ids = ids_of_all[step::4].chunk(size)[rank]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().clone() for p in whole], dict(optimizer.metrics)


def build(path):
    """Makes a cache with a teacher that is spread over the processes; what the log says of its logits."""
    model = WAYS["norm with head, and root"](network())
    with _listening() as said:
        anchors.build(model, examples().split(6), path, top_k=8, progress=False, class_dim=-1)
    return [line for line in said if "as a whole" in line]


def forms_found():
    """Whether the form of a head's logits is known; of zeros, on the first rank, the cap does not show."""
    torch.manual_seed(5)
    model = Net(tied=True, cap=2.0)
    with torch.no_grad():
        model.embedding.weight[SILENT] = model.block.mix.bias[:] = 0.0
    ids = torch.full((1, LENGTH), SILENT) if dist.get_rank() == 0 else examples()[1:2]
    return linear_head(model, ids) is not None, linear_head(WAYS["root"](model), ids) is not None
