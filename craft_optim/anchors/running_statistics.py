"""Running statistics of normalisations, which forwards in train mode move without a gradient."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from craft_optim._warn import warn

from .passes import is_noisy

__all__ = ["Statistics", "StatisticsWatch"]

_NAMED = 3  # modules in a warning


class Statistics:
    """Current running statistics of a model's normalisations, which forwards in training change."""

    def __init__(self, model: nn.Module) -> None:
        self._then = [
            (path, module, name, x.detach().clone())
            for path, module in model.named_modules()
            if is_noisy(module)
            for name, x in module.named_buffers(recurse=False)
            if not is_lazy(x)
        ]

    def moved(self) -> list[str]:
        """Names of the modules whose statistics have changed since."""
        changed = (path for path, m, name, x in self._then if not torch.equal(getattr(m, name).to(x.device), x))
        return list(dict.fromkeys(changed))

    @contextmanager
    def back(self) -> Iterator[None]:
        """Gives the model the recorded statistics within the block."""
        now = [getattr(module, name) for _, module, name, _ in self._then]
        try:
            for (_, module, name, then), x in zip(self._then, now, strict=True):
                setattr(module, name, then.to(x.device))
            yield
        finally:
            for (_, module, name, _), x in zip(self._then, now, strict=True):
                setattr(module, name, x)


class StatisticsWatch:
    """Warns once if a model's running statistics move from pass to pass.

    The gradient of a loss cannot hold them: forwards in train mode move them at any learning rate. They are compared in
    the passes 2, 4, 8, ..., as a comparison waits for the device.
    """

    def __init__(self) -> None:
        self._then: Statistics | None = None
        self._passes, self._warned = 0, False

    def look(self, model: nn.Module) -> None:
        """Notes one more pass of the model."""
        self._passes += 1
        if self._then is None:
            self._then = Statistics(model)
        elif not self._warned and self._passes.bit_count() == 1 and (moved := self._then.moved()):
            self._warned = True
            more = f" and {len(moved) - _NAMED} more" if len(moved) > _NAMED else ""
            warn(
                f"Running statistics have moved since the first pass over the anchors, those of "
                f"{', '.join(map(repr, moved[:_NAMED]))}{more}: the task's forwards move them without a gradient, so "
                "that no lambda can hold what this does to the model. Put these modules into eval mode after each "
                "`model.train()`, with `model.get_submodule(name).eval()`."
            )
