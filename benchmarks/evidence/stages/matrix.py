"""Success on every task after every stage of training, and measures of what was forgotten.

R[i, j] is the success rate on task j after stage i; the first row is the policy before, if it was evaluated, T is the
last one. With s(j) the last stage that trained task j:

    average success     mean_j R[T, j]
    backward transfer   mean_j R[T, j] - R[s(j), j]                   Lopez-Paz & Ranzato 2017, arXiv:1706.08840
    forgetting          mean_j max_{i < T} R[i, j] - R[T, j]          Chaudhry et al. 2018, arXiv:1801.10112
    forward transfer    mean_j R[first stage of j - 1, j] - R[0, j]   Lopez-Paz & Ranzato 2017
    retention           mean_j R[T, j] / R[0, j]
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import fisher_exact

from craft_optim.evaluation.statistics import Interval, wilson

__all__ = [
    "Cell",
    "Change",
    "Measure",
    "SuccessMatrix",
    "average_success",
    "backward_transfer",
    "changes",
    "forgetting",
    "forward_transfer",
    "measures",
    "retention",
]

Rates = npt.NDArray[np.float64]

_DRAWS = 10_000


@dataclass(frozen=True)
class Cell:
    """Success on one task after one stage.

    Attributes:
        rate: In [0, 1].
        trials: How many rollouts that is of; None if it is not known, and nothing can be said about chance.
    """

    rate: float
    trials: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0 or (self.trials is not None and self.trials < 1):
            raise ValueError(
                "`rate` must be in [0, 1], a share and no percentage, and `trials` >= 1. Found "
                f"rate={self.rate!r}, trials={self.trials!r}."
            )
        if self.trials is not None and abs(self.rate * self.trials - round(self.rate * self.trials)) > 0.01:
            raise ValueError(f"A rate of {self.rate!r} cannot come from {self.trials} trials: check their number.")

    @classmethod
    def of(cls, successes: int, trials: int) -> "Cell":
        """A cell from counts."""
        if trials < 1 or not 0 <= successes <= trials:
            raise ValueError(
                f"`trials` must be >= 1 and `successes` in [0, trials]. Found successes={successes}, trials={trials}."
            )
        return cls(successes / trials, trials)

    @property
    def successes(self) -> int:
        """Number of successes among its trials, which must be known."""
        if self.trials is None:
            raise ValueError("The number of trials is not known.")
        return round(self.rate * self.trials)

    def interval(self, confidence: float = 0.95) -> Interval | None:
        """Wilson's score interval; None if the number of trials is not known."""
        return None if self.trials is None else wilson(self.successes, self.trials, confidence)


@dataclass(frozen=True)
class SuccessMatrix:
    """Success on every task after every stage.

    Attributes:
        stages: Their names, in the order of training; the first may be the policy before.
        tasks: Their names.
        trained: Of each stage the tasks that it trained; none for a policy before, and for training on something that
            is not among the tasks.
        cells: Of each stage, in the order of the tasks; None where the policy was not evaluated.

    Raises:
        ValueError: There are fewer than two stages or no tasks, names come twice, or the parts do not fit together.

    Example:
        >>> matrix = SuccessMatrix(
        ...     ("before", "after"),
        ...     ("drawer", "button"),
        ...     (("drawer",), ("button",)),
        ...     ((Cell.of(50, 50), Cell.of(0, 50)), (Cell.of(40, 50), Cell.of(45, 50))),
        ... )
        >>> round(backward_transfer(matrix).value, 2), round(forgetting(matrix).value, 2)
        (-0.2, 0.2)
    """

    stages: tuple[str, ...]
    tasks: tuple[str, ...]
    trained: tuple[tuple[str, ...], ...]
    cells: tuple[tuple[Cell | None, ...], ...]

    def __post_init__(self) -> None:
        if len(self.stages) < 2 or not self.tasks:
            raise ValueError(
                f"`stages` must be at least two, and `tasks` at least one. Found {list(self.stages)} and "
                f"{list(self.tasks)}."
            )
        for name, values in (("stages", self.stages), ("tasks", self.tasks)):
            if len(set(values)) < len(values):
                raise ValueError(f"`{name}` must have different names. Found {list(values)}.")
        if len(self.trained) != len(self.stages) or len(self.cells) != len(self.stages):
            raise ValueError(
                f"`trained` and `cells` must have an entry for each of the {len(self.stages)} stages. Found "
                f"{len(self.trained)} and {len(self.cells)}."
            )
        for stage, trained, row in zip(self.stages, self.trained, self.cells, strict=True):
            if unknown := sorted(set(trained) - set(self.tasks)):
                raise ValueError(
                    f"Stage {stage!r} has trained {unknown[0]!r}, which is not among the tasks {list(self.tasks)}."
                )
            if len(row) != len(self.tasks):
                raise ValueError(f"Stage {stage!r} has {len(row)} cells for {len(self.tasks)} tasks.")

    @property
    def rates(self) -> Rates:
        """`[stages, tasks]`; NaN where the policy was not evaluated."""
        return np.array([[np.nan if cell is None else cell.rate for cell in row] for row in self.cells])

    def draws(self, count: int, seed: int) -> Rates:
        """Rates that the rollouts leave possible, `[count, stages, tasks]`; NaN where trials are missing or not known.

        Each is drawn from the posterior of its cell under Jeffreys' prior, Beta(k + 1/2, n - k + 1/2). To draw the
        episodes again with replacement would say that 50 of 50 successes leave no doubt.
        """
        generator = np.random.default_rng(seed)
        known = [[cell is not None and cell.trials is not None for cell in row] for row in self.cells]
        wins = np.array([[c.successes if c and c.trials else 0 for c in row] for row in self.cells])
        trials = np.array([[c.trials if c and c.trials else 0 for c in row] for row in self.cells])
        drawn: Rates = generator.beta(wins + 0.5, trials - wins + 0.5, size=(count, *wins.shape))
        return np.where(np.array(known), drawn, np.nan)


@dataclass(frozen=True)
class Measure:
    """A mean over tasks.

    Attributes:
        name: In words.
        value: None if it is not defined for any task.
        interval: Where it is with this probability, given the rollouts; None where trials are not known.
        each: Task -> its own value, of all tasks in the mean.
        left_out: Task -> why it is not in the mean, of the tasks that could be expected there.
        meaning: One line about it.
    """

    name: str
    value: float | None
    interval: Interval | None
    each: dict[str, float]
    left_out: dict[str, str]
    meaning: str


@dataclass(frozen=True)
class Change:
    """Success on one task after the first and after the last stage.

    Attributes:
        task: Its name.
        before: After the first stage; None if it was not evaluated.
        after: After the last stage; None if it was not evaluated.
        p_value: Of Fisher's exact test, two-sided, that nothing has changed; not corrected for the number of tasks.
            None if a number of trials is not known.
    """

    task: str
    before: Cell | None
    after: Cell | None
    p_value: float | None


def changes(matrix: SuccessMatrix) -> list[Change]:
    """Each task before and after, and whether chance could explain the difference."""
    found = []
    for task, before, after in zip(matrix.tasks, matrix.cells[0], matrix.cells[-1], strict=True):
        p_value = None
        if before and after and before.trials and after.trials:
            table = [[cell.successes, cell.trials - cell.successes] for cell in (before, after) if cell.trials]
            p_value = float(fisher_exact(table).pvalue)
        found.append(Change(task, before, after, p_value))
    return found


def measures(matrix: SuccessMatrix, confidence: float = 0.95, seed: int = 0) -> list[Measure]:
    """All measures of this module."""
    functions = (average_success, backward_transfer, forgetting, forward_transfer, retention)
    return [function(matrix, confidence, seed) for function in functions]


def average_success(matrix: SuccessMatrix, confidence: float = 0.95, seed: int = 0) -> Measure:
    """Mean success after the last stage, over all tasks.

    Args:
        matrix: Tasks that the last stage was not evaluated on are left out.
        confidence: Of the interval, in (0, 1).
        seed: Of the draws that the interval comes from.
    """
    needed = {task: [len(matrix.stages) - 1] for task in matrix.tasks}
    return _mean(
        matrix, "average success", needed, lambda r, at: r[..., at[0]], confidence, seed,
        f"mean success after {matrix.stages[-1]!r}",
    )  # fmt: skip


def backward_transfer(matrix: SuccessMatrix, confidence: float = 0.95, seed: int = 0) -> Measure:
    """Mean change of success since a task was last trained, over tasks that only earlier stages than the last trained.

    Below 0: later stages have harmed earlier tasks; above: they have helped. Arguments as for `average_success`.
    """
    last = len(matrix.stages) - 1
    needed = {task: [at[-1], last] for task, at in _stages_of(matrix).items() if at and at[-1] < last}
    return _mean(
        matrix, "backward transfer", needed, lambda r, at: r[..., at[1]] - r[..., at[0]], confidence, seed,
        "change since each task was trained; below 0: later stages have harmed it",
    )  # fmt: skip


def forgetting(matrix: SuccessMatrix, confidence: float = 0.95, seed: int = 0) -> Measure:
    """Mean loss since a task was done best, over all tasks that the last stage did not train.

    Tasks that no stage trained are among them: what a pretrained policy could do is forgotten, too. Of the stages
    before the last those count that were evaluated. A best of several is lucky: chance alone makes this larger, the
    more stages there are and the fewer rollouts. Arguments as for `average_success`.
    """
    last, rates = len(matrix.stages) - 1, matrix.rates
    needed = {}
    for place, (task, at) in enumerate(_stages_of(matrix).items()):
        if last not in at:
            known = [stage for stage in range(last) if not np.isnan(rates[stage, place])]
            needed[task] = [*(known or range(last)), last]
    return _mean(
        matrix, "forgetting", needed, lambda r, at: r[..., at[:-1]].max(-1) - r[..., at[-1]], confidence, seed,
        "loss since each task that the last stage did not train was done best; 0: nothing is lost",
    )  # fmt: skip


def forward_transfer(matrix: SuccessMatrix, confidence: float = 0.95, seed: int = 0) -> Measure:
    """Mean change of success by the stages before a task was first trained, over tasks with such stages.

    Those are the stages after the first one, whose row is what the task is compared with. Arguments as for
    `average_success`.
    """
    needed = {task: [0, at[0] - 1] for task, at in _stages_of(matrix).items() if at and at[0] >= 2}
    return _mean(
        matrix, "forward transfer", needed, lambda r, at: r[..., at[1]] - r[..., at[0]], confidence, seed,
        f"change since {matrix.stages[0]!r} by the stages before each task was trained",
    )  # fmt: skip


def retention(matrix: SuccessMatrix, confidence: float = 0.95, seed: int = 0) -> Measure:
    """Mean share of the first stage's success that is left after the last, over tasks that no stage after it trained.

    Tasks on which the first stage never succeeded are left out. Arguments as for `average_success`.
    """
    last, rates = len(matrix.stages) - 1, matrix.rates
    old = {task: place for place, (task, at) in enumerate(_stages_of(matrix).items()) if not at or at[-1] == 0}
    needed = {task: [0, last] for task, place in old.items() if rates[0, place] != 0.0}
    never = {task: f"no success after {matrix.stages[0]!r}" for task in old if task not in needed}
    return _mean(
        matrix, "retention", needed, lambda r, at: r[..., at[1]] / r[..., at[0]], confidence, seed,
        f"share of the success after {matrix.stages[0]!r} that is left, of tasks that were not trained since", never,
    )  # fmt: skip


def _stages_of(matrix: SuccessMatrix) -> dict[str, list[int]]:
    """Task -> the stages that trained it."""
    return {task: [i for i, trained in enumerate(matrix.trained) if task in trained] for task in matrix.tasks}


def _mean(
    matrix: SuccessMatrix,
    name: str,
    needed: Mapping[str, Sequence[int]],
    value_of: Callable[[Rates, Sequence[int]], Any],
    confidence: float,
    seed: int,
    meaning: str,
    left_out: Mapping[str, str] | None = None,
) -> Measure:
    """The mean over the tasks whose cells are there.

    Args:
        matrix: Of all tasks.
        name: Of the measure.
        needed: Task -> stages that its value is made of.
        value_of: (rates `[..., stages]` of a task, its stages) -> its values `[...]`.
        confidence: Of the interval.
        seed: Of the draws.
        meaning: One line about the measure.
        left_out: Tasks that are left out already, and why.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` must be in (0, 1). Found confidence={confidence!r}.")
    rates, missing = matrix.rates, dict(left_out or {})
    for task, stages in needed.items():
        place = matrix.tasks.index(task)
        absent = [matrix.stages[stage] for stage in stages if np.isnan(rates[stage, place])]
        if absent:
            missing[task] = f"not evaluated after {', '.join(map(repr, absent))}"
    used = {task: stages for task, stages in needed.items() if task not in missing}
    if not used:
        return Measure(name, None, None, {}, missing, meaning)
    each = {task: float(value_of(rates[:, matrix.tasks.index(task)], stages)) for task, stages in used.items()}
    value = float(np.mean(list(each.values())))
    drawn = matrix.draws(_DRAWS, seed)
    possible = np.mean([value_of(drawn[..., matrix.tasks.index(task)], at) for task, at in used.items()], axis=0)
    interval = None
    if not np.isnan(possible).any():
        low, high = np.quantile(possible, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
        # At 0 and 1 the posterior ends before the rate that was observed
        interval = min(float(low), value), max(float(high), value)
    return Measure(name, value, interval, each, missing, meaning)
