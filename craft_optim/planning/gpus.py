"""GPUs that a run needs, by a simple rule for sharded parameters."""

import math
from dataclasses import dataclass

from torch import nn

__all__ = ["Blocks", "Fit", "blocks_of", "processes", "usable"]

_USABLE = 0.9


@dataclass(frozen=True)
class Blocks:
    """Units that FSDP gathers: each element of the outermost lists of layers, and everything else; bytes.

    Attributes:
        largest: Parameters of the largest element.
        rest: Parameters in no list, gathered from the first layer to the last.
    """

    largest: int
    rest: int

    @property
    def gathered(self) -> int:
        """Bytes gathered at a time: the rest, a block, the next block, and a block's gradients."""
        return self.rest + 3 * self.largest


@dataclass(frozen=True)
class Fit:
    """Number of GPUs of one size that a run needs.

    Attributes:
        gib: Size of the GPUs, GiB.
        one: True if one GPU is enough.
        ddp: True if any number is enough under DDP, whose buckets are another copy of the gradients.
        fsdp: Least number under FSDP2 with everything sharded, each with the plan's batch; None if no number is enough,
            as activations and gathered parameters are not sharded.
    """

    gib: float
    one: bool
    ddp: bool
    fsdp: int | None


def blocks_of(model: nn.Module) -> Blocks:
    """The blocks of a model."""
    seen: set[int] = set()
    sizes = [0]

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                sizes.extend(_bytes(block, seen) for block in child)
            else:
                walk(child)

    walk(model)
    return Blocks(max(sizes), _bytes(model, seen))


def _bytes(module: nn.Module, seen: set[int]) -> int:
    """Bytes of the parameters not seen yet."""
    new = {id(p): p.nbytes for p in module.parameters() if id(p) not in seen}
    seen.update(new)
    return sum(new.values())


def usable(gib: float) -> float:
    """Bytes of a GPU for tensors: nine tenths; context, workspaces and gaps take the rest."""
    return _USABLE * gib * 2.0**30


def processes(sharded: float, own: float, gib: float) -> int | None:
    """The least N with sharded / N + own <= usable bytes; None if there is none."""
    room = usable(gib) - own
    return max(1, math.ceil(sharded / room)) if room > 0.0 else None
