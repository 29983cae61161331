"""craft-optim build-anchors: write down what a model says about its anchors."""

import argparse
import json
import shlex
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from craft_optim.anchors import AnchorCache, Reading
from craft_optim.anchors.manifest import MANIFEST
from craft_optim.cli.options import (
    AddCommand,
    UsageError,
    add_model,
    device_of,
    existing_file,
    joined_processes,
    layer,
    require_one_model,
    top_k,
    whole,
)
from craft_optim.cli.output import log_shown, print_code, print_table
from craft_optim.cli.sources import Source, factory_source, policy_source, text_source
from craft_optim.episodes import parse_episodes
from craft_optim.inspection import bytes_in_words

__all__ = ["OF_DATASET", "add", "add_frames", "check_build", "source_of"]

_EXAMPLES = """\
A lerobot policy and a dataset:

  craft-optim build-anchors anchors/ --policy.path=lerobot/pi0fast-base --dataset.repo_id=you/old_task --count=512
  torchrun --nproc-per-node 4 -m craft_optim.cli build-anchors anchors/ --policy.path=... --dataset.root=data/old_task

What a policy does in simulation, recorded by lerobot (as many episodes as environments: it records one of each):

  lerobot-eval --policy.path=you/policy --env.type=pusht --eval.n_episodes=8 --eval.batch_size=8 \\
      --eval.recording=true --output_dir=outputs/eval
  craft-optim build-anchors anchors/ --policy.path=you/policy --dataset.root=outputs/eval/recordings

No robot at all: instructions and pictures, one JSON object per line, paths relative to the file; without a "state"
the mean of what the policy was trained on stands for it:

  {"task": "open it", "images": {"observation.images.top": "img/0.png", "observation.images.wrist": "img/1.png"}}
  {"task": "open it", "image_path": "img/0.png", "state": [0.1, 0.2]}    (of a policy with one camera)

  craft-optim build-anchors anchors/ --policy.path=you/policy --prompts=questions.jsonl

A language model of transformers, and chats, prompts or texts (a .jsonl or .parquet with `messages`, with `prompt` and
`completion`, or with `text`; a .txt; a folder or an id of datasets); or its own answers to them:

  craft-optim build-anchors anchors/ --model.path=HuggingFaceTB/SmolLM2-135M-Instruct --data=old_chats.jsonl
  craft-optim build-anchors anchors/ --model.path=my_model/ --data=questions.jsonl --answers=sampled --count=256
  craft-optim build-anchors anchors/ --model.path=my_model/ --data=self --count=256

Any other model: a function without arguments in a script (or package.module:function) that returns
(model, batches), or (model, batches, settings) with further arguments of craft_optim.anchors.build:

  craft-optim build-anchors anchors/ --factory=my_script.py:anchors --top-k=64

A build that was stopped goes on where it stopped; a finished one is left as it is.
"""
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


def add(command: AddCommand) -> None:
    """The command and its options."""
    made = command("build-anchors", _build, "Write down what a model says about its anchors.", _EXAMPLES)
    made.set_defaults(stopped="; the same command goes on from here")
    add = made.add_argument
    add("out", metavar="OUT", help="folder of the cache")
    add_model(add)
    where = "its chats, prompts or texts: a file, a folder, the id of a dataset; or `self`, for what it writes itself"
    add("--data", metavar="WHERE", help=where)
    add("--answers", choices=["given", "sampled", "greedy"], help="the data's, or the model's own (default: by --data)")
    add("--counted", choices=["assistant", "all"], help="tokens that count, of given answers (default: assistant)")
    add("--max-length", type=whole, metavar="N", help="tokens of prompt and answer (default: 1024)")
    add("--max-new-tokens", type=whole, metavar="N", help="tokens of an answer that the model writes (default: 128)")
    add("--temperature", type=float, metavar="T", help="of sampled answers (default: 1)")
    add_frames(add)
    kinds = ["logits", "tokens", "prefix", "actions"]
    add("--keep", choices=kinds, help="what to keep of the policy (default: by its type)")
    add("--layers", nargs="+", type=layer, metavar="L", help="hidden states to keep: numbers or names of modules")
    add("--top-k", type=top_k, metavar="K", help="keep the K likeliest classes, or `all` (default: by their number)")
    add("--tokens", type=whole, metavar="N", help="let the model continue each anchor by at most N tokens")
    add("--frozen", nargs="+", metavar="NAME", help="modules that will not train: passes replay their outputs")
    add("--dtype", choices=["float16", "bfloat16", "float32"], help="of what is stored (default: float16)")
    add("--autocast", choices=["float16", "bfloat16"], help="run the model under autocast")
    add("--shard-size", type=whole, metavar="N", help="anchors per file (default: 256)")
    add("--overwrite", action="store_true", help="start over, whatever the folder holds")
    add("--no-resume", action="store_true", help="start a half-built cache over")


def add_frames(add: Callable[..., Any]) -> None:
    """The options that name the frames of a policy."""
    add("--dataset.repo_id", dest="repo_id", metavar="ID", help="LeRobotDataset with the anchors")
    add("--dataset.root", dest="root", metavar="FOLDER", help="where it is, if it is local; or a folder of several")
    which = "its first N, these ([0,3,5]), or a part as in Python (40:, -10:, 5:20); default: all"
    add("--dataset.episodes", dest="episodes", type=_episodes, metavar="WHICH", help=which)
    renamed = "JSON, names of its observations -> the policy's, as lerobot's --rename_map"
    add("--rename-map", "--rename_map", dest="rename_map", type=_rename_map, metavar="MAP", help=renamed)
    add("--dataset.revision", dest="revision", metavar="REVISION", help="branch, tag or commit of a dataset of the hub")
    beside = "seconds that a frame's time stamp may lie beside the video's (default: 1e-4)"
    add("--tolerance-s", dest="tolerance_s", type=float, metavar="S", help=beside)
    backends = ["torchcodec", "pyav", "video_reader"]
    add("--dataset.video-backend", dest="video_backend", choices=backends, help="what reads videos")
    add("--dataset.depth-output-unit", dest="depth_output_unit", choices=["m", "mm"], help="of depth cameras")
    spread = "so many, frames spread over tasks and episodes (default: all, at most 1024; of --data 512)"
    add("--count", type=whole, metavar="N", help=spread)
    add("--batch-size", type=whole, metavar="N", help="anchors per forward (default: 16; of --data 8)")
    prompts = "instructions to take, one per line, in turn; or a .jsonl with pictures, in the place of a dataset"
    add("--prompts", type=existing_file, metavar="FILE", help=prompts)
    add("--workers", type=whole, metavar="N", help="processes that read frames ahead (default: none)")


def _episodes(text: str) -> str:
    """A text that says which episodes."""
    try:
        parse_episodes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _rename_map(text: str) -> dict[str, str]:
    """A JSON object of names."""
    try:
        read = json.loads(text)
    except json.JSONDecodeError:
        read = None
    if not isinstance(read, dict) or not all(isinstance(name, str) for name in read.values()):
        raise argparse.ArgumentTypeError(
            f'must be JSON such as {{"observation.image": "observation.images.top"}}. Found {text!r}.'
        )
    return read


def _build(args: argparse.Namespace) -> None:
    check_build(args)
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
        if first:
            _print_built(cache, source, None if finished else time.monotonic() - started)


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
    code = f"{usage}\noptimizer = CraftOptimizer(optimizer, retention, epsilon=...)"
    if source.policy is None:
        print_code(code)
        return
    flags = (f"--craft.anchors.path={cache.path}", f"--policy.path={source.policy}")
    print_code(f"craft-optim train {shlex.join(flags)} --dataset.repo_id=NEW_TASK")
    print_code(code, "Or, in a loop of your own:")
