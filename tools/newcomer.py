"""Follows the three ways into the documentation to the letter, each in a fresh clone and a fresh environment.

    python tools/newcomer.py                          # vision, chat and robot: half an hour on a CPU
    python tools/newcomer.py vision                   # one of them: a few minutes
    python tools/newcomer.py chat --model=FOLDER      # where there is no hub: this model is taken for the page's

Blocks of a page that follow a line `<!-- newcomer -->` are run in their order, in one shell. With a name in that line,
`<!-- newcomer: train.py -->`, a block is appended to that script, which is run before the next block of bash. Blocks of
`console` are what the page says that it prints: each of their lines must be printed, in this order, whatever its
numbers are.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Way(NamedTuple):
    """A page, and the minor version of Python that it needs at least."""

    page: str
    python: int


WAYS = {"vision": Way("vision.md", 11), "chat": Way("chat.md", 11), "robot": Way("lerobot.md", 12)}
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of the page about chat models
MARKED = re.compile(r"^<!-- newcomer(?:: (\S+))? -->\n+```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# What a newcomer has already: chats of old uses, and of the new one
TOPICS = ("rain", "bread", "a river", "honey", "winter", "glass", "the moon", "salt")
OLD = [(f"What is {topic}?", f"Here is what I know about {topic}.") for topic in TOPICS]
OLD += [(f"Why do people like {topic}?", f"There are many reasons to like {topic}.") for topic in TOPICS]
NEW = [(f"I would like {count} coffees.", f'{{"item": "coffee", "count": {count}}}') for count in range(2, 10)]


class Step(NamedTuple):
    """One block of a page; `file`, if it is named, is where it goes."""

    file: str
    language: str
    text: str


def steps_of(page: str) -> list[Step]:
    """The marked blocks of a page, in their order."""
    return [Step(*found) for found in MARKED.findall(page)]


def script_of(steps: list[Step]) -> str:
    """One shell script of all blocks."""
    lines, written = ["set -euo pipefail"], dict[str, None]()
    for step in [*steps, Step("", "bash", "")]:
        if step.file:
            lines.append(f"cat >> {step.file} <<'END_OF_BLOCK'\n{step.text}END_OF_BLOCK")
            written[step.file] = None
        elif step.language == "bash":
            lines += [f"python {file}" for file in written]
            written.clear()
            lines.append(step.text)
    return "\n".join(lines)


def missing_from(output: str, steps: list[Step]) -> list[str]:
    """The lines that a page says are printed, and that are not, or not in their order; numbers and blanks aside."""
    said = iter([_shape(line) for line in output.splitlines()])
    wanted = [line for step in steps if step.language == "console" for line in step.text.splitlines() if line.strip()]
    return [line for line in wanted if _shape(line) not in said]


def _shape(line: str) -> str:
    return re.sub(r"[-+]?\d[\d,.]*(e-?\d+)?", "0", " ".join(line.split()))


def follow(way: Way, folder: Path, model: str | None) -> list[str]:
    """Runs a page and returns what is wrong with it."""
    page = (ROOT / "docs" / way.page).read_text(encoding="utf-8")
    steps = steps_of(page)
    clone, log = folder / "clone", folder / "log.txt"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    finder = ["sh", str(ROOT / "tools" / "find_python"), str(way.python)]
    python = subprocess.run(finder, check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
    for name, chats in (("old", OLD), ("heldout", OLD[::2]), ("new", NEW)):
        rows = [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
            for asked, answer in chats
        ]
        (clone / f"{name}_chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    script = script_of(steps).replace(MODEL, model or MODEL)
    environment = {**os.environ, "PATH": f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            ["bash", "-c", script], cwd=clone, env=environment, stdout=out, stderr=subprocess.STDOUT, check=False
        )
    output = log.read_text(encoding="utf-8")
    if done.returncode:
        return [f"ended with status {done.returncode}:", *output.splitlines()[-15:]]
    return [f"does not print: {line}" for line in missing_from(output, steps)]


def main() -> int:
    """Follows the pages; the status is 1 if one of them does not lead where it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)} (default: all)")
    parser.add_argument("--model", metavar="FOLDER", help=f"is taken for {MODEL}")
    args = parser.parse_args()
    if unknown := set(args.ways) - WAYS.keys():
        parser.error(f"there is no way {unknown.pop()!r}: pass some of {', '.join(WAYS)}")
    status = 0
    for name in args.ways or WAYS:
        with tempfile.TemporaryDirectory(prefix=f"newcomer-{name}-") as folder:
            wrong = follow(WAYS[name], Path(folder), args.model)
        print(f"{name}: {'to the end, as the page says' if not wrong else ''}", *wrong, sep="\n  ", flush=True)
        status |= bool(wrong)
    return status


if __name__ == "__main__":
    sys.exit(main())
