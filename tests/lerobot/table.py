"""A simulator for lerobot-eval and lerobot-train that costs nothing."""

import gymnasium as gym
import numpy as np
import small

STEPS = 3


class Table(gym.Env):
    """In the place of PushT: what is seen has one colour, so that a video keeps it."""

    width = 2  # of state and action
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    task, task_description = "push", "Push the T onto its place"

    def __init__(self, **_):
        self._max_episode_steps = STEPS + 1
        picture = gym.spaces.Box(0, 255, (small.IMAGE, small.IMAGE, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            pixels=picture, agent_pos=gym.spaces.Box(-1, 1, (self.width,), np.float64)
        )
        self.action_space = gym.spaces.Box(-1, 1, (self.width,), np.float32)

    def observe(self):
        color, state = int(self.np_random.integers(20, 235)), self.np_random.uniform(-1, 1, self.width)
        return {"pixels": np.full((small.IMAGE, small.IMAGE, 3), color, np.uint8), "agent_pos": state}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_number = 0
        return self.observe(), {}

    def step(self, action):
        self.step_number += 1
        done = self.step_number == STEPS
        return self.observe(), 0.0, done, False, {"is_success": done}

    def render(self):
        return np.zeros((small.IMAGE, small.IMAGE, 3), np.uint8)
