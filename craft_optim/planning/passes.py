"""Passes of a step on stand-ins: the task's loss, and the loss over anchors as the closures compute it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from craft_optim.anchors import losses
from craft_optim.anchors.bernoulli_retention import bernoulli_term
from craft_optim.anchors.capture import Layer, pool, positions, resolve_layers, run
from craft_optim.anchors.kept import TopK, top_k_of
from craft_optim.anchors.kinds import Output
from craft_optim.anchors.logit_retention import kl_term
from craft_optim.anchors.manifest import FeatureSpec
from craft_optim.anchors.passes import autocast_to, logits_of, steady
from craft_optim.anchors.pieces import LogitRows, piece_bytes, rows_at
from craft_optim.anchors.reading import Reading
from craft_optim.anchors.structure import anchors_of
from craft_optim.anchors.valid_head import LinearHead, head_left_out, only_scaled, output_head
from craft_optim.planning.cache_size import class_bytes, value_bytes

__all__ = ["AnchorPass", "Loss", "can_checkpoint", "checkpointing", "is_checkpointing", "task_loss"]

Loss = Callable[[nn.Module, Any], Tensor]
_CPU = torch.device("cpu")


def task_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model returns: a scalar, the first of a tuple, `.loss` or `["loss"]`.

    Raises:
        ValueError: The model returns no loss.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    found = output[0] if isinstance(output, tuple | list) and len(output) else output
    found = found if isinstance(found, Tensor) else _named(output)
    if not isinstance(found, Tensor) or found.numel() != 1:
        what = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"A plan needs the task's loss, and {type(model).__name__} returned {what}, which is none or has none: "
            "put `labels` into the batch of a model of transformers, or pass loss=, a function of model and batch."
        )
    return found


def _named(output: Any) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


@dataclass
class AnchorPass:
    """Loss of a pass over anchors: KL of classes, or squared distances of hidden states or other outputs.

    The teacher's outputs are on the device, as in a pass.

    Args:
        model: The model.
        reading: The `Reading`, as for `anchors.build`.
        layers: Hidden states to keep.
        top_k: Number of classes to keep, as for `anchors.build`.
        dtype: Dtype on disk.
        valid: Share of the positions whose classes count.

    Attributes:
        kept: Bytes per anchor of the outputs in a cache; known after the first call, as are the following.
        logits: Bytes of all logits in float32; 0 without classes.
        piece: Bytes of logits that the pass has at a time.
        left_out: True if the head runs in pieces and its logits never exist.
    """

    model: nn.Module
    reading: Reading
    layers: tuple[Layer, ...]
    top_k: TopK
    dtype: torch.dtype
    valid: float = 1.0
    kept: float = 0.0
    logits: int = 0
    piece: int = 0
    left_out: bool = False
    _head: LinearHead | None = None

    def __post_init__(self) -> None:
        output = self.reading.output
        if self.reading.tokens is not None or isinstance(output, Mapping):
            what = "tokens" if self.reading.tokens is not None else "output"
            raise ValueError(
                f"A plan is of one output, and of batches as they are. Found `{what}`={getattr(self.reading, what)!r}: "
                "leave it out, and put the tokens into the batch."
            )
        self._kind = "classes" if output == "auto" and not self.layers else output
        if self._kind == "auto":
            self._kind = None
        if self._kind is None and not self.layers:
            raise ValueError("Nothing is kept of the model: `output` is None and there are no `layers`. Pass one.")
        self.layers = resolve_layers(self.model, self.layers)

    def ask(self, inputs: Any) -> None:
        """Finds out if the comparison can run the head, by a forward of one anchor, as a first pass does.

        Numbers, which a pass compares as well, are assumed to agree.
        """
        head = output_head(self.model)
        if self._kind != "classes" or self.layers or not isinstance(head, nn.Linear):
            return
        with steady(self.model), autocast_to(_CPU, self.reading.autocast):
            found = only_scaled(self.model, anchors_of(inputs, 0, 1, {}), self.reading.forward, head)
        self._head = None if found is None else LinearHead(head)

    def __call__(self, inputs: Any) -> Tensor:
        """Computes L_ret, a scalar.

        Args:
            inputs: Batch without labels.
        """
        self.kept, wanted = 0.0, self._kind is not None
        with steady(self.model) as remember, autocast_to(_CPU, self.reading.autocast):
            with nullcontext() if self._head is None else head_left_out(self._head, None) as seen:
                output, hidden = run(
                    self.model, inputs, forward=self.reading.forward, layers=self.layers, output=wanted
                )
            terms = [self._of_hidden(x) for x in hidden.values()]
            if wanted and seen is not None and seen.used and self._head is not None:
                terms.append(self._of_classes(self._head.rows(seen), seen.shape))
                self.left_out = True
            elif wanted:
                terms.append(self._of_output(output))
            return remember(torch.stack(terms).mean())

    def _of_output(self, output: Any) -> Tensor:
        x = logits_of(output)
        if x is None or not x.is_floating_point() or x.ndim < 2:
            raise ValueError(
                f"The model must give its output, a tensor or `.logits`, as floating numbers [B, ...]. Found "
                f"{type(output).__name__}: pass a reading with `forward=`, a function that returns such a tensor."
            )
        dim = -1 if self.reading.class_dim is None else self.reading.class_dim
        assert isinstance(dim, int)
        rows = x.movedim(dim, -1)
        if self._kind == "classes":
            return self._of_classes(rows.flatten(0, -2), tuple(rows.shape[:-1]))
        self.kept += value_bytes(rows.shape, self.dtype)
        teacher = torch.empty(rows.shape, dtype=self.dtype)
        if self._kind == "labels":
            return bernoulli_term(rows.flatten(0, -2), teacher.flatten(0, -2))[0]
        with torch.autocast("cpu", enabled=False):
            return losses.feature_mse(rows, teacher)

    def _of_classes(self, rows: LogitRows, shape: tuple[int, ...]) -> Tensor:
        classes, count = rows.shape[1], max(1, round(self.valid * len(rows)))
        if count < len(rows):
            rows = rows_at(rows, torch.empty(count, dtype=torch.long))
        most = FeatureSpec(**top_k_of(self.top_k)).top_k_of(Output("classes", 1, classes))
        k = classes if most is None else min(most, classes)
        self.kept += class_bytes(count / shape[0], classes, k, self.dtype)
        self.logits, self.piece = 4 * count * classes, piece_bytes(rows)
        teacher = {"topk_logprobs": torch.empty(count, k, dtype=self.dtype)}
        if k == classes:
            teacher = {"logprobs": teacher["topk_logprobs"]}
        else:
            teacher["topk_indices"] = torch.empty(count, k, dtype=torch.int32)
            teacher["rest_logprob"] = torch.empty(count, dtype=self.dtype)
        return kl_term(rows, teacher)[0]

    def _of_hidden(self, x: Tensor) -> Tensor:
        states, terms = positions(x, self.reading.batch_dim), []
        for mode in (self.reading.pooling or {"all": "masked_mean"}).values():
            student = pool(states, None, mode) if states.ndim == 3 else states
            self.kept += value_bytes(student.shape, self.dtype)
            with torch.autocast("cpu", enabled=False):
                terms.append(losses.feature_mse(student, torch.empty(student.shape, dtype=self.dtype)))
        return torch.stack(terms).mean()


# -- activation checkpointing ------------------------------------------------------------------------------------------


def _owner(model: nn.Module) -> Any:
    """The outermost module that can turn activation checkpointing on and off; None without one."""
    names = ("gradient_checkpointing_enable", "gradient_checkpointing_disable")
    return next((m for m in model.modules() if all(callable(getattr(m, name, None)) for name in names)), None)


def can_checkpoint(model: nn.Module) -> bool:
    """True if activation checkpointing can be turned on here."""
    owner = _owner(model)
    return owner is not None and getattr(owner, "supports_gradient_checkpointing", True)


def is_checkpointing(model: nn.Module) -> bool:
    """True if a module of the model checkpoints activations, by the flag that libraries set."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


@contextmanager
def checkpointing(model: nn.Module, on: bool) -> Iterator[None]:
    """Turns activation checkpointing on or off within the block; afterwards the model is what it was."""
    owner, before = _owner(model), is_checkpointing(model)
    if owner is None or on == before:
        yield
        return
    _switch(owner, on)
    try:
        yield
    finally:
        _switch(owner, before)


def _switch(owner: Any, on: bool) -> None:
    if not on:
        owner.gradient_checkpointing_disable()
        return
    try:
        owner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except TypeError:  # lerobot's takes no arguments
        owner.gradient_checkpointing_enable()
