"""Hugging Face Trainer: a factory for its optimizer, and a callback that logs the optimizer's metrics.

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
import inspect
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from craft_optim._step.constraint import Constraints
from craft_optim._step.rules import Rules
from craft_optim.chat import chat_anchors
from craft_optim.metrics import METRICS
from craft_optim.optimizer import CraftOptimizer
from craft_optim.report.runs import read_file
from craft_optim.report.summary import judge, summarise

__all__ = ["CraftCallback", "chat_anchors", "craft_optimizer"]

_LOGGED = ("retention_loss", "drift", "epsilon", "heldout", "epsilon_heldout", "lambda", "capped")


def craft_optimizer(
    args: TrainingArguments,
    retention: Constraints | Callable[[nn.Module], Constraints] | None,
    model: nn.Module | None = None,
    **craft: Any,
) -> tuple[type[CraftOptimizer], dict[str, Any]]:
    """The optimizer that `args` request, with retention, as the Trainer's `optimizer_cls_and_kwargs` takes it.

    The base is the Trainer's own choice (`optim`, `learning_rate`, `adam_beta1`, `optim_args`, ...); so are its groups
    of parameters with and without weight decay. The Trainer builds it after it has moved or sharded the model. The
    arguments are read then: changes of `trainer.args`, as by a hyperparameter search, count.

    If the Trainer makes its models itself, by `model_init`, each needs its own closure: pass a function that makes one
    for a model.

        craft_optimizer(args, lambda model: LogitRetention(model, cache), epsilon=0.05)

    Args:
        args: The Trainer's arguments.
        retention: Closure or closures as for `CraftOptimizer`, or a function that makes them for the Trainer's model.
        model: The model, for values of `optim` that need it, such as GaLore.
        **craft: Keywords of `CraftOptimizer`, such as `heldout`.

    Returns:
        A class and its keywords, new ones at every call. Changes in the keywords override `args`.

    Raises:
        ValueError: `optim` names an optimizer that steps within the backward, or is not a `torch.optim.Optimizer`:
            neither leaves gradients to merge. When the optimizer is built: `retention` is a function, and no Trainer
            has the model.
    """
    base, found = _base_of(args, model)
    keywords = {name: value for name, value in found.items() if name != "params"}

    class Bound(CraftOptimizer.bind(base, None)):  # type: ignore[misc]  # a class made in a function
        def __init__(self, params: Any, **given: Any) -> None:
            params = list(params)
            trainer = _trainer_of(type(self), params)
            its_args, its_model = (args, model) if trainer is None else (trainer.args, trainer.model)
            base, read = _base_of(its_args, its_model)
            params = read.pop("params", params)  # GaLore and others make their groups of the model
            changed = {name: value for name, value in given.items() if name not in known or known[name] != value}
            known.clear()
            known.update(read)
            keywords.clear()  # the Trainer looks at them once more, for bitsandbytes
            keywords.update(read | changed)
            type(self).__module__ = base.__module__
            closure = _of_model(retention, its_model) if _needs_one(retention) else retention
            CraftOptimizer.__init__(self, base(params, **keywords), cast(Constraints | None, closure), **craft)
            if trainer is not None and trainer.model_init is not None:
                _require_own(self)

    known = dict(keywords)
    # By the module in the class's name the Trainer knows bitsandbytes, whose embeddings it keeps in 32 bits.
    Bound.__module__ = base.__module__
    Bound.__name__ = Bound.__qualname__ = f"Craft{base.__name__}"
    return Bound, keywords


def _base_of(args: TrainingArguments, model: nn.Module | None) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class and keywords that the Trainer would choose."""
    base, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not (isinstance(base, type) and issubclass(base, torch.optim.Optimizer)) or {"model", "optimizer_dict"} & {
        *kwargs
    }:
        raise ValueError(
            "`args.optim` must be an optimizer that steps after the backward, on gradients in `p.grad`. Found "
            f"{args.optim}: choose another, such as adamw_torch, or wrap one yourself and pass "
            "`optimizers=(CraftOptimizer(...), None)`."
        )
    return base, dict(kwargs)


def _trainer_of(made: type[CraftOptimizer], params: list[Any]) -> Any:
    """The Trainer that is building this class now; it passes neither its model nor itself.

    If several have the class, it is the one whose model has the parameters.
    """
    found = [x for x in gc.get_objects() if issubclass(type(x), Trainer) and x.optimizer is None]
    found = [x for x in found if x.optimizer_cls_and_kwargs and x.optimizer_cls_and_kwargs[0] is made]
    if len(found) > 1:
        first = next(p for x in params for p in (x["params"] if isinstance(x, dict) else [x]))
        found = [x for x in found if any(p is first for p in x.model.parameters())]
    return found[0] if len(found) == 1 else None


def _require_own(optimizer: CraftOptimizer) -> None:
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for constraint in optimizer.constraints.values():
        reached = list(constraint.closure.parameters())
        if reached and not any(id(p) in mine for p in reached):
            raise ValueError(
                "`retention` belongs to another model than the one that the Trainer has made by `model_init`, anew for "
                "each run. Pass a function that makes a retention of a model: craft_optimizer(args, lambda model: "
                "LogitRetention(model, cache))."
            )


def _needs_one(function: Any) -> bool:
    """True if a function can be called with one argument and not without, unlike a closure."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False

    def binds(*args: Any) -> bool:
        try:
            signature.bind(*args)
        except TypeError:
            return False
        return True

    return binds(None) and not binds()


def _of_model(retention: Any, model: nn.Module | None) -> Any:
    if model is None:
        raise ValueError(
            "`retention` is a function of the model, and no Trainer was found whose model has the optimizer's "
            "parameters: pass the retention itself, or build the optimizer in a Trainer."
        )
    made = retention(model)
    if made is None:
        raise ValueError(
            "`retention` must return a retention of the model that it is given. Found None: return it, or pass "
            "retention=None for none."
        )
    return made


class CraftCallback(TrainerCallback):  # type: ignore[misc]  # untyped in some versions
    """Adds the optimizer's metrics to the Trainer's logs, and the drift on other anchors to its evaluations.

    Beside `loss`, logs then have `craft/retention_loss`, `craft/drift`, `craft/epsilon`, `craft/lambda` and
    `craft/capped` (with `heldout` anchors `craft/heldout` and `craft/epsilon_heldout`, too, and `craft/skipped` once a
    retention pass was not finite): in the console, in `trainer.state.log_history`, and in everything in `report_to`.
    They belong to the last step that ran retention; `loss` is a mean since the last log. Evaluations get
    `eval_craft/drift_heldout`, which may be the `metric_for_best_model`. The last log, with `train_runtime`, has them
    once more, and the first process prints the verdict of `craft-optim report`.

    It also sets `Rules.total_steps`, the length of training, if that was not given.

    Args:
        drift: Function that measures drift at every evaluation, on every process, for example `lambda:
            retention.drift(held_out)`. A function of one argument gets the optimizer's closure, `lambda retention:
            retention.drift(held_out)`, and is not called before there is an optimizer. None: nothing is measured.
        metrics: Names of the metrics to log; `craft_optim.metrics.METRICS` has them all, and may be passed itself.

    Raises:
        ValueError: There is no such metric.
        TypeError: At the start of training, if the Trainer's optimizer is not a `CraftOptimizer`.
    """

    def __init__(self, drift: Callable[..., float] | None = None, metrics: Iterable[str] = _LOGGED) -> None:
        self.drift, self.metrics = drift, (metrics,) if isinstance(metrics, str) else tuple(metrics)
        self._told: Rules | None = None
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"`metrics` must be of {', '.join(METRICS)}. Found {unknown[0]!r}.")

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._go_first()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        craft = _craft_within(optimizer)
        if craft.rules.total_steps is None or craft.rules is self._told:
            before = int(craft.param_groups[0]["craft_step"]) - state.global_step  # of another training
            craft.rules = self._told = replace(craft.rules, total_steps=before + state.max_steps)
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
        if "loss" in logs or "train_runtime" in logs:
            measured = _craft_within(optimizer).metrics  # of several constraints also "lambda/name"
            wanted = (*self.metrics, "skipped") if measured.get("skipped") else self.metrics
            added = {f"craft/{name}": x for name, x in measured.items() if name.partition("/")[0] in wanted}
            added = {name: x for name, x in added.items() if not math.isnan(x)}  # not measured yet
        elif self.drift is not None and any(name.startswith("eval_") for name in logs):
            if not _needs_one(self.drift):
                added = {"eval_craft/drift_heldout": float(self.drift())}
            elif optimizer is not None:
                added = {"eval_craft/drift_heldout": float(self.drift(_craft_within(optimizer).retention_closure))}
        logs.update(added)
        if state.log_history:  # the Trainer has made a copy of these
            state.log_history[-1].update(added)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        measured = any("craft/drift" in name for row in state.log_history for name in row)
        if not (measured and state.is_world_process_zero):
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trainer_state.json"
            state.save_to_json(str(file))
            runs = read_file(file, "training")
        for run in runs:
            print(f"{run.name}: {judge(summarise(run)).words}")  # as the Trainer says what it has logged

    def _go_first(self) -> None:
        """Moves this callback before those of `report_to`, which would get the same logs earlier.

        A callback does not know its handler, so all live handlers are searched.
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
