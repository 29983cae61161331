"""Methods that are compared: a name for each, and one training step of it. Baselines are written out plainly here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pi0_fast_craft import warmup_cosine
from torch import Tensor, nn

from craft_optim import Constraint, CraftOptimizer

__all__ = ["IN_PI0", "IN_SCENES", "IN_SEQUENCE", "METHODS", "Method", "Training", "adapted", "fisher"]

EPSILON = 0.1  # nats: the default of craft-optim train
HIDDEN_EPSILON = 0.005  # share of the variance
BATCH = 16  # frames of a step, and anchors of a pass
RANK, LORA_RATE = 16, 3.0  # of LoRA; its rate is a multiple of the others'


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: In names of files.
        label: In tables.
        kind: "before" is not trained; "plain" is AdamW; "l2", "ewc", "replay" and "kl" add something; "craft".
        weight: Of what is added; of "l2" the share of the way back that a step takes, per unit of the learning rate.
        rate: Factor on the learning rate.
        length: Factor on the number of steps.
        lora: Adapters train, not the policy's own weights.
        frozen: Parts of names of parameters that do not train.
        back: After training the weights go this share of the way back to the start.
        anchors: Which: a key of `setup.ANCHORED`, or "own".
        few: Of "replay", the first episode of each task alone.
        drift: What "craft" holds: the policy's "output" (logits), "hidden" states, or "both" as two constraints.
        every: K of "craft".
        epsilon: Of "craft", on the output.
        batch: Anchors of a pass, or known frames of a step of "replay".
        heldout: Its epsilon is about held-out frames.
        joint: In a sequence of tasks the anchors of all earlier ones are one constraint, written down anew before each
            task; else each has its own, of the policy that had just learnt it.
    """

    name: str
    label: str
    kind: Literal["before", "plain", "l2", "ewc", "replay", "kl", "craft"] = "plain"
    weight: float = 0.0
    rate: float = 1.0
    length: int = 1
    lora: bool = False
    frozen: str = ""
    back: float = 0.0
    anchors: str = "all"
    few: bool = False
    drift: Literal["output", "hidden", "both"] = "output"
    every: int | Literal["auto"] = "auto"
    epsilon: float = EPSILON
    batch: int = BATCH
    heldout: bool = False
    joint: bool = False

    @property
    def trains_less(self) -> bool:
        """True if a step of AdamW alone would cost more than what is this method's plain step."""
        return self.lora or bool(self.frozen)


METHODS = (
    Method("before", "before", "before"),
    Method("adamw", "AdamW"),
    Method("craft", "CRaFT", "craft"),
    Method("kl-1", "KL, lambda 1", "kl", weight=1.0),
    Method("replay", "replay with labels", "replay", weight=1.0),
    Method("craft-half", "CRaFT, anchors of half of the tasks", "craft", anchors="half"),
    Method("craft-one", "CRaFT, anchors of one task", "craft", anchors="one"),
    Method("craft-own", "CRaFT, its own rollouts as anchors", "craft", anchors="own"),
    Method("craft-0.05", "CRaFT, epsilon .05", "craft", epsilon=0.05),
    Method("craft-0.2", "CRaFT, epsilon .2", "craft", epsilon=0.2),
    Method("craft-0.01", "CRaFT, epsilon .01", "craft", epsilon=0.01),
    Method("craft-8", "CRaFT, 8 anchors per pass", "craft", batch=8),
    Method("kl-0.1", "KL, lambda .1", "kl", weight=0.1),
    Method("kl-10", "KL, lambda 10", "kl", weight=10.0),
    Method("lora", "LoRA", lora=True),
    Method("adamw-third", "AdamW, a third of the rate", rate=1 / 3),
    Method("frozen", "vision tower frozen", frozen="vision_tower"),
    Method("replay-few", "replay, one episode per task", "replay", weight=1.0, few=True),
    Method("l2", "L2 to the start", "l2", weight=30.0),
    Method("ewc", "EWC", "ewc", weight=100.0),
    Method("wise-ft", "weights half-way back", back=0.5),
    Method("craft-every", "CRaFT, K = 1", "craft", every=1),
    Method("craft-hidden", "CRaFT, hidden states", "craft", drift="hidden"),
    Method("craft-both", "CRaFT, logits and hidden states", "craft", drift="both"),
    Method("craft-heldout", "CRaFT, epsilon .2 on held-out frames", "craft", epsilon=0.2, heldout=True),
    Method("adamw-long", "AdamW, slow", rate=1 / 3, length=3),
    Method("craft-long", "CRaFT, slow", "craft", rate=1 / 3, length=3),
    Method("craft-8-long", "CRaFT, slow, 8 anchors per pass", "craft", rate=1 / 3, length=3, batch=8),
    Method("kl-1-long", "KL, lambda 1, slow", "kl", weight=1.0, rate=1 / 3, length=3),
    Method("craft-joint", "CRaFT, one constraint for all stages", "craft", joint=True),
)
"""All methods; a seed's runs are made in this order"""

IN_SCENES = ("adamw", "craft", "kl-1", "replay", "adamw-long", "craft-long")
IN_PI0 = ("adamw", "craft", "craft-0.05", "craft-0.01")
IN_SEQUENCE = ("adamw", "craft", "craft-joint", "kl-1", "replay")


def adapted(policy: nn.Module, method: Method, seed: int) -> list[nn.Parameter]:
    """The parameters that the method trains; adapters are put into the policy, in place."""
    if method.lora:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(seed)
        layers = [name for name, part in policy.named_modules() if isinstance(part, nn.Linear)]
        inside = [name for name in layers if "lm_head" not in name]
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=inside), policy)
    else:
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(not (method.frozen and method.frozen in name))
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


class Training:
    """A method's optimizer, and what a step of it does.

    Args:
        policy: A `PI0FastPolicy` in training mode.
        trained: Its parameters that train.
        method: Anything that trains.
        terms: By name what "replay", "kl" and "craft" hold: a closure that returns a loss on the next anchors.
        heldout: The anchors that epsilon is about, of a method with `heldout`.
        importance: Of each of `trained`, of "ewc".
        lr: Learning rate, before the method's factor.
        steps: Of this training: the rate falls over them.

    Attributes:
        seconds: CPU time of each step.
        plain_seconds: What of it AdamW alone would have taken: the loss on the new task, its gradient, its clipping and
            the step. Measured in the same steps, it is comparable whatever else the machine is doing.
    """

    def __init__(
        self,
        policy: Any,
        trained: Sequence[nn.Parameter],
        method: Method,
        terms: Mapping[str, Callable[[], Tensor]],
        heldout: Any,
        importance: Sequence[Tensor],
        lr: float,
        steps: int,
    ) -> None:
        self._policy, self._method = policy, method
        self._trained: list[Tensor] = list(trained)
        self._terms, self._importance = terms, importance
        self._start = [p.detach().clone() for p in trained] if method.kind in ("l2", "ewc") or method.back else []
        rate = lr * method.rate * (LORA_RATE if method.lora else 1.0)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(self._trained, lr=rate, weight_decay=0.01)
        if method.kind == "craft":
            constraints = {
                name: Constraint(term, HIDDEN_EPSILON if name == "hidden" else method.epsilon, heldout=heldout)
                for name, term in terms.items()
            }
            optimizer = CraftOptimizer(
                optimizer,
                constraints,
                retention_every=method.every,
                total_steps=steps,
                max_grad_norm=1.0,
            )
        self.seconds, self.plain_seconds = list[float](), list[float]()
        base = optimizer.base_optimizer if isinstance(optimizer, CraftOptimizer) else optimizer
        base.register_step_pre_hook(lambda *_: self._clock(-1))
        base.register_step_post_hook(lambda *_: self._clock(1))
        self._optimizer = optimizer
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps))

    def step(self, batch: Mapping[str, Tensor]) -> float:
        """One step; returns the loss on the new task."""
        began = time.process_time()
        self.plain_seconds.append(0.0)
        self._clock(-1)
        loss, _ = self._policy.forward(batch)
        loss.backward()
        self._clock(1)
        for term in self._terms.values() if self._method.kind in ("replay", "kl") else ():
            (self._method.weight * term()).backward()  # type: ignore[no-untyped-call]
        if self._method.kind == "ewc":
            for parameter, start, weight in zip(self._trained, self._start, self._importance, strict=True):
                if parameter.grad is not None:
                    parameter.grad += self._method.weight * weight * (parameter.detach() - start)
        self._clock(-1)
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._clock(1)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._method.kind == "l2":
            self._towards_start(self._method.weight * float(self._optimizer.param_groups[0]["lr"]))
        self._schedule.step()
        self.seconds.append(time.process_time() - began)
        return float(loss.detach())

    def _clock(self, sign: int) -> None:
        """Starts, with -1, or stops the time that AdamW alone would take, too."""
        self.plain_seconds[-1] += sign * time.process_time()

    def end(self) -> None:
        """What the method does after the last step."""
        if self._method.back:
            self._towards_start(self._method.back)

    def found(self) -> dict[str, float]:
        """What the optimizer says of its constraint; nothing of other methods."""
        if not isinstance(self._optimizer, CraftOptimizer):
            return {}
        return {key: float(value) for key, value in self._optimizer.metrics.items() if isinstance(value, int | float)}

    @torch.no_grad()
    def _towards_start(self, share: float) -> None:
        torch._foreach_lerp_(self._trained, self._start, share)


def fisher(policy: Any, trained: Sequence[nn.Parameter], batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Mean square of the gradient of the policy's own loss over these batches of one frame: EWC's importance.

    Kirkpatrick et al., 2017, https://arxiv.org/abs/1612.00796, with the demonstrated actions as labels.
    """
    found = [torch.zeros_like(parameter) for parameter in trained]
    for batch in batches:
        policy.forward(batch)[0].backward()
        for total, parameter in zip(found, trained, strict=True):
            if parameter.grad is not None:
                total += parameter.grad.square() / len(batches)
                parameter.grad = None
    return found
