"""Steps of a long recipe: each is done once, shows what it does, and leaves a log."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _paths
from rich.console import Console

__all__ = ["Steps", "craft_optim", "lerobot_train"]

_TAIL = 25


def craft_optim(*arguments: object) -> list[str]:
    """The command `craft-optim`, with the small pi0_fast in the place of the big one."""
    return [sys.executable, "-m", "small_pi0_fast", *map(str, arguments)]


def lerobot_train(*arguments: object) -> list[str]:
    """The command `lerobot-train`, with the small pi0_fast in the place of the big one."""
    script = Path(sys.executable).with_name("lerobot-train")
    return [str(script), "--small.discover_packages_path=small_pi0_fast", *map(str, arguments)]


class Steps:
    """Runs steps that are not done yet in a folder.

    Args:
        folder: Where marks (`done/`) and logs (`logs/`) go.
        settings: What the results depend on.
        console: Where progress is shown.

    Raises:
        ValueError: The folder has results of other settings.

    Attributes:
        done_now: The names of the steps that were not skipped.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], console: Console | None = None) -> None:
        self._folder, self._console = folder, console or Console()
        self.done_now: list[str] = []
        for name in ("done", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        if file.is_file() and (found := json.loads(file.read_text(encoding="utf-8"))) != settings:
            unlike = [f"{key}={found.get(key)}" for key in settings if found.get(key) != settings[key]]
            raise ValueError(
                f"--out={folder} has results of other settings ({', '.join(unlike)}): pass these, or another --out."
            )
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def command(self, name: str, command: Sequence[str]) -> None:
        """Runs a command of users' in a process of its own, unless it was finished before.

        Raises:
            RuntimeError: It failed; the message has the end of its log.
        """
        self.call(name, lambda: self._run(name, command), f"$ {_shown(command)}")

    def call(self, name: str, function: Callable[[], Any], about: str = "") -> None:
        """Calls a function, unless it was finished before."""
        mark = self._folder / "done" / f"{name}.json"
        if mark.is_file():
            self._console.print(f"[dim]{name}: done before[/dim]")
            return
        self._console.print(f"[bold]{name}[/bold]")
        if about:
            self._console.print(about, style="dim", markup=False, highlight=False, soft_wrap=True)
        started = time.monotonic()
        function()
        seconds = round(time.monotonic() - started, 1)
        mark.write_text(json.dumps({"step": name, "seconds": seconds}) + "\n", encoding="utf-8")
        self.done_now.append(name)
        self._console.print(f"[green]{name}[/green]: {seconds:.0f} s")

    def _run(self, name: str, command: Sequence[str]) -> None:
        log = self._folder / "logs" / f"{name}.log"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_paths.EXAMPLES), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # more are slower on a model this small
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("w", encoding="utf-8") as file, self._console.status(name) as status:
            process = subprocess.Popen(
                command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:  # bars end their lines with a return, which is a line's end here
                    file.write(line)
                    status.update(f"{name}: {line.strip()[-100:]}".replace("[", r"\["))
            finally:
                if process.poll() is None and sys.exc_info()[0] is not None:
                    process.terminate()
                process.wait()
        if process.returncode:
            tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-_TAIL:])
            raise RuntimeError(f"{name} failed with exit status {process.returncode}: {_shown(command)}\n{tail}")


def _shown(command: Sequence[str]) -> str:
    """A command as a user types it."""
    words = list(command)
    if words[1:3] == ["-m", "craft_optim.cli"]:
        words[:3] = ["craft-optim"]
    elif words[1:2] == ["-m"]:
        words[0] = "python"
    return " ".join(repr(word) if set(word) & set(" ;{}\n") else word for word in [Path(words[0]).name, *words[1:]])
