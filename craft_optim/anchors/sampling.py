"""Sampling of anchors: shuffled, endless, resumable, split over ranks. A pure function of the pass' number."""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from craft_optim._numbers import whole

__all__ = ["AnchorSampler", "mixed_seed", "spread"]


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several integers, the same on every platform; neighbouring parts give unrelated seeds."""
    text = ":".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def spread(total: int, count: int) -> list[int]:
    """`count` numbers in [0, total), evenly spaced, the same at every call; all if there are no more."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


@lru_cache(maxsize=4)  # a batch needs one epoch's permutation, at most a few where it straddles epochs
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))


class AnchorSampler:
    """An endless shuffled sequence of anchors without state to save.

    The anchors' permutations of epoch 0, 1, 2, ... form one endless stream; batch number `position` is its next
    `batch_size * world_size` elements; every rank takes its own `batch_size`. So every epoch holds every anchor exactly
    once, nothing is dropped, and the ranks together draw the batch that one process would draw. A batch that straddles
    two epochs may hold an anchor twice, once from each.

    Args:
        n: Number of anchors.
        batch_size: Anchors per batch and rank.
        seed: Seed of the permutations.
        rank: This process' place in [0, world_size).
        world_size: Number of processes that draw together.

    Raises:
        ValueError: A number is out of range, or there are fewer anchors than all ranks' batches take together.
    """

    def __init__(self, n: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        batch_size, seed = whole("batch_size", batch_size), whole("seed", seed, least=None)
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be in [0, world_size). Found rank={rank}, world_size={world_size}.")
        if n < batch_size * world_size:
            raise ValueError(
                "`batch_size` times `world_size` must not exceed the number of anchors. Found "
                f"batch_size={batch_size}, world_size={world_size} and {n} anchors: use batch_size <= "
                f"{n // world_size}, or build more anchors."
            )
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def indices(self, position: int) -> Tensor:
        """The anchors of batch number `position` (>= 0), an int64 tensor `[batch_size]`. Costs O(n) once per epoch."""
        if position < 0:
            raise ValueError(f"`position` must be >= 0. Found position={position}.")
        start = (position * self.world_size + self.rank) * self.batch_size
        parts, wanted = [], self.batch_size
        while wanted:
            epoch, offset = divmod(start, self.n)
            part = _permutation(self.n, self.seed, epoch)[offset : offset + wanted]
            parts.append(part)
            start, wanted = start + len(part), wanted - len(part)
        return torch.cat(parts)
