"""What the ranks run to compare a `Snapshot` with a copy of the model as the teacher."""

import torch
from cases import ANCHORS, BASES, PARALLEL, full, network, samples
from torch.nn.functional import cross_entropy

from craft_optim import CraftOptimizer
from craft_optim.anchors import OnlineRetention, Reading
from craft_optim.anchors.teachers import Snapshot


def run(parallel, teacher, steps=4):
    """Weights and drifts of a run that evaluates the model, which leaves FSDP2's root gathered, wherever it can."""
    wrapped, rank, world_size = PARALLEL[parallel](network())
    anchors = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))

    def evaluate():
        with torch.no_grad():
            return wrapped(anchors).sum().item()

    base = BASES["adamw"](wrapped.parameters())
    evaluate()
    beside = Snapshot(wrapped) if teacher == "snapshot" else network()
    retention = OnlineRetention(wrapped, anchors, ANCHORS // world_size, teacher=beside, reading=Reading(class_dim=-1))
    # At the snapshot drift and its gradient are rounding: "pi" would make a share of the step of it, the trust region
    # takes its root
    optimizer = CraftOptimizer(base, retention, epsilon=0.01, dual="ascent", trust_region=None)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        x, y = (t.chunk(world_size)[rank] for t in samples(step))
        cross_entropy(wrapped(x), y).backward()
        if step > 0:
            evaluate()
        optimizer.step()
        seen += [optimizer.metrics["retention_loss"], evaluate(), retention.drift(), evaluate()]
    return full(wrapped), seen


def refused():
    """FSDP1, around the model or within it."""
    wrapped, _, _ = PARALLEL["fsdp1"](network())
    try:
        Snapshot(wrapped)
    except TypeError as error:
        return str(error)


def sharded_later():
    model = network()
    snapshot = Snapshot(model)
    PARALLEL["fsdp2"](model)
    try:
        with snapshot():
            return None
    except ValueError as error:
        return str(error)
