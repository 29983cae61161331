"""The command line: craft-optim build-anchors, convert, inspect.

    craft-optim build-anchors anchors/ --policy.path=lerobot/pi0fast-base --dataset.repo_id=you/old_task --count=512
    craft-optim build-anchors anchors/ --factory=my_script.py:anchors
    craft-optim inspect anchors/ --html=anchors.html

The same as `python -m craft_optim.cli`. Exit status: 0, 1 for what went wrong, 2 for wrong arguments.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from craft_optim import __version__, anchors
from craft_optim._sources import (
    Source,
    UsageError,
    factory_source,
    load_policy,
    policy_forward,
    policy_source,
    tokenizer_of,
)
from craft_optim.anchors import AnchorCache
from craft_optim.anchors.cache import MANIFEST
from craft_optim.anchors.passes import Forward
from craft_optim.inspection import (
    Drift,
    bytes_in_words,
    drifts,
    facts,
    lengths,
    retention_kinds,
    spread,
    tensors,
    verdict,
)

__all__ = ["main"]

_BUILD = """\
A lerobot policy and a dataset:

  craft-optim build-anchors anchors/ --policy.path=lerobot/pi0fast-base --dataset.repo_id=you/old_task --count=512
  torchrun --nproc-per-node 4 -m craft_optim.cli build-anchors anchors/ --policy.path=... --dataset.root=data/old_task

Any other model: a function without arguments in a script (or package.module:function) that returns
(model, batches), or (model, batches, settings) with further arguments of craft_optim.anchors.build:

  craft-optim build-anchors anchors/ --factory=my_script.py:anchors --top-k=64

A build that was stopped goes on where it stopped; a finished one is left as it is.
"""
_INSPECT = """\
  craft-optim inspect anchors/                                    # what is in it
  craft-optim inspect anchors/ --verify --html=anchors.html       # checksums; a page to look at
  craft-optim inspect anchors/ --policy.path=outputs/checkpoints/last/pretrained_model --html=anchors.html
                                                                  # how far has this checkpoint moved?
"""
_CONVERT = "  craft-optim convert old_cache/ anchors/ --layers 4 8 -1\n"
# Arguments that only go with one way to name the model
_OF_POLICY = {
    "keep": "--keep",
    "repo_id": "--dataset.repo_id",
    "root": "--dataset.root",
    "episodes": "--dataset.episodes",
    "count": "--count",
    "batch_size": "--batch-size",
    "prompts": "--prompts",
    "workers": "--workers",
}


class _Parser(argparse.ArgumentParser):
    """With errors of one line: the usage of these commands is long, and hides them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help has examples)\n")


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1. Found {text!r}.")
    return int(text)


def _layer(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}.")
    return text


def _parser() -> _Parser:
    parser = _Parser(prog="craft-optim", description="Anchor caches: build them, look at them, check a model on them.")
    parser.add_argument("--version", action="version", version=f"craft-optim {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{build-anchors,inspect,convert}")

    def command(name: str, run: Callable[[argparse.Namespace], None], about: str, examples: str) -> _Parser:
        made = commands.add_parser(name, help=about, description=about, epilog=f"examples:\n\n{examples}")
        made.set_defaults(run=run, parser=made)
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return made

    def model(add: Callable[..., Any]) -> None:
        add("--policy.path", dest="policy", metavar="PATH", help="a lerobot policy: folder or hub id")
        add("--factory", metavar="FILE:FUNCTION", help="a function that returns (model, batches[, settings])")
        add("--device", default="auto", help="where the model runs (default: auto: CUDA if there is, else the CPU)")

    build = command("build-anchors", _build, "Write down what a model says about its anchors.", _BUILD)
    add = build.add_argument
    add("out", metavar="OUT", help="folder of the cache")
    model(add)
    add("--dataset.repo_id", dest="repo_id", metavar="ID", help="LeRobotDataset with the anchors")
    add("--dataset.root", dest="root", metavar="FOLDER", help="where it is, if it is local")
    add("--dataset.episodes", dest="episodes", type=_whole, metavar="N", help="its first N episodes (default: all)")
    add("--count", type=_whole, metavar="N", help="N frames, spread over tasks and episodes (default: all frames)")
    add("--batch-size", type=_whole, metavar="N", help="frames per forward (default: 16)")
    add("--prompts", type=_file, metavar="FILE", help="instructions, one per line, instead of the dataset's own")
    add("--workers", type=_whole, metavar="N", help="processes that read frames ahead (default: none)")
    kinds = ["logits", "tokens", "prefix", "actions"]
    add("--keep", choices=kinds, help="what to keep of the policy (default: by its type)")
    add("--layers", nargs="+", type=_layer, metavar="L", help="hidden states to keep: numbers or names of modules")
    add("--top-k", type=_whole, metavar="K", help="keep the K likeliest classes instead of all")
    add("--tokens", type=_whole, metavar="N", help="let the model continue each anchor by at most N tokens")
    add("--frozen", nargs="+", metavar="NAME", help="modules that will not train: passes replay their outputs")
    add("--dtype", choices=["float16", "bfloat16", "float32"], help="of what is stored (default: float16)")
    add("--autocast", choices=["float16", "bfloat16"], help="run the model under autocast")
    add("--shard-size", type=_whole, metavar="N", help="anchors per file (default: 256)")
    add("--overwrite", action="store_true", help="start over, whatever the folder holds")
    add("--no-resume", action="store_true", help="start a half-built cache over")

    inspect = command("inspect", _inspect, "Say what a cache holds, show it, check a model on it.", _INSPECT)
    add = inspect.add_argument
    add("cache", metavar="CACHE", help="folder of the cache")
    add("--html", metavar="FILE", help="write a page with pictures, prompts and what the teacher says")
    add("--verify", action="store_true", help="compare all checksums: reads the whole cache")
    add("--count", type=_whole, default=24, metavar="N", help="anchors to show and to measure (default: 24)")
    add("--tokenizer", metavar="PATH", help="folder or hub id of a tokenizer, to show token ids as text")
    model(add)

    convert = command("convert", _convert, "Import a cache of an earlier CRaFT implementation.", _CONVERT)
    add = convert.add_argument
    add("old", metavar="OLD", help="folder with its .pt files")
    add("new", metavar="NEW", help="folder of the new cache")
    add("--layers", nargs="+", type=_layer, metavar="L", help="its layers, where its files do not name them")
    add("--overwrite", action="store_true", help="start over, whatever the new folder holds")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Without the program's name. None: those of the process.

    Returns:
        The exit status: 0, or 1 after a message.

    Raises:
        SystemExit: With status 2 for wrong arguments; after --help and --version with 0.
    """
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except UsageError as error:
        args.parser.error(str(error).rstrip("."))
    except KeyboardInterrupt:
        print(f"craft-optim {args.command}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"craft-optim {args.command}: {error} (--debug shows where)", file=sys.stderr)
        return 1
    return 0


def _require_one_model(args: argparse.Namespace) -> None:
    if args.policy and args.factory:
        raise UsageError("--policy.path and --factory exclude each other: pass one")


def _device(name: str) -> str:
    if name != "auto":
        return name
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


@contextmanager
def _processes() -> Iterator[bool]:
    """Joins the processes that torchrun has started, if it has; yields whether this one speaks for them."""
    told = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not told or dist.is_initialized():
        yield not dist.is_initialized() or dist.get_rank() == 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


# build-anchors


def _build(args: argparse.Namespace) -> None:
    _check_build(args)
    settings = {
        "layers": args.layers,
        "top_k": args.top_k,
        "tokens": args.tokens,
        "frozen": args.frozen,
        "dtype": args.dtype and getattr(torch, args.dtype),
        "autocast": args.autocast and getattr(torch, args.autocast),
        "shard_size": args.shard_size,
        "overwrite": args.overwrite or None,
        "resume": False if args.no_resume else None,
    }
    started, finished = time.monotonic(), (Path(args.out) / MANIFEST).is_file() and not args.overwrite
    with _processes() as first:
        source = _source(args)
        cache = source.build(args.out, **{name: value for name, value in settings.items() if value is not None})
        if first:
            _print_built(cache, source, None if finished else time.monotonic() - started)


def _check_build(args: argparse.Namespace) -> None:
    _require_one_model(args)
    if args.factory:
        for name, option in _OF_POLICY.items():
            if getattr(args, name) is not None:
                raise UsageError(f"{option} goes with --policy.path: of --factory the function chooses the anchors")
        return
    if not args.policy:
        raise UsageError("there is no model: pass --policy.path, or --factory for models that are not lerobot's")
    if not (args.repo_id or args.root):
        raise UsageError("--policy.path needs the anchors: pass --dataset.repo_id or --dataset.root")
    if args.root and not (Path(args.root) / "meta" / "info.json").is_file() and not args.repo_id:
        raise UsageError(f"--dataset.root={args.root} is no LeRobotDataset: it has no meta/info.json")
    if args.tokens:
        raise UsageError("--tokens goes with --factory: policies of lerobot are kept by --keep")
    if args.layers and args.keep != "prefix":
        raise UsageError("--layers needs --keep=prefix: logits and actions are what comes out of the last layer")
    if args.top_k and args.keep not in (None, "logits"):
        raise UsageError(f"--top-k needs --keep=logits. Found --keep={args.keep}")


def _source(args: argparse.Namespace) -> Source:
    if args.factory:
        return factory_source(args.factory, None if args.device == "auto" else args.device)
    return policy_source(
        args.policy,
        device=_device(args.device),
        keep=args.keep,
        repo_id=args.repo_id,
        root=args.root,
        episodes=args.episodes,
        count=args.count,
        batch_size=args.batch_size or 16,
        prompts=args.prompts,
        workers=args.workers or 0,
    )


def _print_built(cache: AnchorCache, source: Source, seconds: float | None) -> None:
    closure = next(iter(retention_kinds(cache).values())).__name__
    _print_table(
        f"Built {cache.path}" if seconds is not None else f"{cache.path} was finished already",
        [
            ("Anchors", str(len(cache))),
            ("Size on disk", f"{bytes_in_words(cache.nbytes)}, {bytes_in_words(cache.nbytes / len(cache))} per anchor"),
            ("Holds", cache.features.describe()),
            *([] if seconds is None else [("Time", f"{seconds:.1f} s")]),
        ],
    )
    usage = source.usage.format(cache=str(cache.path), closure=closure)
    _print_code(f"{usage}\noptimizer = CraftOptimizer(optimizer, retention, epsilon=...)")


# convert


def _convert(args: argparse.Namespace) -> None:
    cache = anchors.convert(args.old, args.new, layers=args.layers, overwrite=args.overwrite)
    _print_table(f"Converted {args.old} to {cache.path}", facts(cache))


# inspect


def _inspect(args: argparse.Namespace) -> None:
    _require_one_model(args)
    cache = AnchorCache.open(args.cache)
    _print_table(str(cache.path), facts(cache))
    varying = {row.name: f"{row.shortest} / {row.mean:.3g} / {row.longest}" for row in lengths(cache)}
    _print_table(
        "Tensors: shape of one anchor, dtype, length (least / mean / most)",
        [(name, f"{shape}  {dtype}  {varying.get(name, '')}".rstrip()) for name, shape, dtype in tensors(cache)],
    )
    if args.verify:
        cache.verify()
        print(f"\nChecksums: all {len(cache)} anchors are as they were written.")
    indices = spread(len(cache), args.count)
    measured: list[Drift] = []
    judged, tokenizer = None, args.tokenizer
    if args.policy or args.factory:
        if args.policy:
            model = load_policy(args.policy, _device(args.device))
            forward: Forward | None = policy_forward(model, cache)
            tokenizer = tokenizer or getattr(model.config, "text_tokenizer_name", None)
        else:
            source = factory_source(args.factory, None if args.device == "auto" else args.device)
            model, forward = source.model, source.forward
        measured = drifts(model, cache, indices, forward=forward)
        judged = verdict(cache, model, measured)
        rows = [(drift.kind, f"{drift.value:.3g} {drift.unit}, worst {max(drift.each):.3g}") for drift in measured]
        _print_table(f"Drift on {len(indices)} of {len(cache)} anchors", rows)
        print(f"\n{judged[1]}")
    if args.html:
        from craft_optim.inspection_page import render

        page = render(
            cache,
            indices,
            verified=args.verify,
            measured=measured,
            verdict=judged,
            decode=None if tokenizer is None else tokenizer_of(tokenizer),
        )
        Path(args.html).write_text(page, encoding="utf-8")
        print(f"\nPage: {args.html} ({bytes_in_words(len(page))})")


# Output


def _print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """With rich on a terminal; plain into files and pipes, whose lines must not be wrapped."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            pass
        else:
            table = Table.grid(padding=(0, 2))
            table.add_column(overflow="fold")
            for label, text in rows:
                table.add_row(Text(label, style="dim"), Text(text))
            console = Console()
            console.print(Text(f"\n{title}", style="bold"))
            console.print(table)
            return
    width = max(len(label) for label, _ in rows)
    print(f"\n{title}", *(f"  {label:{width}}  {text}" for label, text in rows), sep="\n")


def _print_code(code: str) -> None:
    print("\nNext:\n", *(f"  {line}" for line in code.splitlines()), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
