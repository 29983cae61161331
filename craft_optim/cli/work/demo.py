"""The work of craft-optim demo: the run, and the page of its log."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from craft_optim.cli.options import UsageError
from craft_optim.cli.output import print_code
from craft_optim.report import read_runs, render

__all__ = ["run"]

_ROBOT = Path("examples") / "pi0_fast_craft.py"


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.model and args.what != "chat":
        raise UsageError(f"--model.path goes with demo chat. Found demo {args.what}")
    out = Path(args.out)
    given = {name: value for name in ("epsilon", "steps") if (value := getattr(args, name)) is not None}
    if args.what == "robot":
        _robot(out, given)
        return
    if args.what == "vision":
        from craft_optim.demo import vision as demo
    else:
        try:
            from craft_optim.demo import chat as demo  # type: ignore[no-redef]
        except ImportError as error:
            raise UsageError(
                f"demo chat needs transformers ({error}): pip install 'craft-optim[transformers]'."
            ) from error
        given |= {"model_path": args.model}
    out.mkdir(parents=True, exist_ok=True)
    demo.main(out, **given)
    page = out / "report.html"
    page.write_text(render(read_runs([f"{args.what}={out}"]), f"demo {args.what}"), encoding="utf-8")
    print(f"\nPage: {page}")
    print_code(shlex.join(["craft-optim", "inspect", f"{out / 'anchors'}", f"--html={out / 'anchors.html'}"]))


def _robot(out: Path, given: Mapping[str, Any]) -> None:
    if not _ROBOT.is_file():
        raise UsageError(
            "demo robot needs the repository, whose recordings and policies (22 MB) are not in the package: in a "
            "clone `make demo` installs the simulator and runs it"
        )
    options = [f"--{name}={value}" for name, value in {"out": out, **given}.items()]
    status = subprocess.run([sys.executable, str(_ROBOT), *options], check=False).returncode
    if status:
        raise SystemExit(status)
