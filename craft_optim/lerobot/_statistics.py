"""Normalisation by running statistics while training goes on, as a policy normalises when it acts."""

from typing import Any

from torch import nn

__all__ = ["freeze_statistics"]


def freeze_statistics(model: nn.Module) -> list[str]:
    """From now on batch normalisation uses its running statistics as they are, in train mode, too.

    Otherwise training moves them with no gradient, normalises by those of its own batches, and is not the function that
    acts: retention then holds what the policy did by means of the statistics, the task is learnt without them, and the
    policy that acts has learnt little of it. Weights and biases of these layers train on.

    Args:
        model: Of any kind; state dicts, copies and modes stay as they are.

    Returns:
        Names of the layers; none where statistics are not kept, as in layer and group normalisation.
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
