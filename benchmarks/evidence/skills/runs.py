"""One run, in a process of its own: the policy learns a task, or several in turn; what it can do is written as JSON."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from metaworld_pi0_fast import NEW_TASK, NEW_TASKS
from metaworld_pi0_fast.batches import PreparedFrames
from metaworld_pi0_fast.rollouts import run_episodes
from pi0_fast_craft import rows_of_step
from torch import Tensor, nn
from tqdm.auto import tqdm

from craft_optim.anchors import AnchorCache
from craft_optim.anchors.sampling import AnchorSampler

from . import continuous
from .methods import BATCH, Method, Training, adapted, fisher
from .setup import STRIDE, Skills, make_skills, of_tasks

__all__ = ["LOOKS_LIKE", "SCENARIOS", "Scenario", "Settings", "run"]

LOOKS_LIKE = {
    "faucet-close-v3": "faucet-open-v3",
    "window-close-v3": "window-open-v3",
    "drawer-close-v3": "drawer-open-v3",
    "handle-pull-v3": "handle-press-v3",
}
"""Of a new task the old one whose first picture is nearly the same: the instruction tells which is meant"""


@dataclass(frozen=True)
class Scenario:
    """What is learnt.

    Attributes:
        tasks: In this order.
        policy: "pi0_fast", which is shipped and knows `OLD_TASKS`; or "pi0", of continuous actions.
    """

    tasks: tuple[str, ...]
    policy: Literal["pi0_fast", "pi0"] = "pi0_fast"


SCENARIOS = {
    "button": Scenario((NEW_TASK,)),
    **{new.split("-")[0]: Scenario((new,)) for new in LOOKS_LIKE},
    "sequence": Scenario((NEW_TASK, "faucet-close-v3", "window-close-v3", "drawer-close-v3")),
    **{f"pi0-{new.split('-')[0]}": Scenario((new,), "pi0") for new in continuous.LEARNT},
}
"""By name: one more task; one whose scene looks like that of an old one; four in turn; and the second kind for pi0"""

EVERY = 25  # steps between two records of the constraint, of which the last is one
JUDGED = 512  # anchors that drift is measured on after training, at most
ACTED = 32  # held-out frames of each task on which the actions are compared
IMPORTANT = 512  # frames of EWC


@dataclass(frozen=True)
class Settings:
    """What the results depend on.

    Attributes:
        steps, lr: Of training, of each task; a method may have a factor on them.
        rollouts: Of each task that the policy knew; twice as many of those that it learnt.
        episodes: At most so many demonstrations of each task, for a quick look. None: all.
        known: At most so many of the tasks that it knew, for a quick look. None: all.
    """

    steps: int
    lr: float
    rollouts: int
    episodes: int | None = None
    known: int | None = None


def run(method: Method, scenario: str, seed: int, settings: Settings, work: Path, file: Path) -> None:
    """Trains and measures, and writes what was found to `file`.

    Args:
        method: How.
        scenario: A key of `SCENARIOS`; for the method that does not train only its policy counts.
        seed: Of the order of frames and anchors, of adapters, and of the goals.
        settings: See `Settings`.
        work: Where caches are.
        file: A JSON.
    """
    skills = make_skills(SCENARIOS[scenario].policy, work, settings.episodes, settings.known)
    found: dict[str, Any] = {"method": method.name, "scenario": scenario, "seed": seed, "settings": vars(settings)}
    bench = _Bench(skills, method, seed, settings, work / "stages" / file.stem)
    if method.kind == "before":
        able = continuous.LEARNT if SCENARIOS[scenario].policy == "pi0" else NEW_TASKS
        found["stages"] = [bench.measure(able, {})]
    else:
        tasks = SCENARIOS[scenario].tasks
        found["stages"] = [bench.stage(tasks[: number + 1]) for number in range(len(tasks))]
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")  # a kill in the middle of writing leaves nothing that looks like a run
    aside.write_text(json.dumps(found) + "\n", encoding="utf-8")
    aside.replace(file)


class _Bench:
    def __init__(self, skills: Skills, method: Method, seed: int, settings: Settings, folder: Path) -> None:
        self._skills, self._method, self._seed, self._settings = skills, method, seed, settings
        self._folder = folder
        self._steps = settings.steps * method.length
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        self._learnt: dict[str, PreparedFrames] = {}
        self._own: list[AnchorCache] = []  # of each task learnt, of the policy that had just learnt it
        self._trained: list[nn.Parameter] = []
        # What drift is measured on, the actions that are compared, and what is held: of the policy before it learns
        self._drift_on = skills.cache("all")
        self._heldout = {task: skills.cache(task) for task in skills.old}
        self._hidden = {task: skills.cache(task, "prefix") for task in skills.old}
        self._actions = {task: _actions(skills.policy, skills.known[task]) for task in skills.old}
        self._held: dict[str, AnchorCache] = {}  # by what is kept
        if method.kind in ("kl", "craft"):
            keeps = {"output": None, "hidden": "prefix"}
            kinds = list(keeps) if method.drift == "both" else [method.drift]
            self._held = {kind: skills.cache(method.anchors, keeps[kind]) for kind in kinds}

    def stage(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Learns the last of these tasks; those before it have been learnt."""
        new, policy = tasks[-1], self._skills.policy
        self._learnt[new] = self._skills.frames(new)
        policy.train()
        if not self._trained:
            self._trained = adapted(policy, self._method, self._seed)
        terms = self._terms(list(tasks[:-1]))
        heldout = None
        if self._method.heldout:
            rows = of_tasks(self._skills.old, self._skills.known)
            path = self._skills.work / "anchors" / "first" / "held-out"
            heldout = self._skills.anchors(rows, rows.heldout_indices[1::STRIDE], path)
        training = Training(
            policy,
            self._trained,
            self._method,
            terms,
            heldout,
            self._importance(tasks[:-1]),
            self._settings.lr,
            self._steps,
        )
        found = self._train(training, self._learnt[new], f"{self._method.name}, {new}, seed {self._seed}")
        alike = {new: LOOKS_LIKE[new]} if len(tasks) == 1 and new in LOOKS_LIKE else {}
        return found | self.measure(tasks, alike)

    def _train(self, training: Training, frames: PreparedFrames, title: str) -> dict[str, Any]:
        losses, constraint = list[float](), list[dict[str, float]]()
        torch.manual_seed(self._seed)
        for number in tqdm(range(self._steps), desc=title, mininterval=10):
            batch = frames.train_batch(rows_of_step(frames.train_indices, BATCH, self._seed, number))
            losses.append(training.step(batch))
            constraint.append(training.found())
        training.end()
        self._skills.policy.eval()
        found: dict[str, Any] = {"loss": fmean(losses[-50:])}
        for name in ("seconds", "plain_seconds"):
            found[name] = fmean(getattr(training, name)[1:])  # the first step makes the optimizer's state
        first = (self._steps - 1) % EVERY
        return found | ({"constraint": constraint[first::EVERY]} if constraint[0] else {})

    def _terms(self, earlier: list[str]) -> dict[str, Callable[[], Tensor]]:
        """What the method holds, by name."""
        skills, policy = self._skills, self._skills.policy
        if self._method.kind == "replay":
            known = dict(skills.known)
            if self._method.few:
                known = {task: skills.frames(task, episodes=1) for task in skills.old}
            joined = PreparedFrames.joined([*known.values(), *(self._learnt[task] for task in earlier)])
            return {"replay": _replay(policy, joined, self._seed, self._method.batch)}
        if self._method.kind not in ("kl", "craft"):
            return {}
        caches = dict(self._held)
        if earlier and self._method.joint:
            frames = PreparedFrames.joined([*skills.known.values(), *(self._learnt[task] for task in earlier)])
            path = self._folder / f"joint-{len(earlier)}"
            caches = {"output": skills.anchors(frames, frames.train_indices[::STRIDE], path)}
        elif earlier:
            frames = self._learnt[earlier[-1]]
            self._own.append(skills.anchors(frames, frames.train_indices[::STRIDE], self._folder / earlier[-1]))
            caches |= {f"stage {number}": cache for number, cache in enumerate(self._own, start=1)}
        # What was written down before an earlier task has been left since
        strict = not earlier or self._method.joint
        return {name: skills.retention(cache, self._seed, self._method.batch, strict) for name, cache in caches.items()}

    def _importance(self, earlier: Sequence[str]) -> list[Tensor]:
        if self._method.kind != "ewc":
            return []
        frames = PreparedFrames.joined([*self._skills.known.values(), *(self._learnt[task] for task in earlier)])
        rows = frames.train_indices[:: max(1, len(frames.train_indices) // IMPORTANT)]
        return fisher(self._skills.policy, self._trained, [frames.train_batch([row]) for row in rows.tolist()])

    def measure(self, new: Sequence[str], alike: Mapping[str, str]) -> dict[str, Any]:
        """What the policy can do, and how far it has moved, in many ways.

        Args:
            new: The tasks that it has been trained on, or will be.
            alike: New task -> old task whose scene looks alike: each is tried with the other's instruction, too.
        """
        skills, policy = self._skills, self._skills.policy
        policy.eval()
        few, many = self._settings.rollouts, 2 * self._settings.rollouts
        counts = dict.fromkeys(skills.old, few) | dict.fromkeys(new, many)
        found: dict[str, Any] = {"success": {task: self._succeeds(task, count) for task, count in counts.items()}}
        other = {**alike, **{old: task for task, old in alike.items()}}
        found["other_instruction"] = {scene: self._succeeds(scene, many, asked) for scene, asked in other.items()}
        retention = skills.retention(self._drift_on, self._seed, BATCH)
        found["drift"] = retention.drift(count=JUDGED)
        found["drift_heldout"] = {task: retention.drift(cache) for task, cache in self._heldout.items()}
        found["drift_hidden"] = {task: skills.retention(kept).drift() for task, kept in self._hidden.items()}
        found["actions_moved"] = {
            task: float((_actions(policy, skills.known[task]) - before).square().mean().sqrt())
            for task, before in self._actions.items()
        }
        found["heldout_ce"] = {task: frames.heldout_loss(policy) for task, frames in skills.known.items()}
        found["new_ce"] = {task: frames.heldout_loss(policy) for task, frames in self._learnt.items()}
        return found

    def _succeeds(self, scene: str, episodes: int, asked: str | None = None) -> list[bool]:
        skills = self._skills
        goals = range(episodes)
        with torch.random.fork_rng(devices=[]):  # pi0 draws the noise that it begins with
            torch.manual_seed(self._seed)
            return run_episodes(skills.policy, *skills.processors, scene, goals, seed=self._seed, asked=asked).successes


@torch.no_grad()
def _actions(policy: Any, frames: PreparedFrames) -> Tensor:
    """What the policy would do on held-out frames, normalised: `[n, chunk, action]`."""
    policy.eval()
    rows = frames.heldout_indices
    rows = rows[torch.linspace(0, len(rows) - 1, min(ACTED, len(rows))).round().long()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        chunk: Tensor = policy.predict_action_chunk(frames.train_batch(rows))
    return chunk


def _replay(policy: Any, frames: PreparedFrames, seed: int, size: int) -> Callable[[], Tensor]:
    """The policy's own loss on frames that it knows, with the actions demonstrated there; each call takes the next."""
    rows = frames.train_indices
    sampler = AnchorSampler(len(rows), size, seed)
    numbers: Iterator[int] = itertools.count()

    def loss() -> Tensor:
        found: Tensor = policy.forward(frames.train_batch(rows[sampler.indices(next(numbers))]))[0]
        return found

    return loss
