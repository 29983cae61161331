"""The part of a module's output that hooks see, while the policy goes on with the whole."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from craft_optim.lerobot._shared import ACTION

__all__ = ["observed", "real_actions"]


@contextmanager
def observed(module: nn.Module, view: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block hooks that were on the module before it see `view(output)`; its callers get the output.

    Args:
        module: Returns a tensor.
        view: A slice: it must keep no tensor for the backward, because activation checkpointing repeats forwards
            without it.
    """
    whole: list[Tensor] = []

    def show(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        whole[:] = [output]
        return view(output)

    def restore(module: nn.Module, args: Any, shown: Tensor) -> Tensor:
        return whole.pop()

    # The first and the last of the module's hooks
    handles = module.register_forward_hook(show, prepend=True), module.register_forward_hook(restore)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def real_actions(batch: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Velocities `[B, chunk, max_action_dim]` -> those of the action dimensions that the anchors have.

    The others are padding, and no loss of lerobot's looks at them: they may go where they like.
    """
    width = batch[ACTION].shape[-1]
    return lambda velocities: velocities[..., :width]
