"""A success matrix as a picture."""

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stages.matrix import SuccessMatrix

__all__ = ["draw_matrix"]


def draw_matrix(matrix: SuccessMatrix, path: str | Path) -> None:
    """Draws success as a heat map: tasks by stages; frames are around the tasks that a stage trained.

    Args:
        matrix: Cells without an evaluation stay white.
        path: The picture, in a format that its ending names.
    """
    rates = matrix.rates.T
    tasks, stages = rates.shape
    longest = max(map(len, matrix.tasks))
    figure = Figure(figsize=(1.6 + 0.09 * longest + 1.1 * stages, 1.2 + 0.5 * tasks), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(rates, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
    for stage in range(stages):
        for task in range(tasks):
            rate = rates[task, stage]
            text = "-" if math.isnan(rate) else f"{rate:.2f}"
            axis.text(stage, task, text, ha="center", va="center", color="white" if rate > 0.6 else "black", fontsize=9)
            if matrix.tasks[task] in matrix.trained[stage]:
                axis.add_patch(Rectangle((stage - 0.46, task - 0.46), 0.92, 0.92, fill=False, ec="#d95f02", lw=2))
    axis.set_xticks(range(stages), matrix.stages, rotation=30 if stages > 4 else 0)
    axis.set_yticks(range(tasks), matrix.tasks)
    axis.set_title("success after each stage; framed: trained there", fontsize=10)
    figure.colorbar(picture, ax=axis)
    figure.savefig(path, dpi=130)
