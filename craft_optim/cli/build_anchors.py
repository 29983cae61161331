"""craft-optim build-anchors: write down what a model says about its anchors."""

import argparse
import time
from pathlib import Path

import torch

from craft_optim.anchors import AnchorCache
from craft_optim.anchors.cache import MANIFEST
from craft_optim.cli.options import (
    AddCommand,
    UsageError,
    add_model,
    device_of,
    existing_file,
    joined_processes,
    layer,
    require_one_model,
    whole,
)
from craft_optim.cli.output import print_code, print_table
from craft_optim.cli.sources import Source, factory_source, policy_source
from craft_optim.inspection import bytes_in_words, retention_kinds

__all__ = ["add"]

_EXAMPLES = """\
A lerobot policy and a dataset:

  craft-optim build-anchors anchors/ --policy.path=lerobot/pi0fast-base --dataset.repo_id=you/old_task --count=512
  torchrun --nproc-per-node 4 -m craft_optim.cli build-anchors anchors/ --policy.path=... --dataset.root=data/old_task

Any other model: a function without arguments in a script (or package.module:function) that returns
(model, batches), or (model, batches, settings) with further arguments of craft_optim.anchors.build:

  craft-optim build-anchors anchors/ --factory=my_script.py:anchors --top-k=64

A build that was stopped goes on where it stopped; a finished one is left as it is.
"""
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


def add(command: AddCommand) -> None:
    """The command and its options."""
    add = command("build-anchors", _build, "Write down what a model says about its anchors.", _EXAMPLES).add_argument
    add("out", metavar="OUT", help="folder of the cache")
    add_model(add)
    add("--dataset.repo_id", dest="repo_id", metavar="ID", help="LeRobotDataset with the anchors")
    add("--dataset.root", dest="root", metavar="FOLDER", help="where it is, if it is local")
    add("--dataset.episodes", dest="episodes", type=whole, metavar="N", help="its first N episodes (default: all)")
    add("--count", type=whole, metavar="N", help="N frames, spread over tasks and episodes (default: all frames)")
    add("--batch-size", type=whole, metavar="N", help="frames per forward (default: 16)")
    add("--prompts", type=existing_file, metavar="FILE", help="instructions to take, one per line, in turn")
    add("--workers", type=whole, metavar="N", help="processes that read frames ahead (default: none)")
    kinds = ["logits", "tokens", "prefix", "actions"]
    add("--keep", choices=kinds, help="what to keep of the policy (default: by its type)")
    add("--layers", nargs="+", type=layer, metavar="L", help="hidden states to keep: numbers or names of modules")
    add("--top-k", type=whole, metavar="K", help="keep the K likeliest classes instead of all")
    add("--tokens", type=whole, metavar="N", help="let the model continue each anchor by at most N tokens")
    add("--frozen", nargs="+", metavar="NAME", help="modules that will not train: passes replay their outputs")
    add("--dtype", choices=["float16", "bfloat16", "float32"], help="of what is stored (default: float16)")
    add("--autocast", choices=["float16", "bfloat16"], help="run the model under autocast")
    add("--shard-size", type=whole, metavar="N", help="anchors per file (default: 256)")
    add("--overwrite", action="store_true", help="start over, whatever the folder holds")
    add("--no-resume", action="store_true", help="start a half-built cache over")


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
    with joined_processes() as first:
        source = _source(args)
        cache = source.build(args.out, **{name: value for name, value in settings.items() if value is not None})
        if first:
            _print_built(cache, source, None if finished else time.monotonic() - started)


def _check_build(args: argparse.Namespace) -> None:
    require_one_model(args)
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
        device=device_of(args.device),
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
    print_table(
        f"Built {cache.path}" if seconds is not None else f"{cache.path} was finished already",
        [
            ("Anchors", str(len(cache))),
            ("Size on disk", f"{bytes_in_words(cache.nbytes)}, {bytes_in_words(cache.nbytes / len(cache))} per anchor"),
            ("Holds", cache.features.describe()),
            *([] if seconds is None else [("Time", f"{seconds:.1f} s")]),
        ],
    )
    usage = source.usage.format(cache=str(cache.path), closure=closure)
    print_code(f"{usage}\noptimizer = CraftOptimizer(optimizer, retention, epsilon=...)")
