"""Sharded policies: functions that run parts of a policy that FSDP shards.

FSDP gathers parameters in hooks of the modules that it wraps. The adapters run modules within the policy, which would
miss the outermost hooks and their parameters: here they run within the wrapper's own forward.
"""

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from craft_optim.anchors.names import class_names
from craft_optim.anchors.passes import Forward
from craft_optim.lerobot._shared import policy_of

__all__ = ["is_sharded", "within_wrapper"]


def is_sharded(model: nn.Module) -> bool:
    """True if FSDP, of either kind, shards the model."""
    return bool({"FullyShardedDataParallel", "FSDPModule"} & set(class_names(model)))


def within_wrapper(forward: Forward) -> Forward:
    """The same function of a policy and a batch, run instead of the policy's forward when its wrapper is called.

    Its result must depend on the modules that it runs: FSDP begins its backward there.
    """

    @functools.wraps(forward)
    def routed(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        policy = policy_of(model)
        own = policy.__dict__.get("forward")  # accelerate's, under mixed precision

        def restore() -> None:
            if own is not None:
                policy.forward = own
            else:
                policy.__dict__.pop("forward", None)

        def instead(batch: Mapping[str, Tensor]) -> Any:
            restore()  # the function may call it
            return forward(policy, batch)

        policy.forward = instead
        try:
            return model(batch)
        finally:
            restore()

    return routed
