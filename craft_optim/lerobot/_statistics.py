"""Normalisation by running statistics while training goes on, as a policy normalises when it acts."""

from typing import Any

from torch import nn

__all__ = ["freeze_statistics"]


def freeze_statistics(model: nn.Module) -> list[str]:
    """Fixes the running statistics of batch normalisation from now on, in train mode, too.

    Otherwise training changes them without gradients, and normalises by its own batches' statistics, unlike the policy
    that acts: retention then holds a function that uses the statistics, the task is learned without them, and the
    policy that acts has learned little of it. Weights and biases of these layers still train.

    Args:
        model: Any model; state dicts, copies and modes do not change.

    Returns:
        Names of the layers; empty if none keeps statistics, as with layer and group normalisation.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
    }
    for module in layers.values():
        if _in_eval_mode not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_in_eval_mode)
    return list(layers)


def _in_eval_mode(module: nn.Module, args: Any) -> None:
    module.training = False  # `train()` of the whole model comes before every step of most trainers
