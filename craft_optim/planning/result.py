"""`Plan`: the needs of a run, as sums over the measured phases of a step."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from craft_optim._step.rules import GradientMemory, Rules
from craft_optim.planning.gpus import Blocks, Fit, processes, usable
from craft_optim.planning.phases import Pass, Phases

__all__ = ["MEMORIES", "Held", "Plan"]

Held = Literal["base", "copy", "bfloat16", "host"]

MEMORIES: tuple[GradientMemory, ...] = get_args(GradientMemory)


@dataclass(frozen=True)
class Plan:
    """Needs of a run. Sizes are bytes of one process, at the batch sizes of the plan.

    Attributes:
        phases: Memory held all the time, and besides it in each phase of a step.
        parameters: Number of parameters.
        trained: Number of parameters that the task's backward reaches.
        batch_size: Examples of the task per step.
        anchor_batch_size: Anchors per pass.
        count: Anchors in the cache.
        per_anchor: Most bytes on disk per anchor: a cache leaves padding out.
        blocks: Parameters that FSDP gathers.
        rules: Rules of the run.
        notes: Assumptions, in words.
    """

    phases: Phases
    parameters: int
    trained: int
    batch_size: int
    anchor_batch_size: int
    count: int
    per_anchor: float
    blocks: Blocks
    rules: Rules
    notes: tuple[str, ...] = ()

    @property
    def disk(self) -> int:
        """Most bytes of the cache."""
        return round(self.per_anchor * self.count)

    @property
    def persistent(self) -> int:
        """Bytes of weights, the base's state, and the task's batch."""
        return self.phases.weights + self.phases.state + self.phases.inputs

    def waiting(self, memory: GradientMemory) -> int:
        """Bytes of the task gradients while they wait for the retention gradients."""
        return {"copy": self.phases.gradients, "bfloat16": self.phases.rounded, "host": 0}[memory]

    def passed(self, which: Literal["task", "anchors"], checkpointing: bool | None = None) -> Pass | None:
        """The task's pass, or the pass over anchors; None if checkpointing cannot be switched here.

        Args:
            which: Name of the pass.
            checkpointing: True for checkpointed activations. None: as the model is.
        """
        on = self.phases.checkpointing if checkpointing is None else checkpointing
        return self.phases.passes.get((which, on))

    def peak(self, held: Held = "copy", checkpointing: bool | None = None) -> int | None:
        """The most bytes that a step holds.

        S is held all the time, G the task gradients, W the same as stored, V the trust region's copy of the trained
        parameters; passes, a look at anchors and the base's step hold beside these:

            base alone       max(S + task, S + G + step)
            with retention   max(S + task, S + W + anchors, S + W + G + V + look, S + W + G + V + step)

        V exists at the start of every run, unless `trust_region` is None. With "host" W and V are in host memory, and a
        copy of G comes back for the merge.

        Args:
            held: A `gradient_memory`, or "base" for the base optimizer's step alone.
            checkpointing: Flag as for `passed`.

        Returns:
            Bytes; None as for `passed`.
        """
        task, anchors = self.passed("task", checkpointing), self.passed("anchors", checkpointing)
        if task is None or anchors is None:
            return None
        of, gradients = self.phases, self.phases.gradients
        if held == "base":
            return self.persistent + max(task.peak, gradients + of.base_step)
        waiting, back = self.waiting(held), gradients if held == "host" else 0
        step = max(gradients + back, gradients + self.values(held) + max(of.look.peak, of.base_step))
        return self.persistent + max(task.peak, waiting + max(anchors.peak, of.question, step))

    def values(self, memory: GradientMemory) -> int:
        """Bytes of the trust region's copy of the trained parameters on their device."""
        return self.phases.trained if self.rules.trust_region is not None and memory != "host" else 0

    def cost(self, every: int, share: float = 1.0) -> float:
        """Operations of a step relative to a step of the base alone: 1 + share anchors / (every task).

        Matrix products, convolutions and attention count; the merge's memory traffic, which matters more for smaller
        batches, does not. At its start, a run also has four forwards on anchors in a step.

        Args:
            every: K, steps per pass.
            share: Anchors per pass, relative to the plan's.
        """
        task, anchors = self.passed("task"), self.passed("anchors")
        assert task is not None
        assert anchors is not None
        return 1.0 + share * anchors.flops / (every * task.flops)

    def fits(self, gib: float, memory: GradientMemory = "copy", checkpointing: bool | None = None) -> Fit | None:
        """The GPUs of `gib` GiB that are enough. Nine tenths of each count, see `Fit`.

        FSDP2 shards weights, state, gradients and their copies; each process has its own activations, gathered blocks
        and batch.
        """
        peak = self.peak(memory, checkpointing)
        if peak is None:
            return None
        of, gradients, room = self.phases, self.phases.gradients, usable(gib)
        passes = [self.passed(which, checkpointing) for which in ("task", "anchors")]
        activations = max(one.activations for one in passes if one is not None)
        there, waiting = of.weights + of.state + gradients, self.waiting(memory)
        in_step = max(self.values(memory) + of.base_step, gradients if memory == "host" else 0)
        gathered = of.inputs + self.blocks.gathered
        found = [
            processes(there + waiting, gathered + activations, gib),
            processes(there + waiting + in_step, gathered + of.look.activations, gib),
        ]
        fsdp = 1 if peak <= room else None if None in found else max(2, *(n for n in found if n is not None))
        return Fit(gib, peak <= room, peak + gradients <= room, fsdp)

    def as_dict(self, gpus: tuple[float, ...] = ()) -> dict[str, Any]:
        """The plan in the types of JSON."""
        of = self.phases
        ways = {name: on for name, on in _WAYS.items() if self.passed("task", on) is not None}
        return {
            "parameters": self.parameters,
            "trained": self.trained,
            "batch_size": self.batch_size,
            "anchor_batch_size": self.anchor_batch_size,
            "weights": of.weights,
            "gradients": of.gradients,
            "optimizer_state": of.state,
            "inputs": of.inputs,
            "base_step": of.base_step,
            "look_at_anchors": of.look.peak,
            "waiting": {memory: self.waiting(memory) for memory in MEMORIES},
            "trust_region_copy": self.values("copy"),
            "passes": {
                name: {which: asdict(found) for which in ("task", "anchors") if (found := self.passed(which, on))}
                for name, on in ways.items()
            },
            "checkpointing": of.checkpointing,
            "peaks": {name: {held: self.peak(held, on) for held in get_args(Held)} for name, on in ways.items()},
            "logits": of.logits,
            "logits_at_a_time": of.piece,
            "head_left_out": of.left_out,
            "cost": {f"{every}": self.cost(every) for every in (1, 5, 10)},
            "anchors": self.count,
            "bytes_per_anchor": self.per_anchor,
            "disk": self.disk,
            "gpus": {
                name: [asdict(fit) for gib in gpus if (fit := self.fits(gib, checkpointing=on))]
                for name, on in ways.items()
            },
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        from craft_optim.planning.table import in_words

        return in_words(self)


_WAYS = {"without checkpointing": False, "with checkpointing": True}
