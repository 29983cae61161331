"""Actions of robot policies on anchors, and the distance of two policies."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from craft_optim.anchors import AnchorCache
from craft_optim.anchors.passes import autocast_to, device_of, isolated_rng, to_device
from craft_optim.anchors.progress import anchor_bar
from craft_optim.anchors.sampling import mixed_seed

__all__ = ["ActionDrift", "action_drift", "predicted_actions"]


@dataclass(frozen=True)
class ActionDrift:
    """Distance of actions, in the policies' own normalised units.

    Attributes:
        mean_abs: Mean of |student - teacher| over anchors, steps of the chunk and dimensions of the action.
        rms: Root mean square of student - teacher over the same.
        each: `mean_abs` of each anchor, in order.
        mean_abs_per_dimension: `mean_abs` of each dimension of the action.
        rms_per_dimension: `rms` of each dimension of the action.
    """

    mean_abs: float
    rms: float
    each: list[float]
    mean_abs_per_dimension: list[float]
    rms_per_dimension: list[float]


def action_drift(teacher: Tensor, student: Tensor) -> ActionDrift:
    """Distance of the student's actions from the teacher's.

    Args:
        teacher: Actions `[anchors, steps, dimensions]`, as `student`.

    Raises:
        ValueError: The shapes differ, or do not have three dimensions.

    Example:
        >>> apart = action_drift(torch.zeros(2, 1, 2), torch.tensor([[[0.0, 3.0]], [[0.0, 1.0]]]))
        >>> apart.mean_abs, apart.each, apart.mean_abs_per_dimension
        (1.0, [1.5, 0.5], [0.0, 2.0])
    """
    if teacher.ndim != 3 or not teacher.numel() or student.shape != teacher.shape:
        raise ValueError(
            "`teacher` and `student` must have the same shape, [anchors, steps, dimensions]. Found "
            f"{tuple(teacher.shape)} and {tuple(student.shape)}: policies of other chunk sizes or actions cannot be "
            "compared."
        )
    apart = (student.double() - teacher.double()).abs()
    return ActionDrift(
        float(apart.mean()),
        float(apart.square().mean().sqrt()),
        apart.mean((1, 2)).tolist(),
        apart.mean((0, 1)).tolist(),
        apart.square().mean((0, 1)).sqrt().tolist(),
    )


def predicted_actions(
    policy: nn.Module,
    cache: AnchorCache,
    indices: Sequence[int] | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = False,
    title: str = "the policy",
) -> Tensor:
    """Chunks of actions that a lerobot policy predicts on the anchors, still normalised.

    Inputs come from the cache, made by its teacher's preprocessor. Random numbers (the noise of flow matching) depend
    only on `seed`, the batch size and the anchors, so that two policies draw the same; pi0_fast decodes at temperature
    0. Queues of actions, flags and the temperature are restored afterwards.

    Args:
        policy: Policy with `predict_action_chunk`, on its device.
        indices: Places of the anchors; at least one. None: all.
        progress: True to show a bar. None: only on a terminal.

    Returns:
        `[anchors, steps, dimensions]`, float32, on the CPU.

    Raises:
        ValueError: The policy has no `predict_action_chunk`, or the anchors lack one of its inputs.
    """
    predict = getattr(policy, "predict_action_chunk", None)
    if predict is None:
        raise ValueError(f"`policy` must have `predict_action_chunk`, as lerobot's. Found {type(policy).__name__}.")
    places = list(range(len(cache))) if indices is None else list(indices)
    if not places or batch_size < 1:
        raise ValueError(f"`indices` and `batch_size` must be at least one. Found {len(places)} and {batch_size}.")
    device = device_of(policy)
    autocast = None if cache.features.autocast is None else getattr(torch, cache.features.autocast)
    chunks = []
    with anchor_bar(progress, f"{title}, actions") as (bar, _), _as_found(policy):
        for number, start in enumerate(range(0, len(places), batch_size)):
            batch = places[start : start + batch_size]
            inputs: Any = to_device(cache.read(batch, features=False).inputs, device)
            with torch.no_grad(), isolated_rng(device, mixed_seed(seed, number)), autocast_to(device, autocast):
                _empty_queues(policy)
                try:
                    chunks.append(predict(inputs).float().cpu())
                except KeyError as error:
                    raise ValueError(
                        f"The anchors of {cache.path} do not hold {error}, without which the policy cannot act. They "
                        f"hold {', '.join(cache.structure.names)}: build them with --keep=logits or --keep=actions, or "
                        "compare no actions."
                    ) from error
            bar(len(batch), len(places))
    return torch.cat(chunks)


@contextmanager
def _as_found(policy: Any) -> Iterator[None]:
    """Makes a policy decode greedily in the block; afterwards its modes, queues and temperature are as before."""
    training = [(module, module.training) for module in policy.modules()]
    queues = _queues(policy)
    config: Any = getattr(policy, "config", None)
    temperature = getattr(config, "temperature", None)
    try:
        if temperature is not None:
            config.temperature = 0.0
        yield
    finally:
        if temperature is not None:
            config.temperature = temperature
        for name, queue in queues.items():
            setattr(policy, name, queue)
        for module, flag in training:
            module.training = flag


def _empty_queues(policy: Any) -> None:
    """Gives the policy empty queues; its own are not touched."""
    for name, value in _queues(policy).items():
        empty = {key: deque[Any](maxlen=queue.maxlen) for key, queue in _named(value).items()}
        setattr(policy, name, empty if isinstance(value, dict) else empty[""])


def _queues(policy: Any) -> dict[str, Any]:
    """Attributes of the policy that are queues, or mappings of queues."""
    own = {name: value for name, value in vars(policy).items() if isinstance(value, deque | dict) and _named(value)}
    return {name: value for name, value in own.items() if all(isinstance(q, deque) for q in _named(value).values())}


def _named(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"": value}
