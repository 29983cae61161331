"""A MetaWorld task as the policy sees it: one 64-pixel picture, four state numbers, four action numbers.

Recording and rollouts both go through this file, so that a policy is tested on the pictures it was
trained on. MetaWorld and MuJoCo are imported on first use only: they are not needed to load data or to
train.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

IMAGE_SIZE = 64
"""Side of the square picture the policy sees, in pixels."""

STATE_NAMES = ("x", "y", "z", "gripper")
"""Position of the hand in metres, opening of the gripper in [0, 1]."""

ACTION_NAMES = ("dx", "dy", "dz", "gripper")
"""Displacement of the hand in centimetres per step, effort of the gripper; all in [-1, 1]."""

FPS = 80
"""Control steps per simulated second."""

GL_BACKENDS = ("egl", "osmesa", "glfw")

GL_HELP = (
    "MuJoCo cannot draw pictures on this machine: no OpenGL back end works (egl, osmesa, glfw).\n"
    "Install one of them, for instance on Debian or Ubuntu:\n"
    "    apt-get install libegl1 libgl1-mesa-dri     # egl: GPU, or Mesa's software renderer\n"
    "    apt-get install libosmesa6                  # osmesa: software only\n"
    "and leave MUJOCO_GL unset, or set it to the one you installed. Only the rollouts need it."
)

# Rendering at twice the size and averaging costs nothing on a software renderer (its time goes into
# vertices, not pixels), and gives the policy the sub-pixel positions that MuJoCo's own anti-aliasing
# would give at twice the time.
_SUPERSAMPLING = 2

_GL_PROBE = """
import mujoco
xml = "<mujoco><worldbody><light pos='0 0 3'/><geom size='1'/></worldbody></mujoco>"
model = mujoco.MjModel.from_xml_string(xml)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 16, 16)
renderer.update_scene(data)
assert renderer.render().max() > 0
print("rendered", flush=True)
import os
os._exit(0)
"""


def _with_gl(environ: dict[str, str], backend: str) -> dict[str, str]:
    environ = dict(environ, MUJOCO_GL=backend)
    environ.pop("PYOPENGL_PLATFORM", None)
    if backend in ("egl", "osmesa"):
        environ["PYOPENGL_PLATFORM"] = backend
    return environ


@functools.cache
def gl_backend() -> str | None:
    """Finds an OpenGL back end that MuJoCo can really draw with.

    Each candidate is tried in a process of its own, because the choice cannot be undone once `mujoco` is
    imported and a broken driver may abort the process. `MUJOCO_GL`, when set, is the only candidate.

    Returns:
        `"egl"`, `"osmesa"`, `"glfw"` or what `MUJOCO_GL` says; `None` when nothing works (`GL_HELP` tells
        the user what to install).
    """
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    for backend in (chosen,) if chosen else GL_BACKENDS:
        try:
            probe = subprocess.run(
                [sys.executable, "-c", _GL_PROBE],
                env=_with_gl(dict(os.environ), backend),
                capture_output=True,
                timeout=120,
                check=False,
            )
        except subprocess.TimeoutExpired:
            continue
        if b"rendered" in probe.stdout:
            return backend
    return None


def use_gl(backend: str | None = None) -> str:
    """Points this process, and those it starts, at an OpenGL back end.

    MuJoCo chooses its back end when it is imported, so this must come first.

    Args:
        backend: What `gl_backend()` returned; `None` looks for one.

    Returns:
        The back end in use.

    Raises:
        RuntimeError: No back end works; the message says what to install.
    """
    backend = backend or gl_backend()
    if backend is None:
        raise RuntimeError(GL_HELP)
    environ = _with_gl(dict(os.environ), backend)
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        if name in environ:
            os.environ[name] = environ[name]
        else:
            os.environ.pop(name, None)
    return backend


def instruction(task: str) -> str:
    """The sentence that tells a policy to do `task`: lerobot's own wording.

    Args:
        task: A MetaWorld task name, for instance `"drawer-open-v3"`.

    Raises:
        ValueError: lerobot knows no such task.
    """
    descriptions = _task_descriptions()
    if task not in descriptions:
        raise ValueError(f"Unknown `task`: {task!r}. MetaWorld's tasks are {', '.join(sorted(descriptions))}.")
    return descriptions[task]


def short(task: str) -> str:
    """A task's name without its version.

    Example:
        >>> short("drawer-open-v3")
        'drawer-open'
    """
    return task.rsplit("-v", 1)[0]


@functools.cache
def _task_descriptions() -> dict[str, str]:
    # Read from lerobot's file, not imported from its module: that would import mujoco, and fix its back end.
    text = (importlib.resources.files("lerobot") / "envs" / "metaworld_config.json").read_text(encoding="utf-8")
    return dict(json.loads(text)["TASK_DESCRIPTIONS"])


class Goals:
    """Fifty goal positions of one task, drawn from a seed.

    Recording and rollouts use different seeds, hence different goals.

    Args:
        task: A MetaWorld task name.
        seed: Seed of the draw.
    """

    def __init__(self, task: str, seed: int) -> None:
        instruction(task)  # a readable error for a misspelt name
        use_gl()
        import metaworld

        benchmark = metaworld.MT1(task, seed=seed)
        self.task = task
        self.environment_class: Any = benchmark.train_classes[task]
        self._tasks = benchmark.train_tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> Any:
        return self._tasks[index % len(self._tasks)]


class Environment:
    """One simulated robot and one task.

    Attributes:
        observation: MetaWorld's full observation of 39 numbers; only the scripted expert may look at it.
        success: Whether the task has been solved since the last `reset`.
    """

    def __init__(self, goals: Goals) -> None:
        self.goals = goals
        self.env: Any = goals.environment_class()
        model = self.env.model
        model.cam_pos[2] = [
            0.75,
            0.075,
            0.7,
        ]  # lerobot's own view of MetaWorld: camera "corner2", moved closer
        # Shadows, reflections and multi-sampling take nine tenths of a software renderer's time.
        model.light_castshadow[:] = 0
        model.mat_reflectance[:] = 0
        model.vis.quality.offsamples = 0
        self.observation: npt.NDArray[np.float64] = np.zeros(39)
        self.success = False

    def reset(self, goal: int) -> None:
        """Starts an episode with goal number `goal`."""
        self.env.set_task(self.goals[goal])
        self.observation, _ = self.env.reset()
        self.success = False

    @property
    def state(self) -> npt.NDArray[np.float32]:
        """What the policy may know of the robot: see `STATE_NAMES`."""
        return self.observation[: len(STATE_NAMES)].astype(np.float32)

    def step(self, action: npt.ArrayLike) -> None:
        """Executes one action of four numbers, clipped to [-1, 1]."""
        clipped = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        self.observation, _, _, _, info = self.env.step(clipped)
        self.success = self.success or bool(info["success"] > 0)


class Camera:
    """Draws environments of one task. Opening a renderer takes half a second, so all of them share one.

    Args:
        environment: Any of the environments to be drawn (they have the same meshes).
        size: Side of the square picture, in pixels.
    """

    def __init__(self, environment: Environment, size: int = IMAGE_SIZE) -> None:
        import mujoco

        side = size * _SUPERSAMPLING
        self.size = size
        self._renderer = mujoco.Renderer(environment.env.model, side, side)

    def picture(self, environment: Environment) -> npt.NDArray[np.uint8]:
        """One picture of shape `(size, size, 3)`, the right way up."""
        self._renderer.update_scene(environment.env.data, camera="corner2")
        pixels = np.flip(self._renderer.render(), (0, 1))  # this camera hangs upside down
        blocks = pixels.reshape(self.size, _SUPERSAMPLING, self.size, _SUPERSAMPLING, 3)
        picture: npt.NDArray[np.uint8] = np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)
        return picture

    def pictures(self, environments: Sequence[Environment]) -> npt.NDArray[np.uint8]:
        """Pictures of several environments, of shape `(n, size, size, 3)`."""
        return np.stack([self.picture(environment) for environment in environments])

    def close(self) -> None:
        """Frees the OpenGL context."""
        self._renderer.close()


def expert(task: str) -> Any:
    """MetaWorld's scripted policy for `task`; its `get_action(environment.observation)` returns an action."""
    from metaworld.policies import ENV_POLICY_MAP

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ENV_POLICY_MAP[task]()
