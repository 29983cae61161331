"""Frames after the policy's own preprocessor, kept in memory: a training step costs the model alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .demonstrations import ACTION_KEY, STATE_KEY, Frames


class PreparedFrames:
    """Every frame of a dataset, tokenized once.

    Pictures stay uint8 and become float in [0, 1] when a batch is taken; the policy normalises them itself.

    Args:
        frames: From `load_frames`.
        preprocessor: The policy's preprocessor, from `make_processors`.
        heldout_episodes: So many episodes, the last ones, are kept out of `train_indices`. Best an even
            number: every second demonstration is a disturbed one.

    Attributes:
        train_indices: Rows to train on, int64.
        heldout_indices: Rows to measure on, int64.
        tasks: The instruction of each row.

    Example:
        >>> rows = prepared.train_indices[torch.randint(len(prepared.train_indices), (16,))]  # doctest: +SKIP
        >>> loss, _ = policy(prepared.train_batch(rows))  # doctest: +SKIP
    """

    def __init__(self, frames: Frames, preprocessor: Any, heldout_episodes: int = 4) -> None:
        episodes = torch.unique(frames.episode)
        if not 0 <= heldout_episodes < len(episodes):
            raise ValueError(
                f"`heldout_episodes` must leave something to train on. Found {heldout_episodes} of "
                f"{len(episodes)} episodes. Lower it, or load more episodes."
            )
        renamed = _renamed(preprocessor)
        self.images = {renamed.get(key, key): images for key, images in frames.images.items()}
        self.tasks = frames.tasks
        self.tensors = _preprocess(frames, preprocessor)
        heldout = torch.isin(frames.episode, episodes[len(episodes) - heldout_episodes :])
        self.train_indices = torch.nonzero(~heldout).flatten()
        self.heldout_indices = torch.nonzero(heldout).flatten()

    @classmethod
    def joined(cls, parts: Sequence[PreparedFrames]) -> PreparedFrames:
        """The frames of several datasets, one after another; what each of them holds out stays held out.

        Args:
            parts: At least one; all of the same preprocessor.
        """
        joined = cls.__new__(cls)
        joined.tasks = [task for part in parts for task in part.tasks]
        joined.images = {key: torch.cat([part.images[key] for part in parts]) for key in parts[0].images}
        joined.tensors = {key: torch.cat([part.tensors[key] for part in parts]) for key in parts[0].tensors}
        firsts = [0, *accumulate(len(part) for part in parts)]
        numbered = list(zip(firsts, parts, strict=False))
        joined.train_indices = torch.cat([first + part.train_indices for first, part in numbered])
        joined.heldout_indices = torch.cat([first + part.heldout_indices for first, part in numbered])
        return joined

    def __len__(self) -> int:
        return len(self.tasks)

    def train_batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """The rows `indices` as the policy's `forward` wants them."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        batch = {key: tensor[rows] for key, tensor in self.tensors.items()}
        device = next(iter(batch.values())).device
        for key, images in self.images.items():
            batch[key] = images[rows].to(device).float() / 255.0
        return batch

    def anchor_batches(
        self, rows: Tensor, inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]], batch_size: int = 32
    ) -> Iterator[dict[str, Any]]:
        """The rows as `anchors.build` takes them; their instructions are the categories.

        Args:
            rows: Which.
            inputs: A batch -> what of it is stored.
            batch_size: Rows of a batch.
        """
        for part in torch.split(rows, batch_size):
            yield {**inputs(self.train_batch(part)), "category": [self.tasks[row] for row in part.tolist()]}

    @torch.no_grad()
    def heldout_loss(self, policy: Any, batch_size: int = 64, max_frames: int | None = 512) -> float:
        """The policy's loss on held-out frames, of pi0_fast per action token; the policy's mode is left as it was.

        Args:
            policy: The policy.
            batch_size: Frames per forward pass.
            max_frames: At most so many frames, evenly spread; all when `None`.
        """
        if len(self.heldout_indices) == 0:
            raise ValueError("There are no held-out frames: `heldout_episodes` was 0. Set it to 1 or more.")
        rows = self.heldout_indices
        if max_frames is not None and len(rows) > max_frames:
            rows = rows[torch.linspace(0, len(rows) - 1, max_frames).round().long()]
        was_training = policy.training
        policy.eval()
        total = tokens = 0.0
        for part in torch.split(rows, batch_size):
            batch = self.train_batch(part)
            loss, _ = policy.forward(batch)
            weight = float(batch["action.token_mask"][:, 1:].sum()) if "action.token_mask" in batch else len(part)
            total, tokens = total + float(loss) * weight, tokens + weight
        policy.train(was_training)
        return total / tokens


def _renamed(preprocessor: Any) -> dict[str, str]:
    """Dataset key -> policy key, as the preprocessor would rename the pictures, had it seen them."""
    names: dict[str, str] = {}
    for step in preprocessor.steps:
        names.update(getattr(step, "rename_map", None) or {})
    return names


def _preprocess(frames: Frames, preprocessor: Any, slice_size: int = 256) -> dict[str, Tensor]:
    """Runs the preprocessor over everything but the pictures, whose values it would only pass on."""
    parts: list[dict[str, Tensor]] = []
    for start in tqdm(range(0, len(frames), slice_size), desc="tokenizing", leave=False):
        rows = slice(start, min(start + slice_size, len(frames)))
        output = preprocessor(
            {
                STATE_KEY: frames.state[rows],
                ACTION_KEY: frames.actions[rows],
                f"{ACTION_KEY}_is_pad": frames.action_is_pad[rows],
                "task": frames.tasks[rows],
            }
        )
        parts.append({key: value for key, value in output.items() if isinstance(value, Tensor)})
    # Scalars and per-batch bookkeeping have no row per frame, and are of no use to the model.
    keys = [key for key, value in parts[0].items() if value.ndim > 0 and len(value) == min(slice_size, len(frames))]
    return {key: torch.cat([part[key] for part in parts]) for key in keys}
