"""For the Hugging Face Trainer: a factory for its optimizer, and a callback that logs what the optimizer measures.

    retention = craft_optim.anchors.OnlineRetention(model, anchors, batch_size=8, collate=collator)
    trainer = Trainer(
        model,
        args,
        train_dataset=dataset,
        optimizer_cls_and_kwargs=craft_optimizer(args, retention, epsilon=0.05),
        callbacks=[CraftCallback(drift=lambda: retention.drift(held_out))],
    )

Nothing else changes: schedules, accumulation, clipping, checkpoints and `resume_from_checkpoint` are the Trainer's own.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from craft_optim._step.constraint import Constraints
from craft_optim.optimizer import CraftOptimizer

__all__ = ["CraftCallback", "craft_optimizer"]


def craft_optimizer(
    args: TrainingArguments, retention: Constraints | None, model: torch.nn.Module | None = None, **craft: Any
) -> tuple[type[CraftOptimizer], dict[str, Any]]:
    """The optimizer that `args` ask for, with retention, as the Trainer's `optimizer_cls_and_kwargs` takes it.

    The base is the Trainer's own choice (`optim`, `learning_rate`, `adam_beta1`, `optim_args`, ...); so are its groups
    of parameters with and without weight decay. The Trainer builds it when it has moved, or sharded, the model.

    Args:
        model: The model, for those `optim` that need it, such as GaLore.

    Returns:
        A class and its keywords, new ones at every call: the Trainer may change them.

    Raises:
        ValueError: `optim` names one that steps within the backward, or that is not a `torch.optim.Optimizer`: neither
            leaves gradients that could be merged.
    """
    base, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not (isinstance(base, type) and issubclass(base, torch.optim.Optimizer)) or {"model", "optimizer_dict"} & {
        *kwargs
    }:
        raise ValueError(
            "`args.optim` must be an optimizer that steps after the backward, on gradients in `p.grad`. Found "
            f"{args.optim}: choose another, such as adamw_torch, or wrap one yourself and pass "
            "`optimizers=(CraftOptimizer(...), None)`."
        )
    bound = CraftOptimizer.bind(base, retention, **craft)
    # By the module in the class's name the Trainer knows bitsandbytes, whose embeddings it keeps in 32 bits.
    bound.__module__ = base.__module__
    return bound, kwargs


class CraftCallback(TrainerCallback):  # type: ignore[misc]  # untyped in some versions
    """Adds the optimizer's metrics to the Trainer's logs, and the drift on other anchors to its evaluations.

    Beside `loss` there are then `craft/retention_loss`, `craft/lambda` and the other `craft_optim.metrics.METRICS`: in
    the console, in `trainer.state.log_history`, and in everything in `report_to`. They belong to the last step that ran
    retention; `loss` is a mean since the last log. Evaluations get `eval_craft/drift_heldout`, also as a
    `metric_for_best_model`.

    Args:
        drift: Measured at every evaluation, on every process, for example `lambda: retention.drift(held_out)`. None:
            nothing is.

    Raises:
        TypeError: At the start of training, if the Trainer's optimizer is not a `CraftOptimizer`.
    """

    def __init__(self, drift: Callable[[], float] | None = None) -> None:
        self.drift = drift

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._go_first()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        _craft_within(optimizer)
        self._go_first()  # once more: it may have been added, or others before it, after the Trainer was made

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        logs = {} if logs is None else logs
        added: dict[str, float] = {}
        if "loss" in logs:
            added = {f"craft/{name}": value for name, value in _craft_within(optimizer).metrics.items()}
        elif self.drift is not None and any(name.startswith("eval_") for name in logs):
            added = {"eval_craft/drift_heldout": float(self.drift())}
        logs.update(added)
        if state.log_history:  # of which the Trainer has made a copy
            state.log_history[-1].update(added)

    def _go_first(self) -> None:
        """Callbacks get the same logs one after the other, those of `report_to` before those of `callbacks=`.

        A callback does not know whose it is, so that all live handlers are searched.
        """
        for handler in [x for x in gc.get_objects() if issubclass(type(x), CallbackHandler)]:
            if any(callback is self for callback in handler.callbacks):
                # A new list: the old one is being iterated over
                handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]


def _craft_within(optimizer: Any) -> CraftOptimizer:
    """The CraftOptimizer in the wrappers of accelerate."""
    inner = optimizer
    while inner is not None and not isinstance(inner, CraftOptimizer):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        found = type(getattr(optimizer, "optimizer", optimizer)).__name__
        raise TypeError(
            f"CraftCallback needs a Trainer whose optimizer is a CraftOptimizer. Found {found}: pass "
            "`optimizer_cls_and_kwargs=craft_optimizer(args, retention, ...)`, or `optimizers=(CraftOptimizer(...), "
            "None)`."
        )
    return inner
