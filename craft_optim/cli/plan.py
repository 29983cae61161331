"""craft-optim plan: what a run will need, before there are weights, anchors or a GPU."""

import argparse

from craft_optim.cli.options import AddCommand, add_json, positive, top_k, whole

__all__ = ["add"]

_EXAMPLES = """\
A lerobot policy (pi0_fast, act) by its config alone, its batches as large as that allows; no weights are read:

  craft-optim plan --policy.path=lerobot/pi0fast-base --batch-size=8 --count=512 --gpu 24 80

A model of transformers by a config.json, or any model by a function that returns (model, batches[, settings]), as for
build-anchors. On torch.device("meta") it needs no weights either; without labels in its batch, the pass over anchors
stands for the task's:

  craft-optim plan --config=my_model/config.json --batch-size=4 --length=1024 --dtype=bfloat16
  craft-optim plan --factory=my_script.py:anchors --json=plan.json

Parameters that train, gradients, state and copies; activations and peaks with and without activation checkpointing;
logits; operations of a step; disk; GPUs, of which nine tenths count. FSDP2 shards all but activations and what is
gathered: parameters outside of lists of layers, and of the largest layer three times its size. Of one process, each
with these batches.
"""
_DTYPES = ("float32", "bfloat16", "float16")
_OPTIMIZERS = ("AdamW", "Adam", "SGD", "Adafactor", "RMSprop", "Adagrad", "NAdam", "RAdam")


def add(command: AddCommand) -> None:
    """The command and its options."""
    about = "Say what a run will need: memory, disk, GPUs, operations; without weights."
    add = command("plan", about, _EXAMPLES).add_argument
    add("--policy.path", dest="policy", metavar="PATH", help="a lerobot policy: folder or hub id")
    add("--config", metavar="PATH", help="a model of transformers: folder, config.json or hub id")
    add("--factory", metavar="FILE:FUNCTION", help="a function that returns (model, batches[, settings])")
    add("--batch-size", type=whole, metavar="B", help="examples of the task per step (default: 8)")
    sizes = "anchors per pass (default: --batch-size; of a policy, as many as `train` takes)"
    add("--anchor-batch-size", type=whole, metavar="B", help=sizes)
    add("--length", type=whole, metavar="T", help="of --config: tokens of each example (default: 512)")
    add("--count", type=whole, default=512, metavar="N", help="anchors in the cache (default: 512)")
    add("--top-k", type=top_k, metavar="K", help="keep the K likeliest classes, or `all` (default: by their number)")
    add("--valid", type=_share, metavar="SHARE", help="of positions, those whose classes count (default: 1, all)")
    add("--dtype", choices=_DTYPES, help="of the parameters (default: as the config says)")
    add("--autocast", choices=_DTYPES[1:], help="dtype of autocast around the passes (default: none)")
    add("--optimizer", choices=_OPTIMIZERS, default="AdamW", help="torch's base optimizer (default: AdamW)")
    add("--train", metavar="REGEX", help="only parameters whose names match train")
    add("--gpu", nargs="+", type=positive, default=[80.0], metavar="GIB", help="sizes of GPUs in GiB (default: 80)")
    add_json(add)


def _share(text: str) -> float:
    share = positive(text)
    if share > 1.0:
        raise argparse.ArgumentTypeError(f"must be a share > 0 and <= 1. Found {text!r}.")
    return share
