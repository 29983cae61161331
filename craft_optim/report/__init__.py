"""A run's metrics as one HTML page, or as PNGs: what `craft-optim report` does.

    from craft_optim.report import read_runs, render

    page = render(read_runs(["outputs/train/new_task"]))

`runs` reads, `summary` judges, `panels` thins for drawing; `page` and `pictures` draw what these say. The page needs
nothing but numpy; PNGs need matplotlib, the extra `report`.
"""

from craft_optim.report.page import render
from craft_optim.report.runs import Run, read_runs
from craft_optim.report.summary import Summary, Verdict, judge, summarise

__all__ = ["Run", "Summary", "Verdict", "judge", "read_runs", "render", "summarise"]
