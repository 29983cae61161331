"""GPUs that a run needs, by one simple rule for sharded parameters."""

import math
from dataclasses import dataclass

from torch import nn

__all__ = ["Blocks", "Fit", "blocks_of", "processes", "usable"]

_USABLE = 0.9


@dataclass(frozen=True)
class Blocks:
    """The units that FSDP gathers: each element of the outermost lists of layers, and everything else; bytes.

    Attributes:
        largest: Parameters of the largest element.
        rest: Those in no list, which are there from the first layer to the last.
    """

    largest: int
    rest: int

    @property
    def gathered(self) -> int:
        """What is there at a time: the rest, a block, the one that is fetched meanwhile, and a block's gradients."""
        return self.rest + 3 * self.largest


@dataclass(frozen=True)
class Fit:
    """The GPUs of a size that a run needs.

    Attributes:
        gib: The size, GiB.
        one: True if a single one is enough.
        ddp: True if any number of them does under DDP, whose buckets are another copy of the gradients.
        fsdp: The least number under FSDP2, everything sharded, each with the batch of the plan; None if no number is
            enough, as activations and what is gathered are not sharded.
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
    """Bytes of the parameters that were not seen yet."""
    new = {id(p): p.nbytes for p in module.parameters() if id(p) not in seen}
    seen.update(new)
    return sum(new.values())


def usable(gib: float) -> float:
    """Bytes of a GPU that tensors may take: nine tenths, the rest is its context's, workspaces' and gaps'."""
    return _USABLE * gib * 2.0**30


def processes(sharded: float, own: float, gib: float) -> int | None:
    """The least N with sharded / N + own <= what is usable; None if there is none."""
    room = usable(gib) - own
    return max(1, math.ceil(sharded / room)) if room > 0.0 else None
