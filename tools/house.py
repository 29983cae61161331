"""Size and shape of the package in numbers: `python tools/house.py`.

Prints lines of the package; calls, functions and files of one retention step (a two-layer network, `LogitRetention`
without reading ahead, one process); uses of the closures' underscored names outside of their own files; lines and files
that name an option.
"""

import re
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "craft_optim"
sys.path.insert(0, str(ROOT))
# Where the closures and what they share among themselves live; others ask them.
CLOSURES = {"retention", "cached", "logit_retention", "hidden_retention", "token_retention", "online", "combined"}
_OF_CLOSURES = re.compile(r"\b(?:self\.)?(?:retention|closure|member|part)s?(?:\[[^]]*\])?\._[a-z]\w*")


def lines() -> int:
    """Lines of Python in the package."""
    return sum(len(file.read_text("utf-8").splitlines()) for file in PACKAGE.rglob("*.py"))


def opened_closures() -> list[str]:
    """file:line: what, of each underscored name of a closure that is used outside of the closures' files."""
    return [
        f"{file.relative_to(ROOT)}:{number}: {found}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if not (file.stem in CLOSURES and file.parent.name == "anchors")
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        for found in _OF_CLOSURES.findall(line)
    ]


def places(option: str) -> tuple[int, int]:
    """Lines and files of the package that name an option."""
    found = [
        file
        for file in PACKAGE.rglob("*.py")
        for line in file.read_text("utf-8").splitlines()
        if re.search(rf"\b{option}\b", line)
    ]
    return len(found), len(set(found))


def traced_step() -> tuple[int, int, int]:
    """Calls, distinct functions and files of the package in one retention step, generator expressions among them."""
    from craft_optim import CraftOptimizer, anchors

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    inputs = torch.randn(16, 6)
    calls: list[tuple[str, str, int]] = []

    def count(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            calls.append((code.co_filename, code.co_name, code.co_firstlineno))

    with tempfile.TemporaryDirectory() as folder:
        cache = anchors.build(model, inputs.split(4), folder, class_dim=-1, progress=False)
        retention = anchors.LogitRetention(model, cache, batch_size=4, workers=0)
        optimizer = CraftOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), retention)
        for step in range(3):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            if step == 2:
                sys.setprofile(count)
            try:
                optimizer.step()
            finally:
                sys.setprofile(None)
    return len(calls), len(set(calls)), len({file for file, *_ in calls})


if __name__ == "__main__":
    print(f"lines of the package: {lines():,}")
    print("one retention step: {} calls of {} functions in {} files".format(*traced_step()))
    opened = opened_closures()
    print(f"underscored names of closures from outside: {len(opened)}", *opened, sep="\n  ")
    for name in ("conflict_threshold", "projection", "retention_every"):
        print("`{}` is on {} lines of {} files".format(name, *places(name)))
