"""One run of the benchmark: the cost of its steps, its training, and what the policy can do and has kept afterwards."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pi0_fast_craft as craft
import torch
from metaworld_pi0_fast import ASSETS, NEW_TASK, OLD_TASK
from metaworld_pi0_fast.policy import load_policy, make_processors, save_policy
from metaworld_pi0_fast.rollouts import RolloutPool
from retention_budget import OF_LAST, in_turns, whole_periods
from torch import Tensor
from tqdm.auto import tqdm

from craft_optim.anchors.sampling import AnchorSampler

from .methods import Method, Step, arguments, make_step

__all__ = ["Bench"]

PLAIN = Method("plain")
KINDS = tuple(craft.EPSILON)
"""Kinds of drift: "logits" and "hidden"."""
PLAIN_EVERY = 10  # steps of CraftOptimizer to a step of plain AdamW, when their costs are compared


class Bench:
    """The policy, both tasks and the anchors of `pi0_fast_craft`, loaded once for all runs.

    A context: its rollout processes end with it.

    Args:
        work: Folder of the anchors and of what runs leave.
        steps: Fine-tuning steps.
        rounds: How many rounds measure the cost of a step; see `retention_budget.in_turns`.
        rollouts: Episodes per task and run; 0 for none.
        episodes: Only the first so many demonstrations of each task.
        workers: Rollout processes.

    Raises:
        RuntimeError: There are rollouts to make, and MuJoCo cannot draw pictures here.
    """

    def __init__(
        self, work: Path, steps: int, rounds: int, rollouts: int, episodes: int | None = None, workers: int = 2
    ) -> None:
        self._work, self._steps, self._rounds, self._rollouts = work, steps, rounds, rollouts
        self._pool = RolloutPool(workers) if rollouts else None
        torch.set_num_threads(1)
        self.policy = load_policy(ASSETS / "pretrained", device="cpu")
        self.processors = make_processors(self.policy, path=ASSETS / "pretrained")
        flags = [f"--dataset.episodes={episodes}"] if episodes else []
        of_kind = {kind: craft.parse([*flags, f"--retention={kind}"]) for kind in KINDS}
        self.old, self.new = (
            craft.load_task(None, task, self.policy, self.processors[0], of_kind["logits"], ASSETS)
            for task in (OLD_TASK, NEW_TASK)
        )
        rows = {"anchors": self.old.frames.train_indices, "heldout": self.old.frames.heldout_indices}
        self.caches = {
            kind: {
                name: craft.anchor(self.policy, self.old, of_name, work / "anchors" / kind / name, args)
                for name, of_name in rows.items()
            }
            for kind, args in of_kind.items()
        }
        half = len(rows["heldout"]) // 2  # neighbours are alike: the halves are of other episodes
        halves = {"steering": rows["heldout"][:half], "judged": rows["heldout"][half:]}
        self.halves = {
            name: craft.anchor(self.policy, self.old, of_name, work / "anchors" / "logits" / name, of_kind["logits"])
            for name, of_name in halves.items()
        }
        self._pretrained = copy.deepcopy(self.policy.state_dict())

    def run(self, method: Method, seed: int, path: Path) -> None:
        """Measures what a step costs, trains, measures what has become of the policy, and writes all of it as JSON.

        The weights go to `work/policies`. All methods of a seed see the same frames of the new task in the same order,
        those with anchors also the same anchors, and are tried on the same goals, which no other seed has.
        """
        found: dict[str, Any] = {"method": method.name, "seed": seed}
        self.policy.load_state_dict(self._pretrained)
        if method.kind != "pretrained":
            if method.is_craft:  # its steps are not alike: what counts is the whole run
                losses, cost = self._train_timed(method, seed)
                found["costs"] = [cost]
            else:
                found["costs"] = self._costs(method, seed)
                losses = self._train(method, seed)
            found["loss"] = fmean(losses[-OF_LAST:])
            save_policy(self.policy, self._work / "policies" / path.stem, self.processors)
        found |= self._measure(seed)
        aside = path.with_suffix(".part")  # a kill in the middle of writing leaves nothing that looks like a run
        aside.write_text(json.dumps(found) + "\n", encoding="utf-8")
        aside.replace(path)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *of_error: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def _batch(self, seed: int, number: int) -> dict[str, Tensor]:
        rows = craft.rows_of_step(self.new.frames.train_indices, 16, seed, number)
        return self.new.frames.train_batch(rows)

    def _term(self, method: Method, policy: Any, seed: int, args: argparse.Namespace) -> Any:
        """The closure that the method reads anchors with: the same ones, whatever it is."""
        if method.kind == "plain":
            return None
        if method.kind != "replay":
            return craft.retention_of(policy, self.caches[args.retention]["anchors"], args, seed)
        rows = self.old.frames.train_indices
        return replay(policy, self.old.frames, rows, AnchorSampler(len(rows), args.anchor_batch_size, seed))

    def _step(self, method: Method, policy: Any, seed: int) -> Step:
        args = arguments(method, self._steps)
        heldout = self.halves["steering"] if method.heldout else None
        return make_step(method, policy, self._term(method, policy, seed, args), args, heldout)

    def _train(self, method: Method, seed: int) -> list[float]:
        torch.manual_seed(seed)
        self.policy.train()
        step = self._step(method, self.policy, seed)
        numbers = tqdm(range(self._steps), desc=f"{method.name} (seed {seed})", mininterval=10)
        losses = [step(number, self._batch(seed, number)) for number in numbers]
        self.policy.eval()
        return losses

    def _train_timed(self, method: Method, seed: int) -> tuple[list[float], float]:
        """As `_train`; and the CPU time of its steps as a multiple of plain AdamW's, which makes one in ten of them.

        The first step of both is not counted: it makes the optimizer's state.
        """
        plain = self._step(PLAIN, copy.deepcopy(self.policy).train(), seed)
        ours, theirs = list[float](), list[float]()

        def timed(step: Step, number: int, into: list[float]) -> float:
            batch = self._batch(seed, number)
            began = time.process_time()
            loss = step(number, batch)
            into.append(time.process_time() - began)
            return loss

        torch.manual_seed(seed)
        self.policy.train()
        step, losses = self._step(method, self.policy, seed), []
        for number in tqdm(range(self._steps), desc=f"{method.name} (seed {seed})", mininterval=10):
            losses.append(timed(step, number, ours))
            if number == 0 or number % PLAIN_EVERY == 1:
                with torch.random.fork_rng(devices=[]):  # what the run draws is what it would draw without this
                    timed(plain, number, theirs)
        self.policy.eval()
        return losses, fmean(ours[1:]) / fmean(theirs[1:])

    def _costs(self, method: Method, seed: int) -> list[float]:
        """CPU time of a training step as a multiple of plain AdamW's, of each round."""

        def steps(which: Method) -> Callable[[int], object]:
            step = self._step(which, copy.deepcopy(self.policy).train(), seed)
            return lambda number: step(number, batches[number])

        batches: dict[int, dict[str, Tensor]] = {}

        def before(number: int) -> None:
            batches.clear()
            batches[number] = self._batch(seed, number)

        return in_turns(steps(method), steps(PLAIN), whole_periods(int(method.every)), self._rounds, before)

    def _measure(self, seed: int) -> dict[str, Any]:
        """Success on both tasks, cross-entropy on held-out frames of both, drift in both kinds."""
        found: dict[str, Any] = {}
        for name, task in (("old", self.old), ("new", self.new)):
            found[f"{name}_ce"] = task.frames.heldout_loss(self.policy)
            if self._pool is not None:
                made = self._pool.run(self.policy, self.processors, task.name, episodes=self._rollouts, seed=seed)
                found[f"{name}_success"] = made.successes
        for kind, caches in self.caches.items():
            retention = craft.retention_of(self.policy, caches["anchors"], craft.parse([f"--retention={kind}"]), seed)
            found |= {f"drift_{kind}_{name}": retention.drift(cache, batch_size=64) for name, cache in caches.items()}
            if kind == "logits":
                found["drift_logits_judged"] = retention.drift(self.halves["judged"], batch_size=64)
        return found


def replay(policy: Any, frames: Any, rows: Tensor, sampler: AnchorSampler) -> Callable[[], Tensor]:
    """The policy's own loss on frames that it knows, with the actions demonstrated there; each call takes the next.

    Args:
        policy: A `PI0FastPolicy`.
        frames: `PreparedFrames` of the old task.
        rows: Which of them are the anchors, in the cache's order.
        sampler: What a retention closure with its seed draws from the cache.
    """
    position = 0

    def loss() -> Tensor:
        nonlocal position
        batch = frames.train_batch(rows[sampler.indices(position)])
        position += 1
        found: Tensor = policy.forward(batch)[0]
        return found

    return loss
