"""Methods that are compared: a name for each, and one training step of it. Baselines are written out plainly here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from craft_optim import CraftOptimizer
from craft_optim.anchors import AnchorCache, AnchorRetention
from craft_optim.chat import batch_of

__all__ = ["EPSILON", "METHODS", "Method", "Training", "adapted", "task_loss"]

EPSILON = 0.05
WARM_UP = 5  # steps, before the rate falls linearly
RANK, LORA_RATE = 16, 3.0  # of LoRA; its rate is a multiple of the others'
PULL = 100.0  # of "l2": per unit of the learning rate, a step takes a parameter this share of the way back
ASFT_WEIGHT = 0.1  # as its authors' train.py has it


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: In names of files.
        label: In tables.
        kind: "before" is not trained; "plain" is AdamW; "l2", "replay", "kl" and "asft" add something; "craft".
        weight: Of what is added.
        rate: Factor on the learning rate.
        lora: Adapters train, not the model's own weights.
        cache: The anchors of "replay", "kl" and "craft".
        anchors: So many of them are in a pass; 16 are the library's default.
        epsilon: Of "craft".
    """

    name: str
    label: str
    kind: Literal["before", "plain", "l2", "replay", "kl", "asft", "craft"] = "plain"
    weight: float = 0.0
    rate: float = 1.0
    lora: bool = False
    cache: str = "anchors"
    anchors: int = 16
    epsilon: float = EPSILON


METHODS = (
    Method("before", "before", "before"),
    Method("adamw", "AdamW"),
    Method("craft", "CRaFT", "craft"),
    Method("craft-4", "CRaFT, 4 anchors in a pass", "craft", anchors=4),
    Method("craft-0.15", "CRaFT, epsilon .15", "craft", epsilon=0.15),
    Method("craft-self", "CRaFT, anchors from nothing", "craft", cache="self"),
    Method("adamw-third", "AdamW, a third of the rate", rate=1 / 3),
    Method("lora", "LoRA", lora=True),
    Method("kl-0.3", "KL, lambda .3", "kl", weight=0.3),
    Method("kl-1", "KL, lambda 1", "kl", weight=1.0),
    Method("kl-3", "KL, lambda 3", "kl", weight=3.0),
    Method("asft", "anchored SFT", "asft", weight=ASFT_WEIGHT),
    Method("l2", "L2 to the start", "l2", weight=PULL),
    Method("replay", "replay of its own answers", "replay", weight=1.0),
    Method("craft-lora", "CRaFT with LoRA", "craft", lora=True),
)
"""All methods, in the order in which a seed's runs are made"""


def adapted(model: nn.Module, method: Method, seed: int) -> nn.Module:
    """The model as the method trains it; its own weights are changed in place."""
    model.requires_grad_(not method.lora)
    if not method.lora:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    made: nn.Module = get_peft_model(model, config)  # type: ignore[arg-type]
    return made


class Training:
    """A method's optimizer, and what a step of it does.

    Args:
        model: As `adapted` returns it.
        method: Anything that trains.
        caches: The anchors.
        lr: Learning rate, before the method's factor.
        steps: Of the whole run: the rate falls to zero over them.
        seed: Of the order of anchors.
    """

    def __init__(
        self, model: nn.Module, method: Method, caches: Mapping[str, AnchorCache], lr: float, steps: int, seed: int
    ) -> None:
        self._model, self._method = model, method
        self._trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        rate = lr * method.rate * (LORA_RATE if method.lora else 1.0)
        base = torch.optim.AdamW(self._trained, lr=rate, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            base, lambda step: min((step + 1) / WARM_UP, (steps - step) / max(steps - WARM_UP, 1))
        )
        self._rate = base.param_groups[0]
        self._retention: AnchorRetention | None = None
        if method.kind in ("kl", "replay", "craft"):
            kind = "tokens" if method.kind == "replay" else "logits"
            cache = caches[method.cache]
            self._retention = cache.retention(model, kind, min(method.anchors, len(cache)), seed=seed)
        self._start = [p.detach().clone() for p in self._trained] if method.kind in ("l2", "asft") else []
        self._optimizer: torch.optim.Optimizer = base
        if method.kind == "craft":
            self._optimizer = CraftOptimizer(base, self._retention, epsilon=method.epsilon)

    def step(self, batch: Mapping[str, Tensor]) -> float:
        """One step; returns the loss on the new task."""
        teacher = self._first_logits(batch) if self._method.kind == "asft" else None
        loss = self._loss(batch, teacher)
        if self._method.kind in ("kl", "replay"):
            assert self._retention is not None
            loss = loss + self._method.weight * self._retention()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._method.kind == "l2":
            with torch.no_grad():
                torch._foreach_lerp_(self._trained, self._start, self._method.weight * float(self._rate["lr"]))
        self._schedule.step()
        return float(loss)

    def found(self) -> dict[str, float]:
        """What the optimizer says of its constraint; nothing of other methods."""
        if not isinstance(self._optimizer, CraftOptimizer):
            return {}
        metrics = self._optimizer.metrics
        return {key: float(metrics[key]) for key in ("drift", "retention_loss", "lambda", "fresh") if key in metrics}

    def _loss(self, batch: Mapping[str, Tensor], teacher: Tensor | None) -> Tensor:
        if teacher is None:
            return task_loss(self._model, batch)
        # Anchored SFT (arXiv 2509.23753): cross-entropy weighted with the probability, and KL(start, now) beside it
        here, logits, labels = _at_answers(self._model, batch)
        logprobs = logits.log_softmax(-1)
        own = logprobs.gather(-1, labels[:, None]).squeeze(-1)
        apart = F.kl_div(logprobs, teacher[here].log_softmax(-1), log_target=True, reduction="batchmean")
        return self._method.weight * apart - (own.detach().exp() * own).mean()

    @torch.no_grad()
    def _first_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        now = [p.detach().clone() for p in self._trained]
        torch._foreach_copy_(self._trained, self._start)
        logits: Tensor = self._model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch._foreach_copy_(self._trained, now)
        return logits[:, :-1]


def _at_answers(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Where labels are `[B, T - 1]`, the logits there and the labels `[n]`."""
    here = batch["labels"][:, 1:] != -100
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return here, logits[here].float(), batch["labels"][:, 1:][here]


def task_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of the answers' tokens, in nats per token."""
    _, logits, labels = _at_answers(model, batch)
    return F.cross_entropy(logits, labels)


def mean_loss(model: nn.Module, rows: Iterator[list[Any]]) -> float:
    """The same over all tokens of many batches, without gradients."""
    total, count = 0.0, 0
    with torch.no_grad():
        for chats in rows:
            batch = batch_of(chats)
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + tokens * float(task_loss(model, batch)), count + tokens
    return total / count
