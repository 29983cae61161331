"""Methods that are compared: a name for each, and one training step of it. Baselines are written out plainly here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pi0_fast_craft as craft
import torch
from six_experiments import EPSILON
from torch import Tensor

from craft_optim import CraftOptimizer

__all__ = ["METHODS", "Method", "Step", "arguments", "make_step", "penalised_step"]

Step = Callable[[int, dict[str, Tensor]], float]
"""(number of the step, batch of the new task) -> loss on the new task"""

LABELS = {
    "pretrained": "before",
    "plain": "AdamW",
    "replay": "replay with labels",
    "kl": "KL, lambda {strength:g}",
    "logits": "CRaFT, logits, epsilon {strength:g}",
    "hidden": "CRaFT, hidden states, epsilon {strength:g}",
}


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        kind: A key of `LABELS`. "pretrained" is not trained, "plain" is AdamW, "replay" and "kl" add a term to the
            loss, "logits" and "hidden" are CraftOptimizer with anchors of that kind.
        every: Anchors are looked at on every so many steps; 0 for never. "auto" for CraftOptimizer alone.
        strength: Weight of the added term, or epsilon; 0 where there is neither.
        heldout: True if epsilon is the drift on held-out frames; "logits" alone.
    """

    kind: str
    every: int | Literal["auto"] = 0
    strength: float = 0.0
    heldout: bool = False

    @property
    def name(self) -> str:
        """Its name in file names; the epsilon of `six_experiments` has none."""
        usual = EPSILON.get(self.kind, 1.0)
        strength = [f"{self.strength:g}"] if self.kind == "kl" or (self.every and self.strength != usual) else []
        every = [f"every-{self.every}"] if self.every else []
        return "-".join([self.kind, *strength, *every, *["heldout"] * self.heldout])

    @property
    def label(self) -> str:
        """Its name for people, without `every`."""
        return LABELS[self.kind].format(strength=self.strength) + " held-out" * self.heldout

    @property
    def is_craft(self) -> bool:
        """True for CraftOptimizer; `strength` is epsilon then."""
        return self.kind in craft.EPSILON


METHODS = (
    Method("pretrained"),
    Method("plain"),
    *(Method("replay", every, 1.0) for every in (1, 5)),
    *(Method("kl", every, weight) for weight in (0.1, 1.0, 10.0) for every in (1, 5)),
    *(Method("logits", every, EPSILON["logits"]) for every in (1, 5, "auto")),
    *(Method("logits", 1, epsilon) for epsilon in (0.05, 0.1)),
    Method("logits", "auto", 0.05),
    Method("logits", "auto", 0.2, heldout=True),
    *(Method("hidden", every, EPSILON["hidden"]) for every in (1, 5)),
)
"""All methods, in the order of the tables; a seed's runs are made in it, too."""


def arguments(method: Method, steps: int) -> argparse.Namespace:
    """The command line of `pi0_fast_craft` for a run of this method; all that is not said here is its default."""
    flags = [f"--steps={steps}"]
    if method.is_craft:
        flags += [f"--retention={method.kind}", f"--epsilon={method.strength}", f"--retention-every={method.every}"]
    return craft.parse(flags)


def make_step(method: Method, policy: Any, term: Any, args: argparse.Namespace, heldout: Any = None) -> Step:
    """A new optimizer for `policy`, and the training step that it makes.

    Args:
        method: Anything that trains.
        policy: A `PI0FastPolicy` in training mode.
        term: The retention closure, or the loss of replay; None for "plain".
        args: As `arguments` returns them.
        heldout: The anchors that epsilon is about, of a method with `heldout`.
    """
    if method.every != "auto" and method.kind in ("replay", "kl"):
        state = craft.make_optimizer(policy, "adamw", None, args)
        return penalised_step(policy, term, method.strength, method.every, *state)
    state = craft.make_optimizer(policy, "craft" if method.is_craft else "adamw", term, args)
    if method.heldout:
        state = with_heldout(state[0], heldout, args)

    def step(number: int, batch: dict[str, Tensor]) -> float:
        return float(craft.train_step(policy, batch, *state).detach())

    return step


def with_heldout(optimizer: Any, heldout: Any, args: argparse.Namespace) -> tuple[CraftOptimizer, Any]:
    """The same optimizer and schedule, but epsilon is the drift on other anchors.

    Args:
        optimizer: A `CraftOptimizer` that has not stepped.
        heldout: The anchors.
        args: As `arguments` returns them.
    """
    settings = {"epsilon": args.epsilon, "heldout": heldout, **vars(optimizer.rules)}
    ours = CraftOptimizer(optimizer.base_optimizer, optimizer.retention_closure, **settings)
    return ours, torch.optim.lr_scheduler.LambdaLR(ours, craft.warmup_cosine(args.steps))


def penalised_step(
    policy: Any, term: Callable[[], Tensor], weight: float, every: int, optimizer: torch.optim.Optimizer, scheduler: Any
) -> Step:
    """`(loss + weight * term()).backward()`, and what else `pi0_fast_craft.train_step` does.

    On every K-th step alone the term counts K-fold: its gradient, averaged over steps, is that of K = 1, so that a
    weight means the same objective at each K. CraftOptimizer's cap `rho` is K times as high for the same reason.

    Args:
        policy: A `PI0FastPolicy`.
        term: The loss to add; each call looks at the next anchors.
        weight: Of the term, at K = 1.
        every: K.
        optimizer: Of the policy's parameters.
        scheduler: Of its learning rate.
    """

    def step(number: int, batch: dict[str, Tensor]) -> float:
        loss, _ = policy.forward(batch)
        total = loss + every * weight * term() if number % every == 0 else loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        return float(loss.detach())

    return step
