"""The work of craft-optim build-anchors: a model, its anchors and the cache."""

import argparse
import shlex
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from craft_optim.anchors import AnchorCache, Reading
from craft_optim.anchors.manifest import MANIFEST
from craft_optim.cli.options import UsageError, require_folder, require_one_model
from craft_optim.cli.output import emit_json, log_shown, print_code, print_table
from craft_optim.cli.work.processes import device_of, joined_processes
from craft_optim.cli.work.sources import Source, factory_source, policy_source, text_source
from craft_optim.inspection import as_json, bytes_in_words

__all__ = ["OF_DATASET", "check_build", "run", "source_of"]

# Arguments that only go with a dataset
OF_DATASET = {
    "repo_id": "--dataset.repo_id",
    "root": "--dataset.root",
    "episodes": "--dataset.episodes",
    "rename_map": "--rename-map",
    "revision": "--dataset.revision",
    "tolerance_s": "--tolerance-s",
    "video_backend": "--dataset.video-backend",
    "depth_output_unit": "--dataset.depth-output-unit",
}
# And those that only go with one way to name the model
_OF_POLICY = {
    "keep": "--keep",
    **OF_DATASET,
    "count": "--count",
    "batch_size": "--batch-size",
    "prompts": "--prompts",
    "workers": "--workers",
}
# And with a language model
_OF_TEXT = {
    "data": "--data",
    "answers": "--answers",
    "counted": "--counted",
    "max_length": "--max-length",
    "max_new_tokens": "--max-new-tokens",
    "temperature": "--temperature",
}


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    check_build(args)
    require_folder("--json", args.json)
    settings = {
        "layers": args.layers,
        "top_k": args.top_k,
        "dtype": args.dtype and getattr(torch, args.dtype),
        "shard_size": args.shard_size,
        "overwrite": args.overwrite or None,
        "resume": False if args.no_resume else None,
    }
    started, finished = time.monotonic(), (Path(args.out) / MANIFEST).is_file() and not args.overwrite
    with joined_processes() as first:
        autocast = args.autocast and getattr(torch, args.autocast)
        source = text_source(args, device_of(args.device), autocast) if args.model else source_of(args)
        changed = _given({"tokens": args.tokens, "frozen": args.frozen, "autocast": autocast})
        if not args.model:
            settings["reading"] = replace(source.reading or Reading(), **changed)
        with log_shown() if first else nullcontext():
            cache = source.build(args.out, **_given(settings))
        if first and args.json != "-":
            _print_built(cache, source, None if finished else time.monotonic() - started)
        if first and args.json:
            emit_json(args.json, as_json(cache))


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def check_build(args: argparse.Namespace) -> None:
    """Refuses options that do not go together."""
    require_one_model(args)
    if getattr(args, "model", None):
        _check_text(args)
        return
    for name, option in _OF_TEXT.items():
        if getattr(args, name, None) is not None:
            raise UsageError(f"{option} goes with --model.path, a language model")
    if args.factory:
        for name, option in _OF_POLICY.items():
            if getattr(args, name) is not None:
                raise UsageError(f"{option} goes with --policy.path: of --factory the function chooses the anchors")
        return
    if not args.policy:
        raise UsageError(
            "there is no model: pass --policy.path for lerobot's, --model.path for a language model, or --factory"
        )
    if args.prompts and Path(args.prompts).suffix == ".jsonl":
        for name, option in OF_DATASET.items():
            if getattr(args, name) is not None:
                raise UsageError(f"{option} goes with a dataset: {args.prompts} has pictures of its own")
        if args.top_k:
            raise UsageError(f"--top-k needs a dataset with actions: of {args.prompts} no logits are kept")
    elif not (args.repo_id or args.root):
        raise UsageError("which anchors? pass --dataset.repo_id or --dataset.root, or a .jsonl as --prompts")
    if args.root and not args.repo_id and not any(Path(args.root).rglob("meta/info.json")):
        raise UsageError(f"--dataset.root={args.root} is no LeRobotDataset: there is no meta/info.json in it or below")
    if args.tokens:
        raise UsageError("--tokens goes with --factory: policies of lerobot are kept by --keep")
    if args.layers and args.keep != "prefix":
        raise UsageError("--layers needs --keep=prefix: logits and actions are what comes out of the last layer")
    if args.top_k and args.keep not in (None, "logits"):
        raise UsageError(f"--top-k needs --keep=logits. Found --keep={args.keep}")


def _check_text(args: argparse.Namespace) -> None:
    """Refuses options that do not go with a language model."""
    if not args.data:
        raise UsageError("which anchors? pass --data, chats, prompts or texts")
    others = {name: option for name, option in _OF_POLICY.items() if name not in ("count", "batch_size")}
    for name, option in {**others, "layers": "--layers", "tokens": "--tokens", "frozen": "--frozen"}.items():
        if getattr(args, name) is not None:
            raise UsageError(f"{option} does not go with --model.path")
    answers = args.answers or ("sampled" if args.data == "self" else "given")
    if answers != "given" and args.counted is not None:
        raise UsageError("--counted goes with given answers: what the model writes is what counts")
    for name, needs in (("max_new_tokens", ("sampled", "greedy")), ("temperature", ("sampled",))):
        if getattr(args, name) is not None and answers not in needs:
            raise UsageError(f"{_OF_TEXT[name]} needs --answers={' or '.join(needs)}")


def source_of(args: argparse.Namespace) -> Source:
    """The model and its anchors, as the options say."""
    if args.factory:
        return factory_source(args.factory, None if args.device == "auto" else args.device)
    return policy_source(args, device_of(args.device))


def _print_built(cache: AnchorCache, source: Source, seconds: float | None) -> None:
    kind = f", {cache.kinds[0]!r}" if cache.kind is None else ""
    print_table(
        f"Built {cache.path}" if seconds is not None else f"{cache.path} was finished already",
        [
            ("Anchors", f"{len(cache):,}" + (f", {cache.positions:,} positions" if cache.positions else "")),
            ("Size on disk", f"{bytes_in_words(cache.nbytes)}, {bytes_in_words(cache.nbytes / len(cache))} per anchor"),
            ("Holds", cache.features.describe()),
            *(("Keeps", kept.describe(cache.features.outputs[name].size)) for name, kept in cache.kept().items()),
            *([] if seconds is None else [("Time", f"{seconds:.1f} s")]),
        ],
    )
    usage = source.usage.format(cache=str(cache.path), kind=kind)
    wrapped = "optimizer = CraftOptimizer(optimizer, retention, epsilon=...)"
    code = f"from craft_optim import CraftOptimizer\n{usage}\n{wrapped}"
    if source.policy is None:
        print_code(code)
        return
    flags = (f"--craft.anchors.path={cache.path}", f"--policy.path={source.policy}")
    print_code(f"craft-optim train {shlex.join(flags)} --dataset.repo_id=NEW_TASK")
    print_code(code, "Or, in a loop of your own:")
