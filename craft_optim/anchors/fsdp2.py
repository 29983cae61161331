"""Modules of a model that FSDP2 (`fully_shard`) has taken over."""

import sys
from typing import Any

from torch import nn

__all__ = ["fsdp2_around"]


def fsdp2_around(model: nn.Module, module: nn.Module) -> list[Any]:
    """FSDP2's modules in the model that contain the module, or are it, outer ones first.

    Without any, torch's FSDP2 is not imported.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kind: Any = getattr(fsdp, "FSDPModule", ())
    return [m for m in model.modules() if isinstance(m, kind) and any(x is module for x in m.modules())]
