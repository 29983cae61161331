"""Retention without a second copy of the gradients: each is merged as autograd delivers it, and its partner freed.

When the retention gradient r_i of a tensor arrives, its task gradient t_i is there, so both are merged and t_i is
freed; r_i becomes the merged gradient. At the peak there is one more gradient than the base has: the largest.

What is not known yet at that time are the inner products over all tensors, which this step finds only at its end.

- Granularity "tensor" needs its own tensor's alone: each p_i is exact.
- Granularity "global" takes <g_t, g_r>, |g_t| and |g_r| for the projection from the last retention step.
- Both take the cap of lambda, rho |g_t| / |g_r|, from there. lambda itself follows this step's L_ret.

The first retention step only measures: it steps on the task gradients. Afterwards `.grad` holds the merged gradients,
since the task gradients are gone; for the same reason an error in the backward leaves no gradients, and a retention
gradient that is not finite leaves its own tensor alone to the task. Each tensor costs a read of the device.

One process only: the gradients of several are averaged when the last has arrived.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from craft_optim import scaling
from craft_optim.decision import Decision, Gram, Weights, cap_of, merged_norm, weights
from craft_optim.gradients import Gradients, gradients_of, put
from craft_optim.retention_step import RetentionStep
from craft_optim.stash import Stash
from craft_optim.surgery import GradientPairs

__all__ = ["StreamingStep"]

# The inner products of the last retention step, over all tensors.
_LAST = ("craft_last_tt", "craft_last_rr", "craft_last_tr")

_TASK_ALONE = Weights(1.0, 0.0, False)


class StreamingStep(RetentionStep):
    """See the module."""

    @staticmethod
    def initial_state() -> dict[str, float]:
        """What is kept from one retention step to the next."""
        return dict.fromkeys(_LAST, 0.0)

    @torch.no_grad()
    def merge(self) -> None:
        """Runs the retention pass; leaves the merged gradients in `.grad`.

        Raises:
            ValueError: If several processes train the model.
            RuntimeError: If the retention loss reaches no parameter, or a gradient arrives in parts.
        """
        if self._layout is not None:
            raise ValueError(
                f'`gradient_memory="streaming"` is for one process. Found {self._layout.size} that train one model. '
                'Take gradient_memory="bfloat16" or "host".'
            )
        (run,) = self._passes
        task = gradients_of(self._parameters)
        self._stash = Stash(task, "streaming")
        last = Gram(*(run.state[key] for key in _LAST))
        with record_function("CraftOptimizer.retention"), run.isolated():
            loss, scale = run.scaled_loss()
            value = loss.item() / scale
            if math.isfinite(value):
                lam = run.state["craft_lambda"]
                if last.rr > 0.0:
                    lam = run.updated(value, cap_of(last, self._rules.rho)).multiplier
                arrivals = _Arrivals(task, self._rule(last, lam, value), scale)
                self._stash = Stash([None] * len(task), "streaming")  # an error from here on leaves no gradients
                arrivals.run(loss, self._parameters)
                self._stash = Stash(arrivals.gradients, "streaming")
        run.note_position()
        if not math.isfinite(value):
            self._stash.give_back(self._parameters)
            self._note_skip([value], [Gram(last.tt, math.nan, math.nan)])
            return

        run.check_reached([g if i in arrivals.grams else None for i, g in enumerate(arrivals.gradients)])
        grams, chosen = arrivals.complete()
        total = Gram(*(math.fsum(column) for column in zip(*((g.tt, g.rr, g.tr) for g in grams), strict=True)))
        norm = merged_norm(grams, chosen)
        cap = self._rules.max_grad_norm
        clipped = cap is not None and norm > cap
        if cap is not None and clipped:
            torch._foreach_mul_([g for g in arrivals.gradients if g is not None], cap / norm)
            norm = cap
        self._stash = Stash(arrivals.gradients, "streaming")
        put(self._parameters, arrivals.gradients)
        if arrivals.spoilt:
            self._note_skip([value], [Gram(total.tt, math.inf, math.inf)], f" for {arrivals.spoilt} tensors")
            if run.float16:
                run.state |= scaling.shrunk(run.state)
        elif run.float16:
            run.state |= scaling.grown(run.state)
        if total.finite:
            run.state |= dict(zip(_LAST, (total.tt, total.rr, total.tr), strict=True))
        self.reached = {run.constraint.name: [gram.rr > 0.0 for gram in grams]}

        blocks = [total] if self._rules.granularity == "global" else grams
        conflict = sum(gram.cos < self._rules.conflict_threshold for gram in blocks) / len(blocks)
        projected = sum(c.projected for c in chosen) / len(chosen)
        self._report([value], [total], [Decision(chosen, norm, conflict, projected, clipped)])

    def _rule(self, last: Gram, lam: float, value: float) -> Callable[[Gram], Weights]:
        """The coefficients of a tensor with these inner products."""
        rules, (run,) = self._rules, self._passes

        def decide(gram: Gram) -> Weights:
            return weights(
                gram,
                lam=lam,
                project=run.may_project(rules.projection, value),
                conflict_threshold=rules.conflict_threshold,
                merge=rules.merge,
            )

        if last.rr == 0.0:
            return lambda gram: _TASK_ALONE
        if rules.granularity == "tensor":
            return decide
        of_all = decide(last)
        return lambda gram: of_all


class _Arrivals:
    """Retention gradients as they arrive in one backward.

    Args:
        gradients: The task gradients; this takes them over.
        rule: From a tensor's inner products to its coefficients.
        scale: Of the loss.

    Attributes:
        gradients: Merged where a retention gradient has arrived, else as they were.
        grams: Of each tensor that was merged, the inner products.
        spoilt: Number of retention gradients that were not finite, and not merged.
    """

    def __init__(self, gradients: Gradients, rule: Callable[[Gram], Weights], scale: float) -> None:
        self.gradients = gradients
        self.grams: dict[int, Gram] = {}
        self.spoilt = 0
        self._chosen: dict[int, Weights] = {}
        self._rule, self._scale = rule, scale

    def run(self, loss: Tensor, parameters: list[Tensor]) -> None:
        """The backward; every `.grad` is None before and after it."""
        handles = [
            p.register_post_accumulate_grad_hook(partial(self._merge, i))  # type: ignore[no-untyped-call]
            for i, p in enumerate(parameters)
            if p.requires_grad
        ]
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _merge(self, i: int, p: Tensor) -> None:
        r, p.grad = p.grad, None
        if i in self.grams:
            raise RuntimeError(
                f"The retention gradient of a tensor of shape {tuple(p.shape)} arrived in parts, as it does under "
                "reentrant activation checkpointing, and was merged with the first. Checkpoint with "
                'use_reentrant=False, or take another `gradient_memory` than "streaming".'
            )
        pairs = GradientPairs([self.gradients[i]], [r])
        gram = pairs.inner_products()[0].unscaled(self._scale).gram()
        if not gram.finite:
            self.spoilt += 1
            self.grams[i], self._chosen[i] = Gram(gram.tt, 0.0, 0.0), _TASK_ALONE
            return
        self.grams[i], self._chosen[i] = gram, self._rule(gram)
        (self.gradients[i],) = pairs.merge_([self._chosen[i].of_scaled(self._scale)])

    def complete(self) -> tuple[list[Gram], list[Weights]]:
        """Inner products and coefficients of all tensors, after those without a retention gradient are scaled, too."""
        alone: Gradients = [None if i in self.grams else g for i, g in enumerate(self.gradients)]
        products, _ = GradientPairs(alone, [None] * len(alone), range(len(alone))).inner_products()
        for i, g in enumerate(alone):
            if i not in self.grams:
                self.grams[i] = products.gram(i)
                self._chosen[i] = self._rule(self.grams[i])
                self.gradients[i] = g if g is None or self._chosen[i].task == 1.0 else g * self._chosen[i].task
        return [self.grams[i] for i in range(len(alone))], [self._chosen[i] for i in range(len(alone))]
