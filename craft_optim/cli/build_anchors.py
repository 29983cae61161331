"""craft-optim build-anchors: write down what a model says about its anchors."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from craft_optim.cli.options import AddCommand, add_json, add_model, existing_file, layer, top_k, whole
from craft_optim.episodes import parse_episodes

__all__ = ["add", "add_frames"]

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


def add(command: AddCommand) -> None:
    """The command and its options."""
    made = command("build-anchors", "Write down what a model says about its anchors.", _EXAMPLES)
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
    add_json(add)


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
