"""What the ranks run to see how much of the model a retention loss reaches."""

import warnings

import torch.distributed as dist
from cases import BASES, PARALLEL, network, one_step, samples

from craft_optim import CraftOptimizer


def warned(parallel, steps=11):
    """What is said about a loss on the outputs of the inlet: 112 of 2405 elements, however they are spread."""
    model = network()
    inlet, outputs = model.inlet, []
    inlet.register_forward_hook(lambda module, args, output: outputs.append(output))
    wrapped, _, _ = PARALLEL[parallel](model)

    def drift():
        whole = wrapped(samples(0)[0])  # FSDP waits for the gradient of what it returned: it may be zero
        return outputs[-1].square().mean() + 0.0 * whole.sum()

    optimizer = CraftOptimizer(BASES["sgd"](wrapped.parameters()), drift)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            one_step(wrapped, optimizer, step, dist.get_rank(), dist.get_world_size())
    return [str(w.message) for w in caught if "trainable elements" in str(w.message)]
