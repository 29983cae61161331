"""One run: a pretrained network fine-tuned by one method, and what it can do afterwards."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .methods import METHODS, Method, Run
from .prepared import base_optimizer, prepare
from .setting import divergence, score, task_loss, teacher_logprobs

__all__ = ["Job", "fine_tune"]

Record = dict[str, str | float]


@dataclass(frozen=True)
class Job:
    """The choices that a run's outcome depends on.

    Attributes:
        setting: Of `SETTINGS`.
        method: Of `METHODS`.
        strength: Of the method; 0 where it has none.
        seed: Of pretraining, split and order.
        scale: Factor on the task loss.
        lr: Factor on the learning rate.
    """

    setting: str
    method: str
    strength: float
    seed: int
    scale: float = 1.0
    lr: float = 1.0

    @property
    def name(self) -> str:
        """Its name in file names."""
        return "-".join(
            [self.setting, self.method, *(f"{x:g}" for x in (self.strength, self.seed, self.scale, self.lr))]
        )


def fine_tune(job: Job, folder: Path, methods: Mapping[str, Method] = METHODS) -> Record:
    """Runs a job.

    Args:
        job: What to run.
        folder: Where pretrained networks are, or will be.
        methods: Those that the job may name.

    Returns:
        The job; `new` and `old`, scores on the two test sets, also those before; `chance` on the old one; and drift,
        the KL divergence from the pretrained network in nats, on all anchors and on the old test set.
    """
    prepared = prepare(job.setting, job.seed, folder)
    setting, method, model = prepared.setting, methods[job.method], prepared.model()
    base, schedule = base_optimizer(model, setting.finetune, job.lr)
    run = Run(model, base, prepared, job.strength, seed=job.seed)
    torch.manual_seed(job.seed)
    batches = setting.task.batches(setting.finetune.batch_size, job.seed)
    step = method.start(run)
    for _ in range(setting.finetune.steps):
        base.zero_grad()
        step(job.scale * task_loss(model, next(batches)))
        schedule.step()
    method.finish(run)
    return asdict(job) | {
        "new": score(model, setting.task_test, setting.metric),
        "old": score(model, setting.old_test, setting.metric),
        "new_before": prepared.new,
        "old_before": prepared.old,
        "chance": prepared.chance,
        "drift_anchors": float(divergence(teacher_logprobs(model, setting.anchors.inputs), prepared.teacher)),
        "drift_heldout": float(divergence(teacher_logprobs(model, setting.old_test.inputs), prepared.heldout)),
    }
