"""The modules of a model that FSDP2 (`fully_shard`) has made its own."""

import sys
from typing import Any

from torch import nn

__all__ = ["fsdp2_around"]


def fsdp2_around(model: nn.Module, module: nn.Module) -> list[Any]:
    """The modules of FSDP2 in the model that have the module in them, or are it, outer ones first.

    Where there are none torch's FSDP2 need not be imported.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kind: Any = getattr(fsdp, "FSDPModule", ())
    return [m for m in model.modules() if isinstance(m, kind) and any(x is module for x in m.modules())]
