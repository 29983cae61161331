"""`plan`: the needs of a run, from a model and batches, by their shapes alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from craft_optim._numbers import number, whole
from craft_optim._step.rules import Rules
from craft_optim.anchors.capture import Layer
from craft_optim.anchors.kept import TopK, top_k_of
from craft_optim.anchors.reading import Reading, with_fields
from craft_optim.anchors.structure import flatten, model_inputs
from craft_optim.planning.cache_size import has_pictures, input_bytes
from craft_optim.planning.gpus import blocks_of
from craft_optim.planning.passes import AnchorPass, Loss, task_loss
from craft_optim.planning.phases import Base, Phases, measured
from craft_optim.planning.result import Plan

__all__ = ["adamw", "plan"]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """torch's AdamW with its default step on a GPU, over lists of tensors, which works on a copy of them."""
    return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)


def plan(
    model: nn.Module,
    batch: Any,
    anchors: Any = None,
    *,
    loss: Loss | None = task_loss,
    base: Base = adamw,
    rules: Rules | None = None,
    reading: Reading | None = None,
    layers: Sequence[Layer] = (),
    top_k: TopK = "auto",
    dtype: torch.dtype = torch.float16,
    valid: float = 1.0,
    count: int = 512,
    values: bool = False,
    **fields: Any,
) -> Plan:
    """Plans a run: memory of a step, disk of the cache, operations; from shapes alone, without memory.

    The model's own code runs on tensors without memory, forward and backward of the task and of a pass over anchors; so
    does the base optimizer. Every tensor that torch would make counts until it is freed. Attention counts like torch's
    kernels, which keep no scores. Checkpointed activations, casts of autocast (call it in that context) and a head in
    pieces count as they happen. Not counted: memory inside most operations, and gaps between blocks.
    docs/performance.md has plans beside measured peaks.

    Cost: seconds for small models; a minute or two for one of billions of parameters, whatever the batch.

    Args:
        model: Model with or without weights: `torch.device("meta")` is enough, also for 3 billion parameters. It is not
            changed.
        batch: Batch of the task, with the inputs of `loss`; only shapes and dtypes count.
        anchors: Inputs of a pass over anchors. None: those of `batch`, without `labels`.
        loss: Function `loss(model, batch) -> scalar`. Default: the loss that the model returns. None: the pass over
            anchors instead, on `batch` without `labels`.
        base: Function that makes the base optimizer, such as `lambda parameters: torch.optim.SGD(parameters, lr=0.1)`.
            Default: AdamW, as on a GPU.
        rules: Rules of the run; `trust_region` counts. None: the defaults.
        reading, layers, top_k, dtype, fields: Arguments as for `anchors.build`; frozen modules run here.
        valid: Share of the positions whose classes count, if there is a mask; its values are not read.
        count: Anchors in the cache.
        values: True to run copies with values on the CPU, for models that need them; costs a few steps.

    Raises:
        ValueError: The model needs values, has sharded parameters, gives no loss, or nothing trains.

    Example:
        >>> import torch
        >>> from craft_optim import plan
        >>> with torch.device("meta"):
        ...     model, x = torch.nn.Linear(1000, 1000, bias=False), torch.empty(4, 1000)
        >>> found = plan(model, x, loss=lambda model, x: model(x).square().mean())
        >>> found.phases.gradients, found.phases.state // 1000
        (4000000, 8000)
    """
    rules = Rules() if rules is None else rules
    whole("count", count)
    top_k_of(top_k)
    valid = number("valid", valid, least=0.0, above=True)
    if valid > 1.0:
        raise ValueError(f"`valid` is a share of positions and must be <= 1. Found {valid!r}.")
    inputs = batch
    if isinstance(batch, Mapping):
        inputs = {name: x for name, x in batch.items() if name != "labels" and isinstance(x, Tensor)}
    anchors = inputs if anchors is None else model_inputs(anchors)
    reading = with_fields(Reading() if reading is None else reading, fields, "plan")
    one = AnchorPass(model, reading, tuple(layers), top_k, dtype, valid)
    if loss is None:
        phases = measured(model, inputs, anchors, lambda _, given: one(given), base, one, values=values)
    else:
        phases = measured(model, batch, anchors, loss, base, one, values=values)
    return Plan(
        phases,
        parameters=sum(p.numel() for p in model.parameters()),
        trained=phases.trained_count,
        batch_size=flatten(batch).count,
        anchor_batch_size=flatten(anchors).count,
        count=count,
        per_anchor=input_bytes(anchors) + phases.kept,
        blocks=blocks_of(model),
        rules=rules,
        notes=tuple(_notes(model, loss, reading, phases, valid, pictures=has_pictures(anchors))),
    )


def _notes(
    model: nn.Module, loss: Loss | None, reading: Reading, phases: Phases, valid: float, *, pictures: bool
) -> list[str]:
    notes = []
    if loss is None:
        notes.append("No loss of the task was given: the pass over anchors stands for its pass.")
    if phases.read:
        notes.append(
            f"The plan has no values: where {type(model).__name__} reads one of a tensor ({phases.read} times), it was "
            "taken for 1. Times and sizes may differ if it decides by that how much to compute."
        )
    if reading.mask is not None and valid == 1.0:
        notes.append("Every position counts here: with a mask, passes over anchors and their disk need less (`valid`).")
    if pictures:
        notes.append(
            "Pictures count as bytes on the disk: four times that unless they are bytes that were scaled to 0..1 or "
            "-1..1, or normalised as for ImageNet or CLIP."
        )
    if reading.frozen:
        notes.append("Frozen modules run in the plan: a cache of their outputs is larger, and its passes need less.")
    if not any(on for _, on in phases.passes):
        notes.append(f"It is not known how to turn activation checkpointing on in {type(model).__name__}.")
    return notes
