"""How often a policy solves a task, in the simulator, on goals that no demonstration shows.

The episodes of one call are shared between worker processes. Inside a worker they advance in lockstep, so
that one batched decoding serves all of them: `n_action_steps` actions for each.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from .demonstrations import CAMERA_KEY, RECORDING_SEED, STATE_KEY
from .environment import GL_HELP, Camera, Environment, Goals, gl_backend, instruction, use_gl
from .policy import load_policy, make_processors, save_policy

__all__ = ["GL_HELP", "RolloutPool", "Rollouts", "gl_backend", "run_episodes"]

HELDOUT_SEED = 1000
"""Added to the seed of a call, so that its goals are never those of the demonstrations."""

FILM_SIZE = 192


@dataclass
class Rollouts:
    """Outcome of the episodes of one policy on one task.

    Attributes:
        successes: One boolean per episode, in the order of the goals.
        steps: Environment steps each episode took; `max_steps` where it failed.
        film: Pictures of the first episode, uint8 `(n, height, width, 3)`, when asked for.
    """

    successes: list[bool]
    steps: list[int]
    film: npt.NDArray[np.uint8] | None = None

    @property
    def rate(self) -> float:
        """Fraction of episodes that succeeded."""
        return sum(self.successes) / len(self.successes)


def run_episodes(
    policy: Any,
    preprocessor: Any,
    postprocessor: Any,
    task: str,
    goals: Sequence[int],
    seed: int = 0,
    max_steps: int = 200,
    film_stride: int = 0,
    asked: str | None = None,
    watch: Callable[[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.float32]], object] | None = None,
) -> Rollouts:
    """Runs one episode per goal, in this process.

    Args:
        policy: A `PI0FastPolicy`.
        preprocessor: Its preprocessor.
        postprocessor: Its postprocessor.
        task: A MetaWorld task name.
        goals: Numbers of the goals, 0 to 49.
        seed: Seed of the goals.
        max_steps: An episode that has not succeeded by then has failed.
        film_stride: Film the first episode, one picture every so many steps; 0 for no film.
        asked: The task whose instruction the policy is given; None: `task`. Success is that of `task`.
        watch: Called with what the policy saw, pictures `[n, size, size, 3]` and states `[n, 4]`, and with the actions
            `[n, chunk, 4]` that it chose for the episodes that still run.

    Returns:
        The outcome. The same arguments give the same outcome on the same machine.
    """
    import torch

    if seed + HELDOUT_SEED == RECORDING_SEED:
        raise ValueError(f"`seed` must not be {seed}: its goals are those of the demonstrations. Take another.")
    policy.eval()
    supply = Goals(task, seed + HELDOUT_SEED)
    environments = [Environment(supply) for _ in goals]
    for environment, goal in zip(environments, goals, strict=True):
        environment.reset(goal)
    camera = Camera(environments[0])
    film_camera = Camera(environments[0], FILM_SIZE) if film_stride else None
    film: list[npt.NDArray[np.uint8]] = []
    steps = [max_steps] * len(goals)
    active = list(range(len(goals)))
    time = 0
    while active and time < max_steps:
        pictures = camera.pictures([environments[i] for i in active])
        states = np.stack([environments[i].state for i in active])
        observation = {
            CAMERA_KEY: torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0,
            STATE_KEY: torch.from_numpy(states),
            "task": [instruction(asked or task)] * len(active),
        }
        with torch.no_grad():
            chunk = postprocessor(policy.predict_action_chunk(preprocessor(observation)))
        if watch is not None:
            watch(pictures, states, chunk.numpy())
        actions = dict(zip(active, chunk.numpy(), strict=True))
        for offset in range(min(policy.config.n_action_steps, max_steps - time)):
            for i in list(active):
                if i == 0 and film_camera is not None and (time + offset) % film_stride == 0:
                    film.append(film_camera.picture(environments[0]))
                environments[i].step(actions[i][offset])
                if environments[i].success:
                    steps[i] = time + offset + 1
                    active.remove(i)
        time += policy.config.n_action_steps
    if film_camera is not None:
        film.append(film_camera.picture(environments[0]))
        film_camera.close()
    camera.close()
    return Rollouts(
        successes=[environment.success for environment in environments],
        steps=steps,
        film=np.stack(film) if film else None,
    )


class RolloutPool:
    """Worker processes that measure policies. They start slowly, so keep the pool for a whole run.

    Args:
        workers: Number of processes; each runs on one thread.

    Raises:
        RuntimeError: MuJoCo cannot draw pictures here. Ask `gl_backend()` first if rollouts are optional.

    Example:
        >>> with RolloutPool() as pool:  # doctest: +SKIP
        ...     print(pool.run(policy, processors, "drawer-open-v3", episodes=20).rate)
    """

    def __init__(self, workers: int = 2) -> None:
        if workers < 1:
            raise ValueError(f"`workers` must be at least 1. Found {workers}.")
        self.workers = workers
        self._executor = ProcessPoolExecutor(
            workers, mp_context=_context(), initializer=_start_worker, initargs=(use_gl(),)
        )
        # Start the workers at once: they import their libraries while the caller trains.
        self._started = [self._executor.submit(os.getpid) for _ in range(workers)]

    def run(
        self,
        policy: Any,
        processors: tuple[Any, Any],
        task: str,
        episodes: int = 20,
        seed: int = 0,
        max_steps: int = 200,
        film_stride: int = 0,
    ) -> Rollouts:
        """Runs `episodes` episodes on as many held-out goals, shared between the workers; see `run_episodes`.

        Args:
            policy: A `PI0FastPolicy`; workers get a copy of its weights.
            processors: Its pre- and postprocessor.
            task: A MetaWorld task name.
            episodes: At most 50, the number of goals that a seed gives.
            seed: Seed of the goals.
            max_steps: Longest episode.
            film_stride: Film the first episode, one picture every so many steps; 0 for no film.
        """
        if not 1 <= episodes <= 50:
            raise ValueError(f"`episodes` must lie in 1 to 50, the goals of one seed. Found {episodes}.")
        with tempfile.TemporaryDirectory() as folder:
            save_policy(policy, folder, processors)
            shares = [list(range(first, episodes, self.workers)) for first in range(self.workers)]
            jobs: list[Future[Rollouts]] = [
                self._executor.submit(
                    _run_in_worker, folder, task, share, seed, max_steps, film_stride if 0 in share else 0
                )
                for share in shares
                if share
            ]
            results = [job.result() for job in jobs]
        successes, steps = [False] * episodes, [max_steps] * episodes
        for share, result in zip(shares, results, strict=False):
            for goal, success, length in zip(share, result.successes, result.steps, strict=True):
                successes[goal], steps[goal] = success, length
        return Rollouts(successes, steps, results[0].film)

    def close(self) -> None:
        """Ends the workers."""
        self._executor.shutdown(cancel_futures=True)

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _context() -> BaseContext:
    """New processes; where one can, forks of one that has imported what takes them seconds."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["lerobot.policies.pi0_fast.modeling_pi0_fast", "lerobot.processor"])
    return context


def _start_worker(backend: str) -> None:
    use_gl(backend)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def _run_in_worker(folder: str, task: str, goals: list[int], seed: int, max_steps: int, film_stride: int) -> Rollouts:
    policy = load_policy(folder, device="cpu")
    preprocessor, postprocessor = make_processors(policy, path=folder)
    return run_episodes(policy, preprocessor, postprocessor, task, goals, seed, max_steps, film_stride)
